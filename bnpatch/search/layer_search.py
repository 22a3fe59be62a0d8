"""Find weights per norm layer or stage, by gradient where the model has one, by coordinates where not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError
from bnpatch.core.moments import Moments, mix_example
from bnpatch.core.patch import BESIDE_ALPHA, PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Values
from bnpatch.search.config import Plan
from bnpatch.search.coordinate_search import Coordinate, coordinate_search, expected_cost
from bnpatch.search.gradient_search import (
    CHECKS,
    STEP_COST,
    Course,
    Groups,
    Learned,
    NoGradientError,
    Problem,
    Start,
    learn,
)
from bnpatch.search.keep import KeepSet, Loss
from bnpatch.search.objective import groups_of_scores, in_sets
from bnpatch.search.progress import Budget
from bnpatch.search.score_cache import ScoreCache
from bnpatch.search.selection import Selection

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel

#: Maximum numbers of examples. Learning by gradient needs no more than the first. Coordinate search scores
#: the second, and ranks the values to try by the third, a subset of them.
_LEARNED_EXAMPLES, _COORDINATE_EXAMPLES, _PREVIEW_EXAMPLES = 30_000, 500, 100

# Number of examples whose weights are averaged.
_OBSERVED_EXAMPLES = 64

# Learning takes small images in larger batches: up to as many input values as eight large images have.
_LEARNED_VALUES = 8 * 3 * 224 * 224

# Learning ends at a local minimum near its start, so it tries several starts. Each of these is the alpha of
# the first and of the last norm layer; between them, alpha changes linearly with depth. _RAMP undoes shifts
# that differ from image to image. _SMALL suits a network in which many norm layers need no weight. With a
# lambda of 1, it also suits a shift that all images share, because re-estimated statistics alone undo that.
_RAMP, _SMALL = (0.8, 0.05), (0.01, 0.01)

# Maximum number of starts.
_MOST_STARTS = 4


class LayerSearch:
    """Finds one weight per norm layer or stage, from examples that don't select between candidates."""

    def __init__(
        self,
        cache: ScoreCache,
        selection: Selection,
        indices: Indices,
        plan: Plan,
        budget: Budget,
        keep: KeepSet | None = None,
    ) -> None:
        """Prepare a search.

        Args:
            cache: scores the model on the examples by the objective, which also gives the loss to learn by;
                weights apply to its base state. A search leaves the model with any of the weights tried.
            selection: other examples, by which learning stops and the best start is kept.
            indices: which examples to find the weights from.
            plan: settings of the search.
            budget: time and examples.
            keep: images on which the weights must do no harm.
        """
        self._model, self._examples, self._objective = cache.model, cache.examples, cache.objective
        self._cache, self._selection, self._indices = cache, selection, indices
        self._plan, self._budget = plan, budget
        self._keep, self._step_cost = keep, STEP_COST * (1 if keep is None else 2)
        self._baseline_alphas = cache.model.baseline_alphas()

    @cached_property
    def _with_gradients(self) -> "TorchModel | None":
        one = next(self._examples.batches(1, self._indices))
        if not self._objective.is_differentiable(self._model, one):
            return None
        batch = next(self._examples.batches(_OBSERVED_EXAMPLES, self._indices))
        return self._model.with_gradients(batch.x)

    @property
    def has_gradients(self) -> bool:
        """Whether weights can be learned by gradient, with the model or with a copy of it."""
        return self._with_gradients is not None

    def expected(self) -> float:
        """Estimate how many examples :meth:`find` will score."""
        if not self.has_gradients:
            return self._expected_of_coordinates()
        starts = 4 if self._plan.recalibrate else 3
        course = Course.of(len(self._indices), starts, self._objective.set_size)
        scored = 2 * starts + 1 + CHECKS  # each start before and after its trial, and the baseline
        checked = self._selection.num_checked + (0 if self._keep is None else self._keep.num_checked)
        return self._step_cost * course.num_examples(starts) + scored * checked

    def _expected_of_coordinates(self) -> float:
        """Estimate the cost of coordinate searches for alphas, for these and lambdas, and for slopes."""
        num, plan = len(self._baseline_alphas), self._plan
        searches = [num, 2 * num if plan.recalibrate else 0, num // 2 if plan.slopes else 0]
        scored = min(_COORDINATE_EXAMPLES, len(self._indices))
        previewed = min(scored, max(_PREVIEW_EXAMPLES, self._objective.set_size))
        return float(
            sum(expected_cost(coordinates, scored, previewed) for coordinates in searches if coordinates)
        )

    def find(self, found: Mapping[str, PatchWeights], per: str) -> dict[str, PatchWeights]:
        """Find weights, with and without slopes.

        Args:
            found: weights by name of the candidates that were found before, the baseline first.
            per: what has a weight of its own: each "layer", or each "stage".

        Returns:
            Weights by name of candidate, fewer degrees of freedom first.
        """
        groups = self._groups(per)
        try:
            return self._by_gradient(found, groups, per)
        except NoGradientError:  # the model is an ONNX file without a copy in torch, or the metric has none
            return self._by_coordinates(found, groups, per)

    def _groups(self, per: str) -> dict[str, str]:
        """Name the group of each norm layer; layers where an example has a single value are left out."""
        batch = next(self._examples.batches(1, self._indices))
        shapes = self._model.norm_shapes(batch.x)
        everywhere = self._cache.base.include_1x1
        weighted = [
            n for n in self._baseline_alphas if everywhere or n not in shapes or math.prod(shapes[n]) > 1
        ]
        if per == "layer":
            return {name: name for name in weighted}
        return {name: "x".join(map(str, shapes.get(name, ("unknown",)))) for name in weighted}

    def _starts(self, found: Mapping[str, PatchWeights], groups: Mapping[str, str]) -> list[Start]:
        """Return the weights where learning starts, without slopes.

        A step without labels needs a large set of examples. If there are few such sets, each start costs
        several passes. So the starts without lambdas are left out if lambdas are learned.
        """
        baseline, re_estimated = found["baseline"], self._cache.base.re_estimated
        alphas_alone: Groups = {"alpha": groups}
        both: Groups = {"alpha": groups, "lambda": {name: groups.get(name, name) for name in re_estimated}}

        def start(ends: tuple[float, float], weight: float | None) -> Start:
            alphas = {**baseline.alphas, **self._falling(groups, ends)}
            lambdas = {**baseline.lambdas, **dict.fromkeys(re_estimated, weight or 0.0)}
            learned = alphas_alone if weight is None else both
            return Start(replace(baseline, alphas=alphas, lambdas=lambdas), learned)

        best = found.get("lambda, alpha", found["alpha"])
        starts = [Start(best, both if any(best.lambdas.values()) else alphas_alone)]
        learns_lambdas = self._plan.recalibrate and re_estimated
        if not (learns_lambdas and self._objective.set_size > 1 and self._cache.has_few_blocks):
            starts += [start(_SMALL, None), start(_RAMP, None)]
        if learns_lambdas:
            starts += [start(_RAMP, 0.5), start(_SMALL, 1.0)]
        return [s for n, s in enumerate(starts) if s not in starts[:n] and s.weights != baseline]

    def _promising(self, starts: Sequence[Start], baseline: PatchWeights) -> Sequence[Start]:
        """Keep the best few starts, by the selection examples.

        A start that is worse than the baseline is left out, unless it is the best. In networks in which most
        norm layers need no weight, such as those for ImageNet, a few steps don't make such a start better
        than the baseline. If a start is much worse, the first block of examples already shows it. Without
        labels all starts stay, because the objective may rate the baseline too high.
        """
        if self._objective.set_size > 1:
            return starts
        starts = [s for s in starts if not self._selection.at_once_worse(s.weights, baseline)] or starts
        cost = partial(self._cost, "choosing where to start")
        costs = [cost(start.weights) for start in starts]
        most = max(cost(baseline), min(costs, default=math.inf))
        best = np.argsort(costs, kind="stable")[:_MOST_STARTS]
        return [starts[number] for number in best if costs[number] <= most]

    def _falling(self, groups: Mapping[str, str], ends: tuple[float, float]) -> dict[str, float]:
        """Return alphas that change linearly with depth; all layers of a group get that of its first layer.

        Norm layers whose baseline alpha is not 0 are left out, because they use the example's statistics
        already.
        """
        ramp = dict(
            zip(self._baseline_alphas, np.linspace(*ends, len(self._baseline_alphas)).tolist(), strict=True)
        )
        first: dict[str, str] = {}
        for name, group in groups.items():
            first.setdefault(group, name)
        return {n: ramp[first[group]] for n, group in groups.items() if self._baseline_alphas[n] == 0}

    def _by_gradient(
        self, found: Mapping[str, PatchWeights], groups: Mapping[str, str], per: str
    ) -> dict[str, PatchWeights]:
        """Learn weights from several starts; without slopes, a norm layer gets its mean weight.

        With slopes, the variance's weight is learned apart from the mean's.
        """
        if self._with_gradients is None:
            raise NoGradientError
        starts = self._promising(self._starts(found, groups), found["baseline"])
        if self._plan.slopes:
            beside = {name: group for name, group in groups.items() if self._baseline_alphas[name] == 0}
            starts = [replace(s, groups={**s.groups, **dict.fromkeys(BESIDE_ALPHA, beside)}) for s in starts]
        learned = self._learn(self._with_gradients, starts)
        if learned is None:
            return {}
        constant, varying = _names(per, "lambda" in learned.start.groups)
        if not self._plan.slopes:
            return {constant: learned.weights}
        return {constant: self._without_slopes(learned.weights, groups), varying: learned.weights}

    def _without_slopes(self, weights: PatchWeights, groups: Mapping[str, str]) -> PatchWeights:
        """Give each norm layer the mean of the weights that some examples have there; a group shares one.

        Offsets stay.
        """
        self._model.set_state(self._cache.base.with_weights(weights))
        batch = next(self._examples.batches(_OBSERVED_EXAMPLES, self._indices[:_OBSERVED_EXAMPLES]))
        with self._model.evaluating():
            _, seen = self._model.observe(batch.x)
        self._budget.spend("learning a weight per layer", len(batch.indices))
        facts, running = self._model.facts(), self._model.statistics_in_use()
        used = dict(weights.alphas)
        for name, slope in weights.slopes.items():
            if slope and name in seen:
                here = running.get(name, facts[name].source)
                parts = Moments(*(torch.as_tensor(p, dtype=torch.float32) for p in (here.mean, here.var)))
                weight = weights.example_weight(name)
                used[name] = float(mix_example(weight, seen[name], parts, facts[name].eps).weight.mean())
        shared: dict[str, list[float]] = {}
        for name, group in groups.items():
            shared.setdefault(group, []).append(used[name])
        alphas = {name: float(np.mean(shared[group])) for name, group in groups.items()}
        return replace(
            weights, alphas={**weights.alphas, **alphas}, slopes=dict.fromkeys(weights.slopes, 0.0)
        )

    def _learn(self, model: "TorchModel", starts: Sequence[Start]) -> Learned | None:
        label, base = "learning a weight per layer", self._cache.base
        if model is not self._model:
            base = replace(base, running={})  # the copy has them for its own
        indices = self._indices[:_LEARNED_EXAMPLES]
        example = next(self._examples.batches(1, indices)).x
        course = Course.of(len(indices), len(starts), self._objective.set_size)
        most = max(self._plan.batch_size, _LEARNED_VALUES // example.numel())
        part_size = model.efficient_batch(min(course.batch_size, most), example)
        while True:
            loss: Loss = self._objective.loss
            if self._keep is not None:
                loss = self._keep.with_loss(loss, course.batch_size, part_size)
            problem = Problem(
                model,
                self._examples,
                indices,
                loss,
                base,
                course.batch_size,
                part_size,
                self._plan.seed,
                self._budget.is_over,
                lambda count: self._budget.spend(label, count, self._step_cost),
            )
            try:
                return learn(problem, starts, partial(self._cost, label), course)
            except NotEnoughMemoryError as error:  # gradients need more memory than scoring does
                if part_size == 1:
                    raise BnpatchError(
                        f"{model.device} has not enough memory for the gradients of one example",
                        "choose --granularity global, which needs none",
                    ) from error
            part_size //= 2

    def _cost(self, label: str, weights: PatchWeights) -> float:
        """Return the cost of weights on the selection examples and on the images to keep; lower is better."""
        cost = self._selection.cost(weights, label)
        return cost if self._keep is None else cost + self._keep.cost(self._cache.base.with_weights(weights))

    def _by_coordinates(
        self, found: Mapping[str, PatchWeights], groups: Mapping[str, str], per: str
    ) -> dict[str, PatchWeights]:
        """Change one weight at a time: alphas, or these and lambdas; then the slopes of the better."""
        constant, varying = _names(per, False)
        candidates = {constant: self._coordinates(found["alpha"], _coordinates("alpha", groups))}
        best = constant
        if self._plan.recalibrate and "lambda, alpha" in found:
            lambdas = {name: groups.get(name, name) for name in self._cache.base.re_estimated}
            both = [*_coordinates("alpha", groups), *_coordinates("lambda", lambdas)]
            constant, varying_too = _names(per, True)
            candidates[constant] = self._coordinates(found["lambda, alpha"], both)
            costs = [self._cost("choosing", weights) for weights in candidates.values()]
            if costs[1] < costs[0]:
                best, varying = constant, varying_too
        if self._plan.slopes:
            start = candidates[best]
            moved = {
                n: g for n, g in groups.items() if 0 < start.alphas[n] < 1 and self._baseline_alphas[n] == 0
            }
            candidates[varying] = self._coordinates(start, _coordinates("slope", moved))
        return candidates

    def _coordinates(self, start: PatchWeights, coordinates: Sequence[Coordinate]) -> PatchWeights:
        portion = np.random.default_rng(self._plan.seed).permutation(self._indices)[:_COORDINATE_EXAMPLES]

        def scores(indices: Indices, weights: PatchWeights) -> Values | None:
            return if_finite(partial(self._scores, weights, indices))

        return coordinate_search(
            partial(scores, portion),
            start,
            coordinates,
            preview=partial(scores, portion[: max(_PREVIEW_EXAMPLES, self._objective.set_size)]),
            stop=self._budget.is_over,
            groups=groups_of_scores(self._objective, self._examples, portion),
        )

    def _scores(self, weights: PatchWeights, indices: Indices) -> Values:
        """Return scores that compare small steps, one per example or per set of them; higher is better."""
        metric, label = self._selection.step_metric, "changing one weight at a time"
        sets = in_sets(indices, self._objective.set_size)
        return metric.sign * np.concatenate(
            [self._cache.of(part, weights, label)[metric.name] for part in sets]
        )


def _names(per: str, lambdas: bool) -> tuple[str, str]:
    """Name the candidates without and with slopes."""
    if lambdas:
        return f"lambda and alpha per {per}", f"lambda, alpha and slope per {per}"
    return f"alpha per {per}", f"alpha and slope per {per}"


def _coordinates(kind: str, groups: Mapping[str, str]) -> list[Coordinate]:
    """Make one coordinate per group of norm layers."""
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    return [Coordinate(kind, tuple(names)) for names in members.values()]
