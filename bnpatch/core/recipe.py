"""The recipe: a JSON file of a few KB with the weights and statistics that bnpatch found for a model."""

import base64
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnpatch.core import hub
from bnpatch.core.errors import BnpatchError, check_weight, first_line
from bnpatch.core.io import check_regular, write_text
from bnpatch.core.limits import TEXT_MB
from bnpatch.core.moments import Moments
from bnpatch.core.patch import BESIDE_ALPHA, PatchState, PatchWeights, as_arrays
from bnpatch.core.text import counted

#: The newest format that this version reads. Format 2 has slopes, format 3 has offsets of the variance, too.
#: A recipe is written in the oldest format that can hold it, so that earlier versions read it.
FORMAT = 3

Array = npt.NDArray[Any]

# The fields of a recipe and of a norm layer, and their kinds, as in docs/reference/recipe.schema.json.
_KINDS: Mapping[str, Any] = {"sites": list, "provenance": dict, "weigh_single_values": bool}
_NUMBER = (int, float)
_REQUIRED: Mapping[str, Any] = {"name": str, "kind": str, "alpha": _NUMBER, "fingerprint": str}
_OPTIONAL: Mapping[str, Any] = {
    "lambda": _NUMBER,
    "target": dict,
    "calibrated": dict,
    "channels_per_group": int,
    "slope": _NUMBER,
    "var_offset": _NUMBER,
}


