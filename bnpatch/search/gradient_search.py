"""Learn one weight per norm layer by gradient descent, for torch models."""

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
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.norm import ExampleWeightedNorm

#: Learning starts at least this far from 0 and 1, because nearer the gradient of the logit vanishes.
_MARGIN = 0.01

#: How often the weights are scored on other examples, and after how many scores without a gain learning ends.
CHECKS, _PATIENCE = 10, 3

# Maximum number of examples per step, unless the loss needs a larger set; number of examples in all steps
# together, roughly; maximum and minimum number of steps.
_BATCH, _EXAMPLES, _MOST_STEPS, _LEAST_STEPS = 128, 12_800, 100, 40
# The learning rate times the number of steps. A logit can change by about half of this in all.
_REACH = 20.0

#: Cost of a step in evaluations of its examples; 2.1 to 3.1 were measured.
STEP_COST = 3


@dataclass(frozen=True)
class Course:
    """Length of the training of weights.

    Attributes:
        steps: number of optimizer steps.
        batch_size: examples per step.
    """

    steps: int
    batch_size: int

    @classmethod
    def of(cls, num_examples: int, set_size: int = 1) -> "Course":
        """Choose a sufficient length; steps are small for few examples, to see each less often.

        Args:
            num_examples: number of examples to learn from.
            set_size: number of examples that the loss needs together.
        """
        size = max(set_size, min(_BATCH, max(16, num_examples // 4)))
        return cls(min(_MOST_STEPS, max(_LEAST_STEPS, _EXAMPLES // size)), min(size, num_examples))

    @property
    def num_examples(self) -> int:
        """Maximum number of examples that are seen, repetitions included."""
        return self.steps * self.batch_size


class NoGradientError(Exception):
    """The loss has no gradient with respect to the weights."""


@dataclass(frozen=True)
class Groups:
    """The norm layers whose weights are learned: names of groups, which share a weight, by name of layer."""

    alphas: Mapping[str, str]
    lambdas: Mapping[str, str]


def learn(
    model: TorchModel,
    examples: Examples,
    indices: Indices,
    loss: Callable[[TorchModel, Sequence[Batch]], Iterator[Tensor]],
    cost: Callable[[PatchWeights], float],
    *,
    base: PatchState,
    start: PatchWeights,
    groups: Groups,
    course: Course,
    batch_size: int = 64,
    checks: int = CHECKS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int], None] = lambda count: None,
) -> PatchWeights:
    """Find weights by gradient descent: Adam on their logits, with the model's own parameters frozen.

    At intervals the weights are scored on other examples. The best of these weights, or ``start`` if none is
    better, are the result. Learning ends early when nothing better was found for a while.

    Args:
        model: the model; its weights are any of those tried when this returns.
        examples: the examples.
        indices: which examples to learn from.
        loss: the loss of the model on the examples of a step, in parts that add up. Each part is computed
            when it is asked for, so that only one is in memory.
        cost: the cost of weights on other examples; lower is better, inf if outputs are not finite.
        base: the state that the weights apply to.
        start: the weights to start from; norm layers that are not learned keep them.
        groups: which weights to learn. To learn lambdas, ``base`` must have re-estimated statistics.
        course: length of the training. Adam's learning rate falls to a tenth along a cosine.
        batch_size: examples per batch of a step; it changes the result by rounding only.
        checks: how often the weights are scored.
        seed: seed of the order of the examples.
        stop: called before each step; learning ends if it returns true.
        on_batch: called with the number of examples of each step.

    Returns:
        The best weights.

    Raises:
        NoGradientError: the loss has no gradient.
        NotEnoughMemoryError: the gradients of one batch don't fit into memory.
    """
    best, lowest = start, cost(start)
    model.set_state(base.with_weights(start))
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
                    break  # the loss was not finite; a check at each step would wait for the device
                idle += 1
                if (judged := cost(found)) < lowest:
                    best, lowest, idle = found, judged, 0
                if idle == _PATIENCE:
                    break
                model.set_state(base.with_weights(found))
    return best


@torch.enable_grad()
def _add_gradients(
    parts: Iterator[Tensor], parameters: Sequence[Tensor], set_learned: Callable[[], None]
) -> None:
    """Add up the gradients of the parts of a loss."""
    while True:
        set_learned()  # again for each part, because backward frees their graph
        part = next(parts, None)
        if part is None:
            return
        if not part.requires_grad:
            raise NoGradientError
        torch.autograd.backward(part, inputs=parameters)
        del part  # free its memory before the next part is computed


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
    """Random batches of examples; where too few are left for one, all examples are shuffled again."""
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
    """Freeze the model's own parameters, whose gradients would cost time and memory."""
    learned = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
