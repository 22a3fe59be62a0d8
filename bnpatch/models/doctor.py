"""Find what is wrong with a model or with how it is run, from its norm layers and a few images.

The running statistics of the first norm layer say what its input looked like in training. Images that are
preprocessed otherwise, or shifted, have other statistics there. The measure is the distance of
:func:`bnpatch.core.moments.distance`, of the moments of all images together. No labels are needed.
docs/doctor.md has measured values.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.dataset import Examples, Indices
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.base import Model
from bnpatch.models.distances import Shift, first_moments, first_shift, on_host, pooled_distance, shifts

#: Number of images that tell enough.
NUM_IMAGES = 64

# Images like those of training have a distance below this at every norm layer.
_USUAL = 0.2

# A shift that all images share has at least this common share, a mixture of shifts a smaller one.
_COMMON = 0.6

# Another preprocessing fits clearly better if the distance is above _MISFIT with the one in use, and with the
# other below _FIT and below _CLEARLY times that distance.
_MISFIT, _FIT, _CLEARLY = 0.3, 0.25, 1 / 3

# Bytes of ordinary images span nearly all of 0 to 255. Those of images with less contrast or light don't, and
# such a shift looks like another preprocessing to the first norm layer.
_FULL_RANGE = 0.9

_HUGE_VARIANCE = 1e6

# TensorFlow's eps. It fits clearly better if the distance with it is less than _BY_EPS times the other one.
_TF_EPS, _BY_EPS = 1e-3, 0.6

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Fit:
    """How well images fit the first norm layer with a certain preprocessing.

    Attributes:
        name: name of the preprocessing; "the model's own" is the one that is used.
        mean: mean per channel, for values in [0, 1].
        std: standard deviation per channel.
        distance: the distance from the running statistics, 0 for images that fit perfectly.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    distance: float


@dataclass(frozen=True)
class Checkup:
    """What a few images say of a model at its norm layers.

    Attributes:
        fits: how each preprocessing fits the first norm layer, the model's own first; only that one for
            inputs that are floats.
        shifts: how the images differ from those of training at each norm layer, in the order of the model.
        byte_range: what part of the range 0 to 255 the bytes of the images span; None for floats.
    """

    fits: tuple[Fit, ...]
    shifts: tuple[Shift, ...]
    byte_range: float | None

    @property
    def first(self) -> Shift:
        """The shift at the first norm layer."""
        return self.shifts[0]

    @property
    def largest(self) -> Shift:
        """The shift at the norm layer where the images differ most from those of training."""
        return max(self.shifts, key=lambda shift: shift.distance)

    @property
    def own(self) -> Fit:
        """The fit of the preprocessing that is used."""
        return self.fits[0]

    @property
    def better(self) -> Fit | None:
        """Another preprocessing that fits clearly better than the one that is used, or None."""
        best = min(self.fits, key=lambda fit: fit.distance)
        clearly = best.distance < min(_FIT, _CLEARLY * self.own.distance)
        return best if clearly and self.own.distance > _MISFIT else None

    @property
    def is_sure(self) -> bool:
        """Whether a shift of the images is an unlikely reason for what :attr:`better` says."""
        return _is_full(self.byte_range)

    @property
    def common_share(self) -> float:
        """What part of the images' deviations is one shift that all share: the median of all norm layers.

        Single layers don't tell: the first sees little of a noise, and the last have maps so small that every
        image has less variance than all images together.
        """
        return float(np.median([shift.common_share for shift in self.shifts]))

    @property
    def is_unusual(self) -> bool:
        """Whether the images differ from those of training, as some norm layer sees them."""
        return self.largest.distance > _USUAL

    def warning(self) -> str:
        """Say in one line that another preprocessing fits clearly better; "" if none does."""
        if (better := self.better) is None:
            return ""
        text = (
            f"the images fit the first norm layer better with another preprocessing: {better.name} (distance "
            f"from the running statistics {better.distance:.2g}, with the one in use {self.own.distance:.2g})"
        )
        use = f"--mean {_numbers(better.mean)} --std {_numbers(better.std)}"
        if self.is_sure:
            return f"{text}; see whether the model was trained so, and give {use} if it was"
        return (
            f"{text}; either the model was trained so ({use}), or the images are shifted: their bytes span "
            f"only {self.byte_range or 0:.0%} of the range"
        )

    def outlook(self) -> str:
        """Say whether bnpatch can be expected to help."""
        if self.better is not None and self.is_sure:
            return "settle the preprocessing first: it decides more than any patch"
        if not self.is_unusual:
            return (
                "to all norm layers the images together look like those of training: expect little of a "
                "patch unless each is shifted in another way, or the model was trained with small batches"
            )
        if self.common_share >= _COMMON:
            return (
                "the images differ from those of training, mostly by what all of them share: a shift, which "
                "re-estimated running statistics (lambda, part of the default search) may undo, or another "
                "size than in training (--img-size)"
            )
        return (
            "the images differ from those of training, each in another way: the weight of the example "
            "(alpha, per layer) may help"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            **asdict(self),
            "norm_layer": self.first.norm_layer,
            "common_share": self.common_share,
            "distance": self.own.distance,
            "better": None if self.better is None else asdict(self.better),
            "is_sure": self.is_sure,
            "outlook": self.outlook(),
        }


