"""Weights per site by gradient: for torch models, where every weight can be told which way to go."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnpatch.data.examples import Batch, Examples, Indices
from bnpatch.model import TorchModel
from bnpatch.moments import mix
from bnpatch.nn.norm import ExampleWeighedNorm
from bnpatch.setting import Setting

#: A weight nearer to 0 or 1 than this has hardly a gradient on its logit: learning starts no nearer.
_MARGIN = 0.01

#: Defaults of :func:`learn`.
LEARNING_STEPS, LEARNING_BATCH, LEARNING_CHECKS = 100, 128, 10

#: A step costs as much as this many evaluations of its examples: forward, and backward at twice the price.
STEP_COST = 3


class NoGradientError(Exception):
    """The loss does not depend on the weights by way of anything that has a gradient."""


@dataclass(frozen=True)
class Shared:
    """Which sites are learned, and which of them share a weight: a name of group by name of site."""

    alphas: Mapping[str, str]
    lambdas: Mapping[str, str]


def learn(
    model: TorchModel,
    examples: Examples,
    indices: Indices,
    loss: Callable[[TorchModel, Batch], Tensor],
    cost: Callable[[], float],
    *,
    start: Setting,
    shared: Shared,
    steps: int = LEARNING_STEPS,
    batch_size: int = LEARNING_BATCH,
    learning_rate: float = 0.2,
    checks: int = LEARNING_CHECKS,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Setting:
    """Find weights by gradient descent: Adam on their logits, the model's own parameters held still.

    Every so often the weights are judged on other examples; those that were judged best are kept, ``start``
    itself among them.

    Args:
        model: its weights are any of those tried when this returns.
        examples: where the examples are.
        indices: which of them to learn from.
        loss: of the model, as it is, on a batch.
        cost: what the model's weights are judged by on other examples; less is better.
        start: where to begin; sites that are not learned keep what it says.
        shared: which weights to learn. Where lambdas are, the model has targets.
        steps: of the optimizer, with as many examples each as ``batch_size``.
        batch_size: examples per step.
        learning_rate: of Adam at the beginning; it falls to a tenth along a cosine.
        checks: how often the weights are judged.
        seed: of the order of the examples.
        stop: asked before each step whether to end.
        on_batch: called with the number of examples of each step.

    Returns:
        The best setting.

    Raises:
        NoGradientError: the loss has none.
    """
    model.set(start)
    best, lowest = start, cost()
    logits = {
        kind: {group: _logit(values.get(name, 0.0), model.device) for name, group in groups.items()}
        for kind, groups, values in (
            ("alpha", shared.alphas, start.alphas),
            ("lambda", shared.lambdas, start.lambdas),
        )
    }
    parameters = [logit for by_group in logits.values() for logit in by_group.values()]
    if not parameters:
        return best
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, learning_rate / 10)
    every = max(1, steps // checks)
    with _held_still(model):
        for step, chosen in enumerate(_portions(indices, batch_size, steps, seed), start=1):
            if stop():
                break
            for batch in examples.batches(len(chosen), chosen):
                with torch.enable_grad():
                    _set_learned(model, shared, logits)
                    value = loss(model, batch)
                    if not value.requires_grad:
                        raise NoGradientError
                    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                on_batch(len(batch.indices))
            schedule.step()
            if step % every == 0 or step == steps:
                found = _setting(start, shared, logits)
                model.set(found)
                if (judged := cost()) < lowest:
                    best, lowest = found, judged
    return best


def _logit(weight: float, device: torch.device) -> Tensor:
    weight = min(max(weight, _MARGIN), 1 - _MARGIN)
    return torch.tensor(math.log(weight / (1 - weight)), device=device, requires_grad=True)


def _set_learned(model: TorchModel, shared: Shared, logits: Mapping[str, Mapping[str, Tensor]]) -> None:
    for site in model.survey().sites:
        layer = site.module
        assert isinstance(layer, ExampleWeighedNorm)  # patched when the start was set
        if site.name in shared.alphas:
            layer.alpha = torch.sigmoid(logits["alpha"][shared.alphas[site.name]])
        if site.name in shared.lambdas:
            weight = torch.sigmoid(logits["lambda"][shared.lambdas[site.name]])
            layer.running = mix(weight, model.target(site), model.source(site))


def _setting(start: Setting, shared: Shared, logits: Mapping[str, Mapping[str, Tensor]]) -> Setting:
    def values(kind: str, groups: Mapping[str, str]) -> dict[str, float]:
        return {name: torch.sigmoid(logits[kind][group]).item() for name, group in groups.items()}

    alphas, lambdas = values("alpha", shared.alphas), values("lambda", shared.lambdas)
    return Setting({**start.alphas, **alphas}, {**start.lambdas, **lambdas})


def _portions(indices: Indices, size: int, count: int, seed: int) -> Iterator[Indices]:
    """Random portions, every example once before any comes again."""
    rng = np.random.default_rng(seed)
    size = min(size, len(indices))
    order: Indices = rng.permutation(indices)
    for _ in range(count):
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
