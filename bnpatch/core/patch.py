"""A patch as a value: the weights of each norm layer, and the statistics that they weight."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnpatch.core.errors import BnpatchError, check_weight
from bnpatch.core.moments import ExampleWeight, Moments

#: By name of norm layer, a mean and a variance, each of shape (C,).
Statistics = Mapping[str, Moments[Any]]

#: The numbers beside alpha that weight the example, see :class:`~bnpatch.core.moments.ExampleWeight`. Each
#: has no effect if it is 0, or if alpha is 0 or 1.
BESIDE_ALPHA = ("slope", "var_offset")


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
            :class:`~bnpatch.core.moments.ExampleWeight`. With 0, every example has the weight alpha.
        var_offsets: how much larger the weight of the example's variance is than that of its mean, see there.
    """

    alphas: Mapping[str, float] = field(default_factory=dict)
    lambdas: Mapping[str, float] = field(default_factory=dict)
    slopes: Mapping[str, float] = field(default_factory=dict)
    var_offsets: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def baseline(cls, baseline_alphas: Mapping[str, float]) -> "PatchWeights":
        """Return the weights with which a model computes what the unpatched model does.

        Args:
            baseline_alphas: by name of norm layer, the alpha at which it computes what it did.
        """
        zeros = dict.fromkeys(baseline_alphas, 0.0)
        return cls(dict(baseline_alphas), zeros, zeros, zeros)

    def of(self, kind: str) -> Mapping[str, float]:
        """Return one kind of weight, "alpha", "lambda", "slope" or "var_offset", by name of norm layer."""
        values: Mapping[str, float] = getattr(self, f"{kind}s")
        return values

    def kinds(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Iterate over the kinds of weights, each with its values by name of norm layer."""
        return ((name.removesuffix("s"), values) for name, values in vars(self).items())

    def example_weight(self, name: str) -> ExampleWeight:
        """Return how much the example counts at a norm layer."""
        return ExampleWeight(self.alphas[name], *(self.of(kind).get(name, 0.0) for kind in BESIDE_ALPHA))

    def is_baseline(self, baseline_alphas: Mapping[str, float]) -> bool:
        """Tell whether a model with these weights computes what the unpatched model does.

        Slopes and offsets don't matter, because they change no weight of 0 or 1.

        Args:
            baseline_alphas: by name of norm layer, the alpha at which it computes what it did.
        """
        return not any(self.lambdas.values()) and all(a == baseline_alphas[n] for n, a in self.alphas.items())

    def updated(self, other: "PatchWeights") -> "PatchWeights":
        """Return these weights, replaced by those of ``other`` for the norm layers that ``other`` names."""
        return PatchWeights(*({**mine, **other.of(kind)} for kind, mine in self.kinds()))

    def in_effect(self, kind: str) -> dict[str, float]:
        """Return the slopes or offsets that have an effect: not 0, and alpha is neither 0 nor 1."""
        return {n: value for n, value in self.of(kind).items() if value and 0 < self.alphas.get(n, 0.0) < 1}

    def to_write(self, norm_layers: Collection[str], as_inputs: object) -> "PatchWeights":
        """Return the weights that a graph needs at some norm layers; it has no lambdas.

        Args:
            norm_layers: names of the norm layers.
            as_inputs: whether the weights stay adjustable. Then the graph needs all slopes if any is not 0,
                and likewise all offsets.
        """
        needed = {
            kind: self.of(kind) if as_inputs and any(self.of(kind).values()) else self.in_effect(kind)
            for kind in BESIDE_ALPHA
        }
        return PatchWeights(
            **{
                f"{kind}s": {name: value for name, value in values.items() if name in norm_layers}
                for kind, values in {"alpha": self.alphas, **needed}.items()
            }
        )


@dataclass(frozen=True, eq=False)
class PatchState:
    """Everything that distinguishes a patched model from the unpatched one, as one immutable value.

    The search proposes states, a model computes with one, a recipe stores one, and an export writes one.

    Attributes:
        weights: alpha, lambda, slope and offset by name of norm layer.
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
            InvalidWeightError: a weight is out of its range.
        """
        for kind, weights in self.weights.kinds():
            for name, weight in weights.items():
                check_weight(kind, float(weight), name)
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
    parts = (
        p.detach().cpu().double().numpy() if hasattr(p, "detach") else p for p in (moments.mean, moments.var)
    )
    return Moments(*(np.asarray(part, np.float32).astype(np.float64) for part in parts))
