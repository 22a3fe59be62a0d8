"""Weights per norm layer by gradient: for torch models, where every weight can be told which way to go."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.moments import mix
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.norm import ExampleWeightedNorm

#: A weight nearer to 0 or 1 than this has hardly a gradient on its logit: learning starts no nearer.
_MARGIN = 0.01

#: How often the weights are judged on the way, and after how many such looks without a gain learning ends.
CHECKS, _PATIENCE = 10, 3

# Steps see at most so many examples, or one set of those that a loss needs together; all of them together
# about so many; and there are no more and no fewer steps than these.
_BATCH, _EXAMPLES, _MOST_STEPS, _LEAST_STEPS = 128, 12_800, 100, 40
# The learning rate is such that a logit can go about half as far in all.
_REACH = 20.0

#: A step costs about as much as this many evaluations of its examples: 2.1 to 3.1 were measured.
STEP_COST = 3


@dataclass(frozen=True)
class Course:
    """How far to learn.

    Attributes:
        steps: of the optimizer.
        batch_size: examples per step.
    """

    steps: int
    batch_size: int

    @classmethod
    def of(cls, num_examples: int, set_size: int = 1) -> "Course":
        """What is enough: few examples are seen in small steps, or each would be seen a hundred times.

        Args:
            num_examples: there are to learn from.
            set_size: examples that a loss needs together.
        """
        size = max(set_size, min(_BATCH, max(16, num_examples // 4)))
        return cls(min(_MOST_STEPS, max(_LEAST_STEPS, _EXAMPLES // size)), min(size, num_examples))

    @property
    def num_examples(self) -> int:
        """Seen at most, counted as often as they are."""
        return self.steps * self.batch_size


class NoGradientError(Exception):
    """The loss does not depend on the weights by way of anything that has a gradient."""


@dataclass(frozen=True)
class Groups:
    """Which norm layers are learned, and which of them share a weight: a name of group by name of norm
    layer.
    """

    alphas: Mapping[str, str]
    lambdas: Mapping[str, str]


def learn(
    model: TorchModel,
    examples: Examples,
    indices: Indices,
    loss: Callable[[TorchModel, Sequence[Batch]], Iterator[Tensor]],
    cost: Callable[[], float],
    *,
    start: PatchWeights,
    groups: Groups,
    course: Course,
    batch_size: int = 64,
    checks: int = CHECKS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int], None] = lambda count: None,
) -> PatchWeights:
    """Find weights by gradient descent: Adam on their logits, the model's own parameters held still.

    Every so often the weights are judged on other examples; those that were judged best are kept, ``start``
    itself among them. Where nothing better was found for a while, that is the end.

    Args:
        model: its weights are any of those tried when this returns.
        examples: where the examples are.
        indices: which of them to learn from.
        loss: of the model, as it is, on the examples of a step: parts that add up, each computed when it is
            asked for, so that no more than one is in memory.
        cost: what the model's weights are judged by on other examples; less is better, infinity where the
            outputs are not finite.
        start: where to begin; norm layers that are not learned keep what it says.
        groups: which weights to learn. Where lambdas are, the model has targets.
        course: how far to go. Adam's learning rate falls to a tenth along a cosine.
        batch_size: examples at a time, of those of a step; it changes the result by rounding only.
        checks: how often the weights are judged.
        seed: of the order of the examples.
        stop: asked before each step whether to end.
        on_batch: called with the number of examples of each step.

    Returns:
        The best setting.

    Raises:
        NoGradientError: the loss has none.
        NotEnoughMemoryError: for the gradients of so many examples at a time.
    """
    model.set(start)
    best, lowest = start, cost()
    logits = {
        kind: {group: _logit(values.get(name, 0.0), model.device) for name, group in by_name.items()}
        for kind, by_name, values in (
            ("alpha", groups.alphas, start.alphas),
            ("lambda", groups.lambdas, start.lambdas),
        )
    }
    parameters = [logit for by_group in logits.values() for logit in by_group.values()]
    if not parameters:
        return best
    steps, rate = course.steps, _REACH / course.steps
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 10)
    every, idle = max(1, steps // checks), 0
    with _held_still(model):
        for step, chosen in enumerate(_portions(indices, course, seed), start=1):
            if stop():
                break
            batches = list(examples.batches(batch_size, chosen))
            optimizer.zero_grad()
            try:
                _add_gradients(loss(model, batches), parameters, partial(_set_learned, model, groups, logits))
            except torch.OutOfMemoryError as error:
                raise NotEnoughMemoryError(model.device, batch_size) from error
            optimizer.step()
            on_batch(sum(len(batch.indices) for batch in batches))
            schedule.step()
            if step % every == 0 or step == steps:
                found = _setting(start, groups, logits)
                if any(map(math.isnan, (*found.alphas.values(), *found.lambdas.values()))):
                    break  # the loss was not finite: asked of each step, that would wait for the device
                model.set(found)
                idle += 1
                if (judged := cost()) < lowest:
                    best, lowest, idle = found, judged, 0
                if idle == _PATIENCE:
                    break
    return best


@torch.enable_grad()
def _add_gradients(
    parts: Iterator[Tensor], parameters: Sequence[Tensor], set_learned: Callable[[], None]
) -> None:
    """Add up the gradients of the parts of a loss."""
    while True:
        set_learned()  # anew: going backward takes their graph along
        part = next(parts, None)
        if part is None:
            return
        if not part.requires_grad:
            raise NoGradientError
        torch.autograd.backward(part, inputs=parameters)
        del part  # the next is computed without it


def _logit(weight: float, device: torch.device) -> Tensor:
    weight = min(max(weight, _MARGIN), 1 - _MARGIN)
    return torch.tensor(math.log(weight / (1 - weight)), device=device, requires_grad=True)


def _set_learned(model: TorchModel, groups: Groups, logits: Mapping[str, Mapping[str, Tensor]]) -> None:
    for norm_layer in model.inventory().norm_layers:
        layer = norm_layer.module
        assert isinstance(layer, ExampleWeightedNorm)  # patched when the start was set
        if norm_layer.name in groups.alphas:
            layer.alpha = torch.sigmoid(logits["alpha"][groups.alphas[norm_layer.name]])
        if norm_layer.name in groups.lambdas:
            weight = torch.sigmoid(logits["lambda"][groups.lambdas[norm_layer.name]])
            layer.running = mix(weight, model.target(norm_layer), model.source(norm_layer))


def _setting(start: PatchWeights, groups: Groups, logits: Mapping[str, Mapping[str, Tensor]]) -> PatchWeights:
    def values(kind: str, by_name: Mapping[str, str]) -> dict[str, float]:
        if not by_name:
            return {}
        weights = torch.sigmoid(torch.stack([logits[kind][group] for group in by_name.values()]))
        return dict(zip(by_name, weights.tolist(), strict=True))  # one wait for the device

    alphas, lambdas = values("alpha", groups.alphas), values("lambda", groups.lambdas)
    return PatchWeights({**start.alphas, **alphas}, {**start.lambdas, **lambdas})


def _portions(indices: Indices, course: Course, seed: int) -> Iterator[Indices]:
    """Random portions; where fewer than one are left, all examples are shuffled anew."""
    rng = np.random.default_rng(seed)
    size = min(course.batch_size, len(indices))
    order: Indices = rng.permutation(indices)
    for _ in range(course.steps):
        if len(order) < size:
            order = rng.permutation(indices)
        yield order[:size]
        order = order[size:]


@contextmanager
def _held_still(model: TorchModel) -> Iterator[None]:
    """No gradients for the model's own parameters: they cost time and memory, and nobody asks for them."""
    learned = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