def check_up(
    model: Model[Any],
    examples: Examples,
    *,
    indices: Indices | None = None,
    seed: int = 0,
    thorough: bool = True,
) -> Checkup | None:
    """Compare a few images with the running statistics of the first norm layer, by preprocessing.

        model = bnpatch.load("model.pt")
        print(check_up(model, bnpatch.open_examples("val/", model, labels="optional")).outlook())

    The order of the channels (RGB or BGR) hardly shows there, nor do the crop and the size. A size that is
    far from that of training may look like a shift.

    Args:
        model: the model; it is left as it was.
        examples: images; labels are not used.
        indices: indices of the examples to choose from; None for all.
        seed: seed of the choice.
        thorough: look at all norm layers, and try other preprocessings even if the one in use fits. False
            looks at the first norm layer alone, and returns None if :attr:`Checkup.is_sure` would be false.

    Returns:
        What there is to see; None if no norm layer has running statistics from training, or if no image can
        be read.
    """
    order = np.random.default_rng(seed).permutation(np.arange(len(examples)) if indices is None else indices)
    batch = next(examples.batches(NUM_IMAGES, order[:NUM_IMAGES]), None)
    if batch is None:
        return None
    byte_range = None if batch.x.is_floating_point() else _byte_range(batch.x)
    if not thorough and not _is_full(byte_range):
        return None
    with model.in_state(model.baseline()):
        found = (shifts if thorough else first_shift)(model, batch.x)
        if not found:
            return None
        own = model.preprocessing
        fits = [Fit("the model's own", own.mean, own.std, found[0].distance)]
        if not batch.x.is_floating_point() and (thorough or fits[0].distance > _MISFIT):
            fits += [_fit(model, other, batch.x) for other in usual_preprocessings(own).items()]
    return Checkup(tuple(fits), found, byte_range)


def warn_of_preprocessing(model: Model[Any], examples: Examples, indices: Indices | None = None) -> str:
    """Warn if another preprocessing than the one in use fits clearly better and no shift explains it.

    Returns:
        The text of the warning, or "".
    """
    try:
        found = check_up(model, examples, indices=indices, thorough=False)
    except BnpatchError:  # what is wrong shows in the run itself, which this check must not end
        return ""
    if found is None or not found.is_sure or not (text := found.warning()):
        return ""
    warnings.warn(text, BnpatchWarning, stacklevel=2)
    return text


def usual_preprocessings(own: Preprocessing) -> dict[str, Preprocessing]:
    """Return the preprocessings that are in use elsewhere, and the usual mistakes, by name."""
    zero, one = (0.0,), (1.0,)
    twice = (
        tuple(m * (1 + s) for m, s in zip(own.mean, own.std, strict=True)),
        tuple(s * s for s in own.std),
    )
    pairs: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "ImageNet's mean and std": _IMAGENET,
        "mean 0.5 and std 0.5": ((0.5,), (0.5,)),
        "values in 0 to 1": (zero, one),
        "values in 0 to 255": (zero, (1 / 255,)),
        "ImageNet's mean subtracted in 0 to 255": (_IMAGENET[0], (1 / 255,)),
        "normalization done twice": twice,
    }
    channels = own.input_size[0]
    return {
        name: other
        for name, (mean, std) in pairs.items()
        if len(mean) in (1, channels) or channels == 1
        for other in [replace(own, mean=tuple(mean), std=tuple(std))]
        if not (np.allclose(other.mean, own.mean, atol=0.03) and np.allclose(other.std, own.std, rtol=0.1))
    }


