"""A patch as a value: alpha, lambda and slope of each norm layer, and the statistics that they weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError, check_alpha, check_slope
from bnpatch.core.moments import Moments

#: By name of norm layer, a mean and a variance, each of shape (C,).
Statistics = Mapping[str, Moments[Any]]


@dataclass(frozen=True)
class PatchWeights:
    """The weights of a patch, by name of norm layer. A norm layer that is not named keeps its weights.

        >>> weights = PatchWeights({"bn1": 0.1, "bn2": 0.02}, slopes={"bn1": 0.5})
        >>> weights.updated(PatchWeights({"bn1": 0.0})).is_baseline({"bn1": 0.0, "bn2": 0.0})
        False

    Attributes:
        alphas: the weight of the example; the running statistics have the weight 1 - alpha.
        lambdas: the weight of the statistics that were re-estimated on new data in the running
            statistics; those of the checkpoint (the source) have the weight 1 - lambda.
        slopes: how much the weight of the example depends on its distance from the running statistics, see
            :func:`~bnpatch.core.moments.weight_by_distance`. With 0, every example has the weight alpha.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    lambdas: Mapping[str, float] = field(default_factory=dict)
    slopes: Mapping[str, float] = field(default_factory=dict)

    def is_baseline(self, baseline_alphas: Mapping[str, float]) -> bool:
        """Tell whether a model with these weights computes what the unpatched model does.

        Slopes don't matter, because no slope changes a weight of 0 or 1.

        Args:
            baseline_alphas: by name of norm layer, the alpha at which it computes what it did.
        """
        return not any(self.lambdas.values()) and all(a == baseline_alphas[n] for n, a in self.alphas.items())

    def updated(self, other: "PatchWeights") -> "PatchWeights":
        """Return these weights, replaced by those of ``other`` for the norm layers that ``other`` names."""
        return PatchWeights(
            {**self.alphas, **other.alphas},
            {**self.lambdas, **other.lambdas},
            {**self.slopes, **other.slopes},
        )

    def varying(self) -> dict[str, float]:
        """Return the slopes that have an effect: they are not 0, and alpha is neither 0 nor 1."""
        return {n: s for n, s in self.slopes.items() if s and 0 < self.alphas.get(n, 0.0) < 1}

    def slopes_to_write(self, as_inputs: object) -> Mapping[str, float]:
        """Return the slopes that a graph needs.

        Args:
            as_inputs: whether the weights stay adjustable. Then the graph needs all slopes if any is not 0.
        """
        return self.slopes if as_inputs and any(self.slopes.values()) else self.varying()


@dataclass(frozen=True, eq=False)
class PatchState:
    """Everything that distinguishes a patched model from the unpatched one, as one immutable value.

    The search proposes states, a model computes with one, a recipe stores one, and an export writes one.

    Attributes:
        weights: alpha, lambda and slope by name of norm layer.
        re_estimated: statistics re-estimated on new data (AdaBN); lambda is their weight.
        running: running statistics from data, for norm layers that have none of their own: Group Norm, Batch
            Norm that never kept any, and Batch Norm that was fused into a convolution. Such a norm is a norm
            layer of the model only if the state has its running statistics.
        channels_per_group: number of consecutive channels whose statistics a Batch/Group Norm pools, for the
            norm layers where it is more than 1.
        include_1x1: also weight the example where it has one value per channel, ``(N, C)`` or 1 x 1 maps.
    """

    weights: PatchWeights = field(default_factory=PatchWeights)
    re_estimated: Statistics = field(default_factory=dict)
    running: Statistics = field(default_factory=dict)
    channels_per_group: Mapping[str, int] = field(default_factory=dict)
    include_1x1: bool = False

    def with_weights(self, weights: PatchWeights) -> "PatchState":
        """Return this state with other weights for the norm layers that ``weights`` names."""
        return replace(self, weights=self.weights.updated(weights))

    def with_re_estimated(self, statistics: Statistics) -> "PatchState":
        """Return this state with these re-estimated statistics for the norm layers that they name."""
        return replace(self, re_estimated={**self.re_estimated, **rounded(statistics)})

    def with_running(self, running: Statistics) -> "PatchState":
        """Return this state with other running statistics for the norm layers that ``running`` names."""
        return replace(self, running={**self.running, **rounded(running)})

    def computes_like(self, other: "PatchState") -> bool:
        """Tell whether a model computes the same in two states with the same running statistics and options.

        The method compares the weights, and the re-estimated statistics that have a weight. These count as
        equal only if they are the same object.
        """
        weighted = {name for name, weight in self.weights.lambdas.items() if weight}
        return self.weights == other.weights and all(
            self.re_estimated.get(name) is other.re_estimated.get(name) for name in weighted
        )

    def check(self, baseline_alphas: Mapping[str, float], model: str) -> None:
        """Raise an error if a model can't compute with this state. A model calls this before it changes.

        Args:
            baseline_alphas: by name of norm layer of the model, the alpha at which it computes what it did.
            model: name of the model, for messages.

        Raises:
            BnpatchError: the model has no norm layer of a name, or a norm layer with a lambda has no
                re-estimated statistics.
            InvalidAlphaError: a weight is not in [0, 1].
            InvalidSlopeError: a slope is not in [-4, 4].
        """
        for kind, weights in (("alpha", self.weights.alphas), ("lambda", self.weights.lambdas)):
            for name, weight in weights.items():
                check_alpha(float(weight), name, kind)
        for name, slope in self.weights.slopes.items():
            check_slope(float(slope), name)
        for name in (*self.weights.alphas, *self.weights.lambdas, *self.weights.slopes):
            if name not in baseline_alphas:
                raise BnpatchError(f"{model} has no norm layer {name!r}", "see bnpatch inspect --sites")
        for name, weight in self.weights.lambdas.items():
            if weight and name not in self.re_estimated:
                raise BnpatchError(
                    f"there are no re-estimated statistics for norm layer {name!r}",
                    "re-estimate them on data",
                )


def rounded(statistics: Statistics) -> dict[str, Moments[Any]]:
    """Return statistics as a state keeps them: torch tensors unchanged, arrays rounded to float32."""
    return {
        name: part if hasattr(part.mean, "detach") else as_arrays(part) for name, part in statistics.items()
    }


def as_arrays(moments: Moments[Any]) -> Moments[Any]:
    """Convert moments to float64 arrays whose values are rounded to float32.

    A recipe stores float32, so rounding makes it exact. Later arithmetic on the arrays is in float64.
    """
    parts = (p.detach().cpu().numpy() if hasattr(p, "detach") else p for p in (moments.mean, moments.var))
    return Moments(*(np.asarray(part, np.float32).astype(np.float64) for part in parts))
