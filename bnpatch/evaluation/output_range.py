"""Measure how far normalized values lie from their mean on data, and compare that with training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.data.dataset import Examples
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.functional import affine, mixture
from bnpatch.nn.norm import ExampleWeightedNorm
from bnpatch.nn.surgery import TorchNormLayer


@dataclass(frozen=True)
class OutputRange:
    """How far the normalized values of a norm layer lie from their mean, in standard deviations.

    Attributes:
        name: name of the norm layer.
        observed: the largest distance on the data, that is ``max |y - beta| / |gamma|``.
        training_bound: the largest distance that is possible in training, see :func:`training_bound`.
        inference_bound: the largest distance that is possible at inference, see :func:`inference_bound`.
    """

    name: str
    observed: float
    training_bound: float
    inference_bound: float

    @property
    def is_beyond_training(self) -> bool:
        """Whether later layers see values that were impossible in training."""
        return not self.observed <= self.training_bound  # NaN is beyond, too


def training_bound(num_values: int) -> float:
    """Return the largest normalized value that is possible among ``num_values`` values normalized together.

    It is ``sqrt(n - 1)``, which one value reaches if the n - 1 others are equal.
    """
    return math.sqrt(num_values - 1)


def inference_bound(num_values: int, alpha: float, var_alpha: float | None = None) -> float:
    """Return the largest normalized value that is possible at inference for an example of S values.

    It is ``sqrt(S / alpha - 1)``, because each of the S values (``num_values``) has the weight alpha / S in
    the moments that normalize it. If the example's variance has another weight, ``var_alpha``, it is
    ``sqrt((S - 1) / var_alpha + 1 / alpha - 1)``. It is infinite where the example has no weight. With a
    slope, ``alpha`` and ``var_alpha`` are the smallest weights that an example has.
    """
    var_alpha = alpha if var_alpha is None else var_alpha
    return math.sqrt((num_values - 1) / var_alpha + 1 / alpha - 1) if alpha and var_alpha else math.inf


def output_ranges(
    model: TorchModel,
    examples: Examples,
    *,
    train_batch_size: int,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
) -> tuple[OutputRange, ...]:
    """Run examples through a model with its current state, and record the range at every norm layer.

    Args:
        model: the model; it is in evaluation mode while this runs.
        examples: from :func:`bnpatch.open_examples`.
        train_batch_size: number of examples that were normalized together in training.
        batch_size: examples at a time; it changes only the speed.
        on_batch: called with the number of examples of each batch, for progress.

    Returns:
        The ranges of the norm layers that the examples reached, in the order of the model. The bounds hold
        for feature maps of the size that these examples have.

    Raises:
        BnpatchError: the model doesn't take the examples, or no example can be read.
    """
    watched = [_Watched(norm_layer) for norm_layer in model.inventory().norm_layers]
    with model.evaluating():
        handles = [watch.norm_layer.module.register_forward_pre_hook(watch.note) for watch in watched]
        try:
            for batch in examples.batches(batch_size):
                model.predict(batch.x)
                on_batch(len(batch.x))
        finally:
            for handle in handles:
                handle.remove()
    if examples.skipped and len(examples.skipped) == len(examples):
        index, problem = next(iter(examples.skipped.items()))
        raise BnpatchError(
            f"none of the images can be read, {examples.source.name(index)} for one: {problem}",
            "look at the files",
        )
    return tuple(watch.range(train_batch_size) for watch in watched if watch.num_values)


@dataclass
class _Watched:
    """A norm layer with its observations: values normalized together, smallest weights, largest value."""

    norm_layer: TorchNormLayer
    num_values: int = 0
    weights: tuple[float, float] = 1.0, 1.0  # of the mean and of the variance
    largest: Tensor | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        running = None
        weight = ExampleWeight(self.norm_layer.baseline_alpha)
        if isinstance(module, ExampleWeightedNorm):
            running = module.running
            if module.weighs(x):
                weight = module.example_weight
        if running is None:
            _, _, mean, var = self.norm_layer.parameters()
            assert mean is not None  # a norm layer without buffers has module.running
            assert var is not None
            running = Moments(mean, var)
        groups = self.norm_layer.channels_per_group
        self.num_values = math.prod(x.shape[2:]) * groups
        eps: Any = module.eps
        mixed = mixture(x, running, eps, weight, groups)
        smallest = (float(torch.as_tensor(part).min()) for part in (mixed.weight, mixed.var_weight))
        of_mean, of_var = map(min, self.weights, smallest)
        self.weights = of_mean, of_var
        scale = torch.rsqrt(mixed.total)
        y = affine(x, scale, -mixed.mean * scale)
        largest = y.abs().amax().float()
        # The tensor stays on the device; reading it here would synchronize at every layer.
        self.largest = largest if self.largest is None else self.largest.maximum(largest)

    def range(self, train_batch_size: int) -> OutputRange:
        assert self.largest is not None  # note() has run
        return OutputRange(
            self.norm_layer.name,
            self.largest.item(),
            training_bound(train_batch_size * self.num_values),
            inference_bound(self.num_values, *self.weights),
        )