def findings(model: Model[Any]) -> list[str]:
    """Say what is unusual in the running statistics of the checkpoint, one line each."""
    facts = model.facts()
    own = {name: fact for name, fact in facts.items() if name not in model.state.running}
    mean, var = ({n: on_host(getattr(f.source, part)) for n, f in own.items()} for part in ("mean", "var"))
    texts = []
    if untouched := [n for n in own if not mean[n].any() and (var[n] == 1).all()]:
        texts.append(
            f"running statistics were never updated at {_some(untouched, own)} (mean 0 and variance 1): "
            "take a checkpoint that has them, or let tune-alpha re-estimate them (lambda)"
        )
    if dead := [n for n in own if (var[n] <= 0).any()]:
        count = sum(int((var[n] <= 0).sum()) for n in dead)
        texts.append(
            f"{count} channels have a running variance of 0, at {_some(dead, own)}: they were constant in "
            "training, which is harmless while they stay so"
        )
    if huge := [n for n in own if (var[n] > _HUGE_VARIANCE).any()]:
        texts.append(
            f"running variances exceed {_HUGE_VARIANCE:.0e} at {_some(huge, own)}: training may have diverged"
        )
    return texts


def eps_distances(model: Model[Any], examples: Examples, seed: int = 0) -> tuple[float, float] | None:
    """Return the median distance at all norm layers, with the eps in use and with TensorFlow's 1e-3.

    Checkpoints don't keep eps. A network that was ported from TensorFlow needs 1e-3. Where its code has 1e-5,
    channels of small variance come out too large, and later layers see other statistics than in training.

    Returns:
        The two distances; None if the model's eps is not smaller, can't be changed, or if no image can be
        read.
    """
    modules = [norm.module for norm in model.inventory().norm_layers if hasattr(norm, "module")]
    if not modules or not all(0 < getattr(m, "eps", 0.0) < _TF_EPS for m in modules):
        return None
    order = np.random.default_rng(seed).permutation(len(examples))
    batch = next(examples.batches(NUM_IMAGES, order[:NUM_IMAGES]), None)
    if batch is None:
        return None
    with model.in_state(model.baseline()):
        before = _median_distance(model, batch.x)
        with _eps(modules, _TF_EPS):
            after = _median_distance(model, batch.x)
    return before, after


def eps_finding(own: float, tensorflow: float) -> str:
    """Say that TensorFlow's eps fits clearly better, given what :func:`eps_distances` returns; else ""."""
    if not tensorflow < _BY_EPS * own:
        return ""
    return (
        f"the layers' running statistics fit better with eps = 1e-3 (median distance {tensorflow:.2g}) than "
        f"with the eps in use ({own:.2g}): if the model was ported from TensorFlow, build it with eps = 1e-3 "
        "(timm's architectures with tf_ in front have it)"
    )


@contextmanager
def _eps(modules: Sequence[Any], eps: float) -> Iterator[None]:
    """Give modules another eps until the context ends."""
    before = [module.eps for module in modules]
    try:
        for module in modules:
            module.eps = eps
        yield
    finally:
        for module, old in zip(modules, before, strict=True):
            module.eps = old


def _median_distance(model: Model[Any], x: Tensor) -> float:
    facts, (_, seen) = model.facts(), model.observe(x)
    same = {name: replace(fact, eps=_TF_EPS) for name, fact in facts.items()}  # to measure both alike
    return float(np.median([pooled_distance(seen[name], same[name]) for name in seen if name in same]))


def _fit(model: Model[Any], named: tuple[str, Preprocessing], x: Tensor) -> Fit:
    name, preprocessing = named
    before = model.preprocessing
    try:
        model.preprocessing = preprocessing
        found = first_moments(model, x)
    finally:
        model.preprocessing = before
    assert found is not None  # the same layer is reached by any values
    return Fit(name, preprocessing.mean, preprocessing.std, pooled_distance(found[1], found[2]))


def _is_full(byte_range: float | None) -> bool:
    return byte_range is not None and byte_range >= _FULL_RANGE


def _byte_range(x: Tensor) -> float:
    low, high = np.quantile(on_host(x), (0.001, 0.999))
    return float(high - low) / 255


def _some(names: Sequence[str], of: Mapping[str, Any]) -> str:
    """Say how many of all norm layers these are, and name two of them."""
    return (
        f"{len(names)} of {len(of)} norm layers ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
    )


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in (values if len(set(values)) > 1 else values[:1]))
