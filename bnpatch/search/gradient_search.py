"""Learn one weight per norm layer by gradient descent, for torch models."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.moments import mix
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.dataset import Batch, Examples, Indices, portions
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.norm import ExampleWeightedNorm

#: Learning starts at least this far from 0 and 1, because nearer the gradient of the logit vanishes.
_MARGIN = 0.01

# A learned slope or offset stays between minus and plus this: it is a hyperbolic tangent of its parameter.
_LARGEST = {"slope": 3.0, "var_offset": 8.0}

# Learning ends after this many scores without a gain.
_PATIENCE = 2

#: How often weights are scored on other examples after the trials.
CHECKS = 4

# Cost of learning in passes over the examples.
_PASSES = 10
# The learning rate times the number of steps. Adam can change a logit by about half of this in all.
_REACH = 20.0
# Maximum number of examples in a step of a loss that needs a set of them.
_SET = 100

#: Cost of a step in evaluations of its examples; 2.1 to 3.1 were measured.
STEP_COST = 3


@dataclass(frozen=True)
class Course:
    """Length of the training of weights.

    The number of examples per step hardly matters, because there are few weights and their gradients agree.
    The start matters more. So learning takes a few steps from several starts, and goes on from the best.

    Attributes:
        batch_size: examples per step.
        trial_steps: optimizer steps from each start.
        steps: optimizer steps from the best start, those of its trial included.
        rate: Adam's learning rate at the beginning; it falls to a tenth along a cosine.
    """

    batch_size: int = 64
    trial_steps: int = 10
    steps: int = 64
    rate: float = 0.35

    @classmethod
    def of(cls, num_examples: int, starts: int, set_size: int = 1) -> "Course":
        """Choose a length that costs about ten passes over the examples, and at most 100 steps.

        Args:
            num_examples: number of examples to learn from.
            starts: number of starts.
            set_size: number of examples that the loss needs together; then twice the passes are allowed.
        """
        size = max(min(set_size, _SET), min(cls.batch_size, max(16, num_examples // 12)))
        size = min(size, num_examples)
        passes = _PASSES if set_size == 1 else 2 * _PASSES
        total = min(100, passes * num_examples // (STEP_COST * size))
        trial = max(2, total // (2 * starts + 2)) if starts > 1 else 0
        steps = max(8, total - trial * (starts - 1))
        return cls(size, trial, steps, min(1.0, max(0.25, _REACH / steps)))

    def num_examples(self, starts: int) -> int:
        """Return the number of examples in all steps, with so many starts."""
        return (self.trial_steps * (starts - 1) + self.steps) * self.batch_size


class NoGradientError(Exception):
    """The loss has no gradient with respect to the weights."""


#: By kind of weight, the norm layers where it is learned: names of groups, which share it, by name of layer.
Groups = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Start:
    """Weights to start from, and which of them are learned."""

    weights: PatchWeights
    groups: Groups


@dataclass(frozen=True)
class Problem:
    """What weights are learned for.

    Attributes:
        model: the model; its weights are any of those tried when learning ends.
        examples: the examples.
        indices: which examples to learn from.
        loss: the loss of the model on the examples of a step, in parts that add up. Each part is computed
            when it is asked for, so that only one is in memory.
        base: the state that the weights apply to. To learn lambdas, it must have re-estimated statistics.
        batch_size: examples per step.
        part_size: examples per batch of a step; it changes the result by rounding only.
        seed: seed of the order of the examples.
        stop: called before each step; learning ends if it returns true.
        on_batch: called with the number of examples of each step.
    """

    model: TorchModel
    examples: Examples
    indices: Indices
    loss: Callable[[TorchModel, Sequence[Batch]], Iterator[Tensor]]
    base: PatchState
    batch_size: int = 64
    part_size: int = 64
    seed: int = 0
    stop: Callable[[], bool] = lambda: False
    on_batch: Callable[[int], None] = lambda count: None


class Learner:
    """Learns weights with Adam on their logits, from one start, a few steps at each call.

    Attributes:
        steps: number of steps taken so far.
    """

    def __init__(self, problem: Problem, start: Start, steps: int, rate: float) -> None:
        """Prepare learning.

        Args:
            problem: what to learn for.
            start: the weights to start from, and which to learn; norm layers that are not learned keep
                theirs.
            steps: number of steps over which Adam's learning rate falls to a tenth, along a cosine.
            rate: the learning rate at the beginning.
        """
        self._problem, self._start, self._groups = problem, start.weights, start.groups
        self._by_kind = {
            kind: _parameters(kind, groups, start.weights, problem.model.device)
            for kind, groups in start.groups.items()
        }
        with torch.no_grad():
            for group, parameter in self._by_kind.get("var_offset", {}).items():
                parameter += self._by_kind["alpha"][group]
        self._parameters = [parameter for kind in self._by_kind.values() for parameter in kind.values()]
        self._portions = portions(problem.indices, problem.batch_size, problem.seed)
        self.steps = 0
        if self._parameters:
            self._optimizer = torch.optim.Adam(self._parameters, lr=rate)
            self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps, rate / 10)

    def advance(self, steps: int) -> PatchWeights | None:
        """Take some steps.

        Returns:
            The weights now; None where the loss was not finite.

        Raises:
            NoGradientError: the loss has no gradient.
            NotEnoughMemoryError: the gradients of one batch don't fit into memory.
        """
        problem = self._problem
        if not self._parameters:
            return self._start
        problem.model.set_state(problem.base.with_weights(self.weights()))
        with _frozen_parameters(problem.model):
            for _ in range(steps):
                if problem.stop():
                    break
                self._step()
        found = self.weights()
        is_finite = not any(math.isnan(value) for _, values in found.kinds() for value in values.values())
        return found if is_finite else None

    def weights(self) -> PatchWeights:
        """Return the present weights."""
        learned = {
            f"{kind}s": _numbers(kind, group_of, self._of(kind)) for kind, group_of in self._groups.items()
        }
        return self._start.updated(PatchWeights(**learned))

    def _of(self, kind: str) -> Mapping[str, Tensor]:
        """Return the parameters of one kind by name of group.

        An offset is learned as the logit of the variance's weight, which alpha must be learned with. That is
        better than learning the difference, whose gradient is only a part of alpha's.
        """
        parameters = self._by_kind[kind]
        if kind != "var_offset":
            return parameters
        return {group: logit - self._by_kind["alpha"][group] for group, logit in parameters.items()}

    def _step(self) -> None:
        problem = self._problem
        batches = list(problem.examples.batches(problem.part_size, next(self._portions)))
        self._optimizer.zero_grad()
        try:
            _add_gradients(problem.loss(problem.model, batches), self._parameters, self._set_learned)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(problem.model.device, problem.part_size) from error
        self._optimizer.step()
        self._schedule.step()
        self.steps += 1
        problem.on_batch(sum(len(batch.indices) for batch in batches))

    def _set_learned(self) -> None:
        """Let the norm layers compute with the parameters, so that gradients flow to them."""
        model, by_kind = self._problem.model, {kind: self._of(kind) for kind in self._groups}
        for norm_layer in model.inventory().norm_layers:
            name, layer = norm_layer.name, norm_layer.module
            assert isinstance(layer, ExampleWeightedNorm)  # patched when the weights were set
            learned = {
                kind: _as_weight(kind, by_kind[kind][group_of[name]])
                for kind, group_of in self._groups.items()
                if name in group_of
            }
            weight = learned.pop("lambda", None)
            layer.set_weights(**learned)
            if weight is not None:
                layer.running = mix(weight, model.re_estimated(norm_layer), model.source(norm_layer))


@dataclass(frozen=True)
class Learned:
    """What learning found: the best weights, and the start that was best after a few steps."""

    weights: PatchWeights
    start: Start


def learn(
    problem: Problem, starts: Sequence[Start], cost: Callable[[PatchWeights], float], course: Course
) -> Learned | None:
    """Find weights by gradient descent from several starts; the model's own parameters are frozen.

    A few steps are taken from each start. The best, by other examples, goes on. At intervals its weights are
    scored on these examples, and the best of all weights that were scored are the result.

    Args:
        problem: what to learn for.
        starts: one start or more.
        cost: the cost of weights on other examples; lower is better, inf if outputs are not finite.
        course: length of the training.

    Returns:
        What was found; None where no weights had a finite cost.

    Raises:
        NoGradientError: the loss has no gradient.
        NotEnoughMemoryError: the gradients of one batch don't fit into memory.
    """
    learners = [Learner(problem, start, course.steps, course.rate) for start in starts]
    trial = course.trial_steps if len(starts) > 1 else 0
    reached = [_cost_after(learner, trial, cost) for learner in learners]
    costs = [total for total, _ in reached]
    best = int(np.argmin(costs))
    (lowest, weights), learner = reached[best], learners[best]
    if weights is None or not lowest < math.inf:
        return None
    every, idle = max(1, (course.steps - trial) // CHECKS), 0
    while idle < _PATIENCE and learner.steps < course.steps and not problem.stop():
        total, found = _cost_after(learner, min(every, course.steps - learner.steps), cost)
        if found is None:
            break
        idle += 1
        if total < lowest:
            lowest, weights, idle = total, found, 0
    return Learned(weights, starts[best])


def _cost_after(
    learner: Learner, steps: int, cost: Callable[[PatchWeights], float]
) -> tuple[float, PatchWeights | None]:
    """Take some steps, and score the weights."""
    found = learner.advance(steps)
    return (math.inf, None) if found is None else (cost(found), found)


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


def _parameters(
    kind: str, groups: Mapping[str, str], start: PatchWeights, device: torch.device
) -> dict[str, Tensor]:
    """Make one parameter per group, which starts at the weight of the group's last norm layer."""
    values = {group: _as_parameter(kind, start.of(kind).get(name, 0.0)) for name, group in groups.items()}
    return {group: torch.tensor(v, device=device, requires_grad=True) for group, v in values.items()}


def _numbers(kind: str, groups: Mapping[str, str], parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the weight of each norm layer, with one wait for the device."""
    if not groups:
        return {}
    stacked = torch.stack([parameters[group].detach() for group in groups.values()])
    return dict(zip(groups, _as_weight(kind, stacked).tolist(), strict=True))


def _as_weight(kind: str, parameter: Tensor) -> Tensor:
    """Return the weight that a parameter stands for."""
    if kind not in _LARGEST:
        return torch.sigmoid(parameter)
    return _LARGEST[kind] * torch.tanh(parameter / _LARGEST[kind])


def _as_parameter(kind: str, weight: float) -> float:
    """Return the parameter that stands for a weight."""
    if kind in _LARGEST:
        return _LARGEST[kind] * math.atanh(max(-0.99, min(0.99, weight / _LARGEST[kind])))
    weight = min(max(weight, _MARGIN), 1 - _MARGIN)
    return math.log(weight / (1 - weight))


@contextmanager
def _frozen_parameters(model: TorchModel) -> Iterator[None]:
    """Freeze the model's own parameters, whose gradients would cost time and memory."""
    learned = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