@dataclass(frozen=True)
class NormRecipe:
    """What a recipe says of one norm layer of the model.

    Attributes:
        name: dotted name of the module.
        kind: class name of the module, or type of the ONNX operator.
        alpha: the weight of the example, in [0, 1].
        fingerprint: a hash of the layer's parameters, see :mod:`bnpatch.models.fingerprints`.
        lambda_: the weight of ``re_estimated`` in the running statistics, in [0, 1].
        re_estimated: mean and variance re-estimated on new data, each of shape (C,); None if lambda is 0.
        running: mean and variance, each of shape (C,), for a layer without running statistics of its own.
        channels_per_group: number of consecutive channels whose moments a Batch/Group Norm pools. The model
            stores such a layer as Batch Norm, so only the recipe knows the number. It is 1 for Group Norm,
            which has the number itself.
        slope: how much the weight depends on the distance of the example, in [-4, 4].
        var_offset: how much larger the weight of the example's variance is than that of its mean, in [-8, 8].
    """

    name: str
    kind: str
    alpha: float
    fingerprint: str
    lambda_: float = 0.0
    re_estimated: Moments[Array] | None = None
    running: Moments[Array] | None = None
    channels_per_group: int = 1
    slope: float = 0.0
    var_offset: float = 0.0

    @property
    def format(self) -> int:
        """The oldest format that can hold this."""
        return 3 if self.var_offset else 2 if self.slope else 1

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; moments are written as base64 of little-endian float32."""
        values = {name: getattr(self, name) for name in ("name", "kind", "alpha", "fingerprint")}
        if self.re_estimated is not None:
            values |= {"lambda": self.lambda_, "target": _encode(self.re_estimated)}
        if self.running is not None:
            values["calibrated"] = _encode(self.running)
        if self.channels_per_group > 1:
            values["channels_per_group"] = self.channels_per_group
        return values | {kind: value for kind in BESIDE_ALPHA if (value := getattr(self, kind))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NormRecipe":
        """Read what :meth:`to_json` made.

        Raises:
            KeyError, TypeError, ValueError: the values are damaged.
        """
        for key, kind in _REQUIRED.items():
            if not isinstance(values[key], kind) or isinstance(values[key], bool):
                raise TypeError(f"{key} is {_brief(values[key])}")
        for key in values.keys() - _REQUIRED.keys():
            if key not in _OPTIONAL:
                raise ValueError(f"a norm layer has {key!r}")
            if not isinstance(values[key], _OPTIONAL[key]) or isinstance(values[key], bool):
                raise TypeError(f"{key} of {values['name']!r} is {_brief(values[key])}")
        re_estimated, running = (
            _decode(values[name]) if name in values else None for name in ("target", "calibrated")
        )
        weight = values.get("lambda", 0.0)
        if weight and re_estimated is None:
            raise ValueError("lambda without target")
        name, kind, alpha, hashed = (values[key] for key in ("name", "kind", "alpha", "fingerprint"))
        groups, beside = values.get("channels_per_group", 1), (values.get(k, 0.0) for k in BESIDE_ALPHA)
        layer = cls(name, kind, alpha, hashed, weight, re_estimated, running, groups, *beside)
        layer._check_ranges()
        return layer

    def _check_ranges(self) -> None:
        check_weight("lambda", self.lambda_, self.name)
        for kind in ("alpha", *BESIDE_ALPHA):
            check_weight(kind, getattr(self, kind), self.name)
        if self.channels_per_group < 1:
            raise BnpatchError(
                f"norm layer {self.name!r} pools {counted(self.channels_per_group, 'channel')}",
                "it must be 1 or more",
            )


@dataclass(frozen=True)
class Recipe:
    """Holds the weights for the norm layers of one model, and says how they were found.

    :func:`bnpatch.tune_alpha` makes one; :func:`bnpatch.apply` patches a model with it:

        recipe = bnpatch.Recipe.load("recipe.json")
        model = bnpatch.apply(model, recipe)

    Attributes:
        norm_layers: the norm layers, in the order of the model.
        provenance: how the weights were found: metric, data, results with confidence intervals, seed,
            versions, command line. It has plain JSON values, and nothing in it changes what the recipe does.
        include_1x1: also weight the example where it has one value per channel.
    """

    norm_layers: tuple[NormRecipe, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    include_1x1: bool = False

    @classmethod
    def of_state(
        cls,
        state: PatchState,
        kinds: Mapping[str, str],
        fingerprints: Mapping[str, str],
        provenance: Mapping[str, Any],
    ) -> "Recipe":
        """Make a recipe of the state of a model.

        Args:
            state: the state; its weights name every norm layer.
            kinds: by name of norm layer, in the order of the model, what :class:`NormRecipe` calls its kind.
            fingerprints: by name of norm layer, the hash of its parameters.
            provenance: how the state was found, as plain JSON values.
        """
        weights = state.weights
        norms = (
            NormRecipe(
                name,
                kind,
                weights.alphas[name],
                fingerprints[name],
                weights.lambdas[name],
                as_arrays(state.re_estimated[name]) if weights.lambdas[name] else None,
                as_arrays(state.running[name]) if name in state.running else None,
                state.channels_per_group.get(name, 1),
                *(weights.of(kind)[name] for kind in BESIDE_ALPHA),
            )
            for name, kind in kinds.items()
        )
        return cls(tuple(norms), dict(provenance), state.include_1x1)

    @property
    def alphas(self) -> dict[str, float]:
        """The weight of the example, in [0, 1], by name of norm layer."""
        return {norm_layer.name: norm_layer.alpha for norm_layer in self.norm_layers}

    @property
    def state(self) -> PatchState:
        """The patch as the value that :meth:`bnpatch.models.base.Model.set_state` takes."""
        norms = self.norm_layers
        return PatchState(
            PatchWeights(
                self.alphas,
                {norm.name: norm.lambda_ for norm in norms},
                *({norm.name: getattr(norm, kind) for norm in norms} for kind in BESIDE_ALPHA),
            ),
            {norm.name: norm.re_estimated for norm in norms if norm.re_estimated is not None},
            {norm.name: norm.running for norm in norms if norm.running is not None},
            {norm.name: norm.channels_per_group for norm in norms if norm.channels_per_group > 1},
            self.include_1x1,
        )

    def check_fits(self, fingerprints: Mapping[str, str]) -> None:
        """Check that the recipe was made for a model with these norm layers.

        Args:
            fingerprints: by name of norm layer of the model, the hash of its parameters.

        Raises:
            BnpatchError: the recipe was made for another model; the message names the first norm layer that
                differs.
        """
        own = {norm.name: norm.fingerprint for norm in self.norm_layers}
        names = (*own, *sorted(fingerprints.keys() - own.keys()))
        name = next((n for n in names if own.get(n) != fingerprints.get(n)), None)
        if name is None:
            return
        what = f"the parameters of norm layer {name!r} differ"
        if name not in fingerprints:
            what = f"norm layer {name!r} is missing"
        elif name not in own:
            what = f"it has no norm layer {name!r}"
        remedy = "apply it to the model that it was tuned on, or tune this one"
        raise BnpatchError(f"the recipe is for another model: {what}", remedy)

    def check_sizes(self, num_channels: Mapping[str, int]) -> None:
        """Check that the statistics have the sizes of the model's norm layers, given by name.

        Raises:
            BnpatchError: the statistics of a norm layer have another size.
        """
        for name, statistics in (*self.state.re_estimated.items(), *self.state.running.items()):
            if statistics.mean.shape != (num_channels[name],):
                raise BnpatchError(
                    f"the recipe is damaged: norm layer {name!r} has {num_channels[name]} channels, its "
                    f"statistics have the shape {tuple(statistics.mean.shape)}",
                    "make another with bnpatch tune-alpha",
                )

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        return {
            "format": max((norm_layer.format for norm_layer in self.norm_layers), default=1),
            "sites": [norm_layer.to_json() for norm_layer in self.norm_layers],
            **({"weigh_single_values": True} if self.include_1x1 else {}),
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to a file as JSON, atomically.

        Raises:
            BnpatchError: the file can't be written.
        """
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,  # noqa: A002 - the hub's own word
        base_model: str | None = None,
    ) -> str:
        """Write the recipe to a repository on the Hugging Face hub, with a card that says what it does.

            recipe.push_to_hub("org/name", base_model="timm/resnet50.a1_in1k", license="apache-2.0")
            model = bnpatch.apply(model, "hf-hub:org/name")

        Args:
            repository: org/name. It is made if it is not there.
            private: make it private.
            token: a token with the right to write; default: that of ``hf auth login``.
            license: the licence of the recipe, for the card.
            base_model: the repository of the model that the recipe is for, for the card.

        Returns:
            The address of the commit.

        Raises:
            BnpatchError: the hub refuses it or can't be reached.
        """
        card = hub.card(self, repository, license, base_model)
        return hub.push(self, repository, private=private, token=token, card=card)

    @classmethod
    def from_json(cls, content: Any, source: str = "recipe") -> "Recipe":
        """Read what :meth:`to_json` made.

        Args:
            content: the JSON values.
            source: where they come from, for messages.

        Raises:
            BnpatchError: the content is not a recipe, is damaged, or has another format version.
        """
        remedy = "make one with bnpatch tune-alpha"
        if not isinstance(content, dict) or "format" not in content:
            raise BnpatchError(f"{source} is not a recipe", remedy)
        if isinstance(content["format"], bool) or content["format"] not in range(1, FORMAT + 1):
            raise BnpatchError(
                f"{source} has recipe format {content['format']}, this bnpatch reads 1 to {FORMAT}",
                "update bnpatch",
            )
        try:
            for key, kind in _KINDS.items():
                if not isinstance(content.get(key, kind()), kind):
                    raise TypeError(f"{key} is {_brief(content[key])}")
            norm_layers = tuple(NormRecipe.from_json(norm_layer) for norm_layer in content["sites"])
            provenance = dict(content["provenance"])
        except BnpatchError as error:
            raise BnpatchError(f"{source}: {error.problem}", error.remedy) from error
        # A field is missing, of another type (values without keys, or not iterable), or out of range.
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BnpatchError(f"{source} is a damaged recipe ({first_line(error)})", remedy) from error
        counts = Counter(norm_layer.name for norm_layer in norm_layers)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise BnpatchError(f"{source} is a damaged recipe ({min(twice)!r} occurs twice)", remedy)
        return cls(norm_layers, provenance, content.get("weigh_single_values", False))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe file.

        Args:
            path: the file, or ``hf-hub:org/name`` for that of a repository on the Hugging Face hub.

        Raises:
            BnpatchError: the file can't be read or is not a recipe.
        """
        if os.fspath(path).startswith(hub.PREFIX):
            path = hub.fetch(os.fspath(path).removeprefix(hub.PREFIX))
        remedy = "name a recipe.json file"
        try:
            check_regular(Path(path))
            size = Path(path).stat().st_size / 1e6
            TEXT_MB.check(size, f"the recipe {path} has {size:,.0f} MB")
            text = Path(path).read_text(encoding="utf-8")
            content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused)
        except OSError as error:
            raise BnpatchError(f"cannot read {path}: {error.strerror or error}", remedy) from error
        except (ValueError, RecursionError) as error:
            raise BnpatchError(f"{path} is not a recipe", remedy) from error
        return cls.from_json(content, str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of an object in JSON; raise ValueError if it has a key twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _refused(constant: str) -> None:
    """Raise ValueError for NaN and infinities, which are not JSON."""
    raise ValueError(f"{constant} is no number")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _encode(moments: Moments[Array]) -> dict[str, str]:
    parts = vars(moments).items()
    return {name: base64.b64encode(np.asarray(part, "<f4").tobytes()).decode() for name, part in parts}


def _decode(parts: Mapping[str, str]) -> Moments[Array]:
    arrays = (np.frombuffer(base64.b64decode(parts[name], validate=True), "<f4") for name in ("mean", "var"))
    mean, var = (array.astype(np.float64) for array in arrays)
    if mean.shape != var.shape or not np.isfinite(mean).all() or not (np.isfinite(var) & (var >= 0)).all():
        raise ValueError("means or variances that are not finite, negative variances, or other lengths")
    return Moments(mean, var)
