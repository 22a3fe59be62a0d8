"""Weights per norm layer or stage: by gradient where the model has one, by coordinates where not."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import Metric, Values
from bnpatch.models.base import Model
from bnpatch.search.config import Plan
from bnpatch.search.coordinate_search import Coordinate, coordinate_search
from bnpatch.search.gradient_search import CHECKS, STEP_COST, Course, Groups, NoGradientError, learn
from bnpatch.search.objective import Objective, in_sets
from bnpatch.search.progress import Budget
from bnpatch.search.score_cache import ScoreCache
from bnpatch.search.selection import Selection

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel

#: Maximum numbers of examples. Learning by gradient needs no more than the first. Coordinate search scores
#: the second, and ranks the values to try by the third, a subset of them.
_LEARNED_EXAMPLES, _COORDINATE_EXAMPLES, _PREVIEW_EXAMPLES = 30_000, 500, 100

# Learning takes small images in larger batches: up to as many input values as eight large images have.
_LEARNED_VALUES = 8 * 3 * 224 * 224

# A label-free objective has several local minima, and a global search with one weight for all norm layers may
# end near one that is not the best. So learning alpha and lambda per layer also starts from these alphas, at
# the first norm layer and the last.
_OTHER_STARTS = ((0.05, 0.05), (0.8, 0.05))


class LayerSearch:
    """Finds one weight per norm layer or stage, from examples that don't select between candidates.

    Attributes:
        interrupted: whether the user interrupted while a further start was tried; the result is the best of
            those before.
    """

    def __init__(
        self,
        model: Model[Any],
        examples: Examples,
        indices: Indices,
        objective: Objective,
        cache: ScoreCache,
        selection: Selection,
        plan: Plan,
        budget: Budget,
    ) -> None:
        """Prepare a search.

        Args:
            model: the model; its weights are any of those tried when a search returns.
            examples: the examples.
            indices: which examples to find the weights from.
            objective: scores examples, and gives the loss to learn by.
            cache: scores of the examples; weights apply to its base state.
            selection: other examples, by which learning stops and the best start is kept.
            plan: settings of the search.
            budget: time and examples.
        """
        self._model, self._examples, self._indices, self._objective = model, examples, indices, objective
        self._cache, self._selection, self._plan, self._budget = cache, selection, plan, budget
        self._identities = model.identities()
        self.interrupted = False

    def expected(self, searches: int) -> float:
        """Estimate how many examples this number of searches will score."""
        if not self._model.has_gradients or not searches:
            return 0.0
        starts = searches + (len(_OTHER_STARTS) if searches > 1 and self._objective.set_size > 1 else 0)
        course = Course.of(len(self._indices), self._objective.set_size)
        return starts * (course.num_examples + CHECKS * self._selection.num_examples)

    def find(self, start: PatchWeights, per: str, lambdas: bool) -> PatchWeights:
        """Find weights.

        Args:
            start: the weights to start from; norm layers that get no weight keep them.
            per: what has a weight of its own: each "layer", or each "stage".
            lambdas: also find lambdas; the base state must have re-estimated statistics.
        """
        by_name = self._groups(per)
        movable = self._cache.base.target if lambdas else {}
        groups = Groups(by_name, {name: by_name.get(name, name) for name in movable})
        try:
            return self._from_places(self._by_gradient, start, groups)
        except NoGradientError:
            return self._from_places(self._by_coordinates, start, groups)

    def _groups(self, per: str) -> dict[str, str]:
        """Name the group of each norm layer; layers where an example has a single value are left out."""
        batch = next(self._examples.batches(1, self._indices))
        shapes = self._model.norm_shapes(batch.x)
        everywhere = self._cache.base.include_1x1
        weighted = [n for n in self._identities if everywhere or n not in shapes or math.prod(shapes[n]) > 1]
        if per == "layer":
            return {name: name for name in weighted}
        return {name: "x".join(map(str, shapes.get(name, ("unknown",)))) for name in weighted}

    def _from_places(
        self, find: Callable[[PatchWeights, Groups], PatchWeights], start: PatchWeights, groups: Groups
    ) -> PatchWeights:
        """Find weights from ``start``; for alpha and lambda without labels, the best of several starts."""
        found = find(start, groups)
        if self._objective.set_size == 1 or not groups.lambdas:
            return found
        lowest, tried = self._selection.cost(found, "choosing"), [start]
        try:
            for weights in _OTHER_STARTS:
                place = self._ramp(start, groups, weights)
                if place in tried or self._budget.is_over():
                    continue
                tried.append(place)
                other = find(place, groups)
                if (cost := self._selection.cost(other, "choosing")) < lowest:
                    found, lowest = other, cost
        except KeyboardInterrupt:
            self.interrupted = True
        return found

    def _ramp(self, start: PatchWeights, groups: Groups, ends: tuple[float, float]) -> PatchWeights:
        """Start with alphas that change linearly with depth between two weights, and with lambdas of 0.5.

        Norm layers whose identity is not alpha = 0 keep their alpha: they use the example's statistics
        already.
        """
        ramp = dict(zip(self._identities, np.linspace(*ends, len(self._identities)).tolist(), strict=True))
        first: dict[str, str] = {}  # the first norm layer of each group
        for name, group in groups.alphas.items():
            first.setdefault(group, name)
        alphas = {n: ramp[first[group]] for n, group in groups.alphas.items() if self._identities[n] == 0}
        return PatchWeights(
            {**start.alphas, **alphas}, {**start.lambdas, **dict.fromkeys(groups.lambdas, 0.5)}
        )

    def _by_gradient(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        if not self._model.has_gradients:
            raise NoGradientError
        label = "learning a weight per layer"
        indices = self._indices[:_LEARNED_EXAMPLES]
        values = next(self._examples.batches(1, indices)).x.numel()
        course = Course.of(len(indices), self._objective.set_size)
        batch_size = min(course.batch_size, max(self._plan.batch_size, _LEARNED_VALUES // values))
        while True:
            try:
                return learn(
                    cast("TorchModel", self._model),
                    self._examples,
                    indices,
                    self._objective.loss,
                    lambda weights: self._selection.cost(weights, label),
                    base=self._cache.base,
                    start=start,
                    groups=groups,
                    course=course,
                    batch_size=batch_size,
                    seed=self._plan.seed,
                    stop=self._budget.is_over,
                    on_batch=lambda count: self._budget.spend(label, count, STEP_COST),
                )
            except NotEnoughMemoryError:  # gradients need more memory than scoring does
                if batch_size == 1:
                    raise
            batch_size //= 2

    def _by_coordinates(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        portion = np.random.default_rng(self._plan.seed).permutation(self._indices)[:_COORDINATE_EXAMPLES]
        coordinates = []
        for kind, by_name in (("alpha", groups.alphas), ("lambda", groups.lambdas)):
            members: dict[str, list[str]] = {}
            for name, group in by_name.items():
                members.setdefault(group, []).append(name)
            coordinates += [Coordinate(kind, tuple(names)) for names in members.values()]
        guide = self._selection.guide

        def scores(indices: Indices, weights: PatchWeights) -> Values | None:
            return if_finite(partial(self._scores, weights, indices, guide))

        return coordinate_search(
            partial(scores, portion),
            start,
            coordinates,
            higher_is_better=guide.higher_is_better,
            preview=partial(scores, portion[: max(_PREVIEW_EXAMPLES, self._objective.set_size)]),
            stop=self._budget.is_over,
        )

    def _scores(self, weights: PatchWeights, indices: Indices, metric: Metric) -> Values:
        """Scores by a metric, one per example or one per set of examples."""
        sets = in_sets(indices, self._objective.set_size)
        return np.concatenate(
            [self._cache.of(part, weights, "changing one weight at a time")[metric.name] for part in sets]
        )
