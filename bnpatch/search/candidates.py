"""The candidates of a search, from one weight for all norm layers to one per layer, and which one is kept."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import METRICS, Metric, Values
from bnpatch.models.base import Model
from bnpatch.models.running_stats import target_moments
from bnpatch.search.comparison import GlobalSearchConfig
from bnpatch.search.config import GLOBAL_CANDIDATES, Candidate, Plan, Trial, kept
from bnpatch.search.coordinate_search import Coordinate, coordinate_search
from bnpatch.search.global_search import GlobalSearchResult, GlobalTrial, global_search
from bnpatch.search.gradient_search import CHECKS, STEP_COST, Course, Groups, NoGradientError, learn
from bnpatch.search.objective import Judge, in_sets
from bnpatch.search.score_cache import ScoreCache, blocks_of
from bnpatch.search.selection import Selection
from bnpatch.search.studies import Study, open_study

if TYPE_CHECKING:
    from bnpatch.models.torch_model import TorchModel

#: Fraction of the tuning examples on which candidates are compared; they also decide when learning stops.
SELECTION = 0.3

#: First points of a global search for alpha. Their square roots are evenly spread, because small alphas are
#: often useful. A search of few trials covers the range with them; one of more trials leaves no gap wide
#: enough to miss the second peak of a curve.
FIRST_ALPHAS = (0.01, 0.1225, 0.4225, 1.0, 0.04, 0.25, 0.64, 0.81, 0.49)

#: Maximum numbers of examples. Learning by gradient needs no more than the first. Coordinate search scores
#: the second, and ranks the values to try by the third, a subset of them.
_LEARNED_EXAMPLES, _COORDINATE_EXAMPLES, _PREVIEW_EXAMPLES = 30_000, 500, 100

# Learning takes small images in larger batches: up to as many input values as eight large images have.
_LEARNED_VALUES = 8 * 3 * 224 * 224

# With fewer blocks than this, successive halving is pointless: this many trials are scored on all blocks.
_LEAST_BLOCKS, _TRIALS_OF_FEW = 4, 14

# A label-free objective has several local minima, and a global search with one weight for all norm layers may
# end near one that is not the best. So learning alpha and lambda per layer also starts from these alphas, at
# the first norm layer and the last.
_OTHER_STARTS = ((0.05, 0.05), (0.8, 0.05))

# Statistics are re-estimated in batches of at least this size, because moments of smaller ones are noisy.
_RETARGET_BATCH = 250


class CandidateSearch:
    """Finds candidates, the identity first, and keeps the one that the selection examples support.

    The candidates, in order: one alpha for all norm layers; with recalibration, one lambda, then one alpha
    with that lambda; one alpha per stage or layer, learned by gradient where the model has gradients and
    found by coordinate search where not; with recalibration, alpha and lambda per stage or layer; and the
    best of these, refined by the metric itself. Each candidate starts from the result of an earlier one, so
    that none is much worse. Without labels, alpha and lambda per layer have further starting points.
    """

    def __init__(
        self,
        model: Model[Any],
        examples: Examples,
        tuning: Indices,
        judge: Judge,
        plan: Plan,
        *,
        statistics_from: tuple[Examples, Indices | None] | None = None,
        count: Callable[[str, int], None] = lambda label, examples: None,
        on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    ) -> None:
        self.model, self.examples, self.tuning, self.judge, self.plan = model, examples, tuning, judge, plan
        self.statistics_from = statistics_from or (examples, tuning)
        self._count, self._on_trial = count, on_trial
        self._identities = model.identities()
        self._started = time.monotonic()
        self.trials: list[Trial] = []
        self.interrupted = False
        self.reached = 0  # number of candidates found, without the identity
        self.cut = False  # time ran out: the last candidate may be worse than it could have been
        self.seen = 0.0  # number of examples scored, weighted by cost
        self.resumed = 0  # number of trials that the storage already had
        self._best_score = -math.inf  # of all trials so far; higher is better
        blocks = blocks_of(np.random.default_rng(plan.seed).permutation(tuning), judge.set_size)
        self._cache = ScoreCache(model, examples, judge, blocks, self._spend)
        self.base = model.state  # the state that weights apply to; lambda adds re-estimated statistics
        # A global search scores its best settings on all blocks, so that selecting by them costs nothing
        # more. One weight for all norm layers hardly overfits: where there are no other candidates, all
        # tuning examples select.
        part = 1.0 if plan.granularity == "global" else SELECTION
        first = len(blocks) - max(1, round(part * len(blocks)))
        self.selection = Selection(self._cache, judge, range(first, len(blocks)))
        self.fit = np.concatenate(blocks[:first] or blocks)

    @property
    def passes(self) -> float:
        """The cost of the search so far, in passes over the tuning examples."""
        return self.seen / len(self.tuning)

    def expected(self) -> float:
        """Estimate how many examples :meth:`find` will score."""
        names = [name for name, _ in self._ways({})[: self.plan.reach]]
        races = sum(name in (*GLOBAL_CANDIDATES, "refined") for name in names)
        learned = len(names) - races if self.model.has_gradients else 0
        if learned > 1 and self.judge.set_size > 1:
            learned += len(_OTHER_STARTS)
        course = Course.of(len(self.fit), self.judge.set_size)
        looks = CHECKS * (len(self.tuning) - len(self.fit))
        passes, trials = self._budget
        passes = min(passes, trials or math.inf)
        return races * passes * len(self.tuning) + learned * (course.num_examples + looks)

    @property
    def _budget(self) -> tuple[float, int | None]:
        """Budget of a global search in passes and in trials; with few blocks, only trials limit it."""
        if len(self._cache.blocks) < _LEAST_BLOCKS:
            return math.inf, self.plan.trials or _TRIALS_OF_FEW
        return self.plan.max_passes, self.plan.trials

    def find(self) -> list[Candidate]:
        """Find the candidates, the identity first, and mark the one that is kept.

        Raises:
            KeyboardInterrupt: the user interrupted before any candidate was found.
        """
        identity = PatchWeights(dict(self._identities), dict.fromkeys(self._identities, 0.0))
        found = {"identity": identity}
        try:
            for name, find in self._ways(found)[: self.plan.reach]:
                if self._out_of_time() or self.interrupted:
                    break
                found[name] = find()
                self.reached += 1
        except KeyboardInterrupt:
            if len(found) == 1:
                raise
            self.interrupted = True
        self.cut = self._out_of_time()
        return self.selection.choose(found)

    def _ways(self, found: Mapping[str, PatchWeights]) -> Sequence[tuple[str, Callable[[], PatchWeights]]]:
        """Names of the candidates, each with the function that finds it from earlier ones."""
        plan = self.plan
        per: str | None = {"auto": "layer", "global": None}.get(plan.granularity, plan.granularity)
        if plan.granularity == "auto" and not self.model.has_gradients and len(self.tuning) < 200:
            per = None  # too few examples to tell which of many changes helped
        ways: list[tuple[str, Callable[[], PatchWeights]]] = [
            ("alpha", lambda: self._one_weight("alpha", found["identity"]))
        ]
        if plan.recalibrate:
            ways += [
                ("lambda", lambda: self._one_weight("lambda", found["identity"])),
                ("lambda, alpha", lambda: self._one_weight("alpha", found["lambda"], "lambda, alpha")),
            ]
        if per:
            ways.append((f"alpha per {per}", lambda: self._find(found["alpha"], per, False)))
        if per and plan.recalibrate:
            ways.append(
                (f"lambda and alpha per {per}", lambda: self._find(found["lambda, alpha"], per, True))
            )
        if per:
            ways.append(("refined", lambda: self._refine(kept(self.selection.choose(found)).weights)))
        return ways

    # One weight for all.

    def _moved(self, kind: str, start: PatchWeights, weight: float) -> PatchWeights:
        """Set one lambda for all norm layers, or alphas at one distance from the identity."""
        if kind == "lambda":
            return PatchWeights(start.alphas, {**start.lambdas, **dict.fromkeys(self.base.target, weight)})
        return PatchWeights({name: abs(i - weight) for name, i in self._identities.items()}, start.lambdas)

    def _one_weight(
        self, kind: Literal["alpha", "lambda"], start: PatchWeights, name: str = ""
    ) -> PatchWeights:
        name = name or kind
        if kind == "lambda":
            self._re_estimate()
        first = (1.0, 0.5, 0.8) if kind == "lambda" else FIRST_ALPHAS

        def weights(params: Mapping[str, float]) -> PatchWeights:
            return start if params[kind] == 0 else self._moved(kind, start, params[kind])

        result = self._global_search(
            name,
            weights,
            {kind: (0.0, 1.0)},
            {kind: 0.0},
            [{kind: v} for v in first],
            start if any(start.lambdas.values()) else None,
        )
        return weights(result.best.params)

    def _global_search(
        self,
        name: str,
        weights: Callable[[Mapping[str, float]], PatchWeights],
        space: Mapping[str, tuple[float, float]],
        origin: Mapping[str, float],
        first: Sequence[Mapping[str, float]],
        start: PatchWeights | None = None,
    ) -> GlobalSearchResult:
        sizes = [len(block) for block in self._cache.blocks]
        passes, trials = self._budget

        def evaluate_blocks(params: Mapping[str, float], blocks: range) -> Sequence[Mapping[str, Values]]:
            return self._cache.by_block(weights(params), blocks, name)

        def report(runner: GlobalTrial, standing: GlobalSearchResult) -> None:
            state = self.base.with_weights(weights(runner.params))
            trial = replace(_as_trial(name, runner, standing.baseline.means, sizes), state=state)
            self.trials.append(trial)
            metric = self.judge.metric
            score = metric.sign * trial.scores[metric.name]
            is_best = standing.best.number == runner.number and score > self._best_score
            if is_best:
                self._best_score = score
            self._on_trial(trial, is_best)

        study = self._study(name if start is None else f"{name}.{_digest(start)}")
        self.resumed += len(study.trials())
        result = global_search(
            study,
            evaluate_blocks,
            GlobalSearchConfig(
                sizes,
                self.judge.metric,
                space,
                origin,
                first,
                by_root=("alpha",),
                max_passes=passes,
                max_trials=trials,
                seed=self.plan.seed,
            ),
            timeout=self._left(),
            on_trial=report,
        )
        # The result also has the trials that an earlier run of this study finished.
        self.trials = [t for t in self.trials if t.candidate != name]
        self.trials += [_as_trial(name, r, result.baseline.means, sizes) for r in result.trials if r.means]
        self.interrupted = self.interrupted or result.interrupted
        return result

    # One weight per stage or layer.

    def _find(self, start: PatchWeights, per: str, lambdas: bool) -> PatchWeights:
        by_name = self._groups(per)
        movable = self.base.target if lambdas else {}
        groups = Groups(by_name, {name: by_name.get(name, name) for name in movable})
        candidate = f"{'lambda and ' if lambdas else ''}alpha per {per} from {_digest(start)}"
        study = self._study("alpha")
        if known := study.recall(candidate):
            return PatchWeights(*known)
        try:
            found = self._from_places(self._by_gradient, start, groups)
        except NoGradientError:
            found = self._from_places(self._by_coordinates, start, groups)
        if not (self.interrupted or self._out_of_time()):
            study.remember(candidate, [dict(found.alphas), dict(found.lambdas)])
        return found

    def _from_places(
        self, find: Callable[[PatchWeights, Groups], PatchWeights], start: PatchWeights, groups: Groups
    ) -> PatchWeights:
        """Find weights from ``start``; for alpha and lambda without labels, the best of several starts."""
        found = find(start, groups)
        if self.judge.set_size == 1 or not groups.lambdas:
            return found
        lowest, tried = self.selection.cost(found, "choosing"), [start]
        try:
            for weights in _OTHER_STARTS:
                place = self._weighted(start, groups, weights)
                if place in tried or self._out_of_time():
                    continue
                tried.append(place)
                other = find(place, groups)
                if (cost := self.selection.cost(other, "choosing")) < lowest:
                    found, lowest = other, cost
        except KeyboardInterrupt:
            self.interrupted = True
        return found

    def _weighted(self, start: PatchWeights, groups: Groups, weights: tuple[float, float]) -> PatchWeights:
        """Start with alphas that change linearly with depth between two weights, and with lambdas of 0.5.

        Norm layers whose identity is not alpha = 0 keep their alpha: they use the example's moments already.
        """
        ramp = dict(zip(self._identities, np.linspace(*weights, len(self._identities)).tolist(), strict=True))
        first: dict[str, str] = {}  # the first norm layer of each group
        for name, group in groups.alphas.items():
            first.setdefault(group, name)
        alphas = {n: ramp[first[group]] for n, group in groups.alphas.items() if self._identities[n] == 0}
        return PatchWeights(
            {**start.alphas, **alphas}, {**start.lambdas, **dict.fromkeys(groups.lambdas, 0.5)}
        )

    def _by_gradient(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        if not self.model.has_gradients:
            raise NoGradientError
        label = "learning a weight per layer"
        fit = self.fit[:_LEARNED_EXAMPLES]
        values = next(self.examples.batches(1, fit)).x.numel()
        course = Course.of(len(fit), self.judge.set_size)
        batch_size = min(course.batch_size, max(self.plan.batch_size, _LEARNED_VALUES // values))
        while True:
            try:
                return learn(
                    cast("TorchModel", self.model),
                    self.examples,
                    fit,
                    self.judge.loss,
                    lambda weights: self.selection.cost(weights, label),
                    base=self.base,
                    start=start,
                    groups=groups,
                    course=course,
                    batch_size=batch_size,
                    seed=self.plan.seed,
                    stop=self._out_of_time,
                    on_batch=lambda count: self._spend(label, count, STEP_COST),
                )
            except NotEnoughMemoryError:  # gradients need more memory than scoring does
                if batch_size == 1:
                    raise
            batch_size //= 2

    def _by_coordinates(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        portion = np.random.default_rng(self.plan.seed).permutation(self.fit)[:_COORDINATE_EXAMPLES]
        coordinates = []
        for kind, by_name in (("alpha", groups.alphas), ("lambda", groups.lambdas)):
            members: dict[str, list[str]] = {}
            for name, group in by_name.items():
                members.setdefault(group, []).append(name)
            coordinates += [Coordinate(kind, tuple(names)) for names in members.values()]
        guide = self.selection.guide

        def scores(indices: Indices, weights: PatchWeights) -> Values | None:
            return if_finite(partial(self._units, weights, indices, guide))

        return coordinate_search(
            partial(scores, portion),
            start,
            coordinates,
            higher_is_better=guide.higher_is_better,
            preview=partial(scores, portion[: max(_PREVIEW_EXAMPLES, self.judge.set_size)]),
            stop=self._out_of_time,
        )

    def _refine(self, start: PatchWeights) -> PatchWeights:
        """Scale all alphas and drop small ones, by the metric itself: gradients can't do either."""

        def weights(params: Mapping[str, float]) -> PatchWeights:
            alphas = {}
            for name, alpha in start.alphas.items():
                away = min(1.0, params["scale"] * abs(alpha - self._identities[name]))
                alphas[name] = abs(self._identities[name] - (away if away >= params["threshold"] else 0.0))
            return PatchWeights(alphas, start.lambdas)

        space = {"scale": (0.0, 2.0), "threshold": (0.0, 0.1)}
        first = [
            {"scale": scale, "threshold": threshold}
            for scale, threshold in ((1.0, 0.02), (1.0, 0.05), (0.7, 0.02), (1.4, 0.02))
        ]
        origin = {"scale": 1.0, "threshold": 0.0}
        return weights(self._global_search("refined", weights, space, origin, first, start).best.params)

    def _groups(self, per: str) -> dict[str, str]:
        """Name the group of each norm layer; layers where an example has a single value are left out."""
        batch = next(self.examples.batches(1, self.tuning))
        shapes = self.model.norm_shapes(batch.x)
        everywhere = self.base.include_1x1
        weighted = [n for n in self._identities if everywhere or n not in shapes or math.prod(shapes[n]) > 1]
        if per == "layer":
            return {name: name for name in weighted}
        return {name: "x".join(map(str, shapes.get(name, ("unknown",)))) for name in weighted}

    def _units(self, weights: PatchWeights, indices: Indices, metric: Metric) -> Values:
        """Scores by a metric, one per example or one per set of examples."""
        label, sets = "turning one weight at a time", in_sets(indices, self.judge.set_size)
        return np.concatenate([self._cache.of(part, weights, label)[metric.name] for part in sets])

    def _spend(self, label: str, examples: int, cost: float = 1.0) -> None:
        self.seen += cost * examples
        self._count(label, examples)

    def _re_estimate(self) -> None:
        examples, indices = self.statistics_from

        found = target_moments(
            self.model,
            examples,
            indices=indices,
            batch_size=max(self.plan.batch_size, _RETARGET_BATCH),
            seed=self.plan.seed,
            on_batch=partial(self._spend, "re-estimating moments"),
        )
        self.base = self.base.with_target(found)
        self._cache.use(self.base)

    def _study(self, candidate: str) -> Study:
        higher = self.judge.metric.higher_is_better
        name = self.plan.study or "bnpatch"
        # A study stores scores by position, so they are valid only for the same examples in the same order.
        order = np.concatenate(self._cache.blocks).astype(np.int64)
        return open_study(
            self.plan.storage,
            name if candidate == "alpha" else f"{name}.{candidate.replace(', ', '+')}",
            direction="maximize" if higher else "minimize",
            fingerprint={**self.plan.fingerprint, "examples": _hash(order.tobytes()), "candidate": candidate},
            about={
                "metric": self.judge.metric.name,
                "model": self.model.name,
                "data": f"{len(order)} examples",
            },
        )

    def _out_of_time(self) -> bool:
        return self.plan.timeout is not None and time.monotonic() - self._started >= self.plan.timeout

    def _left(self) -> float | None:
        if self.plan.timeout is None:
            return None
        return max(0.0, self.plan.timeout - (time.monotonic() - self._started))


def _as_trial(candidate: str, runner: GlobalTrial, whole: Mapping[str, float], sizes: Sequence[int]) -> Trial:
    """Convert a trial of a global search, with its scores extrapolated to all examples.

    ``whole`` has the scores on all examples of the setting that the global search started from.
    """
    changes = runner.changes

    def within(metric: str, value: float) -> float:
        # A rate that is extrapolated from few examples may lie outside [0, 1].
        is_rate = metric in METRICS and METRICS[metric].is_rate
        return min(1.0, max(0.0, value)) if is_rate else value

    return Trial(
        candidate,
        runner.number,
        _plain(runner.params),
        {metric: within(metric, whole[metric] + changes[metric].value) for metric in whole},
        {metric: changes[metric].stderr for metric in whole},
        sum(sizes[: runner.blocks]),
    )


def _plain(params: Mapping[str, float]) -> Mapping[str, float]:
    """Parameters of a global search as :class:`Trial` documents them."""
    return {"weight" if name in ("alpha", "lambda") else name: value for name, value in params.items()}


def _digest(weights: PatchWeights) -> str:
    return _hash(json.dumps([dict(weights.alphas), dict(weights.lambdas)], sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
