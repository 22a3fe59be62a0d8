"""The list of candidates of a search: ever richer settings, of which the one that other examples support is
kept.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np

from bnpatch.core.errors import NotEnoughMemoryError
from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.evaluate import if_finite
from bnpatch.evaluation.metrics import METRICS, Metric, Values
from bnpatch.models.base import Patchable
from bnpatch.models.running_stats import target_moments
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.config import GLOBAL_RUNGS, Candidate, Plan, Trial, kept
from bnpatch.search.coordinate_search import Coordinate, coordinate_search
from bnpatch.search.global_search import GlobalSearchResult, Runner, global_search
from bnpatch.search.gradient_search import CHECKS, STEP_COST, Course, Groups, NoGradientError, learn
from bnpatch.search.objective import Judge, in_sets
from bnpatch.search.score_cache import ScoreCache, blocks_of
from bnpatch.search.selection import Selection
from bnpatch.search.studies import Study, open_study

#: Part of the tuning examples on which candidates are compared, and learning is stopped.
SELECTION = 0.3

#: Where a global search for alpha begins, by its square root, which resolves the small values that are often
#: useful: a search of few trials sees the range, one of more has no gap that a curve with two peaks could
#: hide in.
FIRST_ROOTS = (0.1, 0.35, 0.65, 1.0, 0.2, 0.5, 0.8, 0.9, 0.7)

#: Learning sees at most this many examples, which is as many as it takes; without gradients, this many, of
#: which a glance at the last number is enough to see what is promising.
_LEARNED_EXAMPLES, _WALKED_EXAMPLES, _GLANCED_EXAMPLES = 30_000, 500, 100

# Of small images more are learned from at a time than a batch has: as many as eight large ones have values.
_LEARNED_VALUES = 8 * 3 * 224 * 224

# Fewer blocks are no global search: so many trials see all of them.
_LEAST_BLOCKS, _TRIALS_OF_FEW = 4, 14

# An objective without labels has more than one valley, and global searches with one weight for all may end
# beside the best. So both weights are looked for from further places: with these alphas at the first norm
# layer and the last.
_OTHER_STARTS = ((0.05, 0.05), (0.8, 0.05))

# Moments of a batch by which the layers below normalize are too noisy of fewer examples.
_RETARGET_BATCH = 250


class CandidateSearch:
    """Climbs from the identity to one weight per layer, and keeps what the selection examples support.

    The candidates: one alpha for all; with recalibration, one lambda, and that lambda with one alpha; one
    alpha
    per stage or layer, learned by gradient where the model has them, else found by turning one weight at a
    time; with recalibration, both weights per stage or layer; at last the best of these refined by the metric
    itself. Every candidate begins where a lower one ended, so that none is much worse; both weights without
    labels begin at further places, too. Which one is kept is
    decided on a part of the examples, the selection.
    """

    def __init__(
        self,
        model: Patchable,
        examples: Examples,
        tuning: Indices,
        judge: Judge,
        plan: Plan,
        *,
        targets_from: tuple[Examples, Indices | None] | None = None,
        count: Callable[[str, int], None] = lambda label, examples: None,
        on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    ) -> None:
        self.model, self.examples, self.tuning, self.judge, self.plan = model, examples, tuning, judge, plan
        self.targets_from = targets_from or (examples, tuning)
        self._count, self._on_trial = count, on_trial
        self._identities = model.identities()
        self._started = time.monotonic()
        self.trials: list[Trial] = []
        self.interrupted = False
        self.reached = 0  # candidates above the identity that were found
        self.cut = False  # time was over: the last candidate may be less than it could have been
        self.seen = 0.0  # examples, by what they cost
        self.resumed = 0  # trials that the storage had already
        self._best_score = -math.inf  # of all trials so far, more is better
        blocks = blocks_of(np.random.default_rng(plan.seed).permutation(tuning), judge.set_size)
        self._board = ScoreCache(model, examples, judge, blocks, self._spend)
        # A global search scores all blocks of the settings that matter: choosing between them costs nothing
        # more. One weight for all does not fit itself to the examples: where nothing else is found, all of
        # them choose.
        part = 1.0 if plan.granularity == "global" else SELECTION
        first = len(blocks) - max(1, round(part * len(blocks)))
        self.selection = Selection(self._board, judge, range(first, len(blocks)))
        self.fit = np.concatenate(blocks[:first] or blocks)

    @property
    def passes(self) -> float:
        """How often the tuning examples were gone through, all in all."""
        return self.seen / len(self.tuning)

    def expected(self) -> float:
        """About how many examples :meth:`climb` will go through."""
        names = [name for name, _ in self._ways({})[: self.plan.reach]]
        races = sum(name in (*GLOBAL_RUNGS, "refined") for name in names)
        learned = len(names) - races if isinstance(self.model, TorchModel) else 0
        if learned > 1 and self.judge.set_size > 1:
            learned += len(_OTHER_STARTS)
        course = Course.of(len(self.fit), self.judge.set_size)
        looks = CHECKS * (len(self.tuning) - len(self.fit))
        passes, trials = self._budget
        passes = min(passes, trials or math.inf)
        return races * passes * len(self.tuning) + learned * (course.num_examples + looks)

    @property
    def _budget(self) -> tuple[float, int | None]:
        """Of a global search, in passes and in trials. A handful of sets is too few to global search over:
        each sees all.
        """
        if len(self._board.blocks) < _LEAST_BLOCKS:
            return math.inf, self.plan.trials or _TRIALS_OF_FEW
        return self.plan.max_passes, self.plan.trials

    def climb(self) -> list[Candidate]:
        """Find the settings, and choose; the identity is the first of them.

        Raises:
            KeyboardInterrupt: before anything was found.
        """
        identity = PatchWeights(dict(self._identities), dict.fromkeys(self._identities, 0.0))
        found = {"identity": identity}
        try:
            for name, find in self._ways(found)[: self.plan.reach]:
                if self._hurry() or self.interrupted:
                    break
                found[name] = find()
                self.reached += 1
        except KeyboardInterrupt:
            if len(found) == 1:
                raise
            self.interrupted = True
        self.cut = self._hurry()
        return self.selection.choose(found)

    def _ways(self, found: Mapping[str, PatchWeights]) -> Sequence[tuple[str, Callable[[], PatchWeights]]]:
        """Name of each candidate, and how it is found from those below it."""
        plan = self.plan
        per: str | None = {"auto": "layer", "global": None}.get(plan.granularity, plan.granularity)
        if plan.granularity == "auto" and not isinstance(self.model, TorchModel) and len(self.tuning) < 200:
            per = None  # too few to tell which of many turns was a good one
        ways: list[tuple[str, Callable[[], PatchWeights]]] = [
            ("alpha", lambda: self._race("alpha", found["identity"]))
        ]
        if plan.recalibrate:
            ways += [
                ("lambda", lambda: self._race("lambda", found["identity"])),
                ("lambda, alpha", lambda: self._race("alpha", found["lambda"], "lambda, alpha")),
            ]
        if per:
            ways.append((f"alpha per {per}", lambda: self._find(found["alpha"], per, False)))
        if per and plan.recalibrate:
            ways.append(
                (f"lambda and alpha per {per}", lambda: self._find(found["lambda, alpha"], per, True))
            )
        if per:
            ways.append(("refined", lambda: self._refine(kept(self.selection.choose(found)).setting)))
        return ways

    # One weight for all.

    def _moved(self, kind: str, start: PatchWeights, weight: float) -> PatchWeights:
        """All norm layers so far from their identity; Group Norm's is at alpha = 1."""
        if kind == "lambda":
            return PatchWeights(
                start.alphas, {**start.lambdas, **dict.fromkeys(self.model.targets(), weight)}
            )
        return PatchWeights({name: abs(i - weight) for name, i in self._identities.items()}, start.lambdas)

    def _race(self, kind: Literal["alpha", "lambda"], start: PatchWeights, name: str = "") -> PatchWeights:
        name = name or kind
        if kind == "lambda":
            self._retarget()
        key = "lambda" if kind == "lambda" else "sqrt_alpha"
        first = (1.0, 0.5, 0.8) if kind == "lambda" else FIRST_ROOTS

        def setting(params: Mapping[str, float]) -> PatchWeights:
            value = params[key]
            return start if value == 0 else self._moved(kind, start, value if kind == "lambda" else value**2)

        result = self._run_race(
            name,
            setting,
            {key: (0.0, 1.0)},
            {key: 0.0},
            [{key: v} for v in first],
            start if any(start.lambdas.values()) else None,
        )
        return setting(result.best.params)

    def _run_race(
        self,
        name: str,
        setting: Callable[[Mapping[str, float]], PatchWeights],
        space: Mapping[str, tuple[float, float]],
        origin: Mapping[str, float],
        first: Sequence[Mapping[str, float]],
        start: PatchWeights | None = None,
    ) -> GlobalSearchResult:
        sizes = [len(block) for block in self._board.blocks]
        passes, trials = self._budget

        def evaluate_blocks(params: Mapping[str, float], blocks: range) -> Sequence[Mapping[str, Values]]:
            return self._board.by_block(setting(params), blocks, name)

        def report(runner: Runner, standing: GlobalSearchResult) -> None:
            trial = _as_trial(name, runner, standing.identity.means, sizes)
            self.trials.append(trial)
            metric = self.judge.metric
            score = metric.sign * trial.scores[metric.name]
            is_best = standing.best.number == runner.number and score > self._best_score
            if is_best:
                self._best_score = score
            self.model.set(setting(runner.params))  # it may have been scored long ago
            self._on_trial(trial, is_best)

        study = self._study(name if start is None else f"{name}.{_digest(start)}")
        self.resumed += len(study.trials())
        result = global_search(
            study,
            evaluate_blocks,
            sizes,
            metric=self.judge.metric,
            space=space,
            identity=origin,
            first=first,
            max_passes=passes,
            max_trials=trials,
            timeout=self._left(),
            seed=self.plan.seed,
            on_trial=report,
        )
        # Also those that an earlier run finished.
        self.trials = [t for t in self.trials if t.candidate != name]
        self.trials += [_as_trial(name, r, result.identity.means, sizes) for r in result.runners if r.means]
        self.interrupted = self.interrupted or result.interrupted
        return result

    # One weight per stage or layer.

    def _find(self, start: PatchWeights, per: str, lambdas: bool) -> PatchWeights:
        by_name = self._groups(per)
        movable = self.model.targets() if lambdas else {}
        groups = Groups(by_name, {name: by_name.get(name, name) for name in movable})
        candidate = f"{'lambda and ' if lambdas else ''}alpha per {per} from {_digest(start)}"
        study = self._study("alpha")
        if known := study.recall(candidate):
            return PatchWeights(*known)
        try:
            found = self._from_places(self._learn, start, groups)
        except NoGradientError:
            found = self._from_places(self._walk, start, groups)
        if not (self.interrupted or self._hurry()):
            study.remember(candidate, [dict(found.alphas), dict(found.lambdas)])
        return found

    def _from_places(
        self, find: Callable[[PatchWeights, Groups], PatchWeights], start: PatchWeights, groups: Groups
    ) -> PatchWeights:
        """The best of what is found from one place; of both weights without labels, from several."""
        found = find(start, groups)
        if self.judge.set_size == 1 or not groups.lambdas:
            return found
        lowest, tried = self.selection.cost(found, "choosing"), [start]
        try:
            for weights in _OTHER_STARTS:
                place = self._weighted(start, groups, weights)
                if place in tried or self._hurry():
                    continue
                tried.append(place)
                other = find(place, groups)
                if (cost := self.selection.cost(other, "choosing")) < lowest:
                    found, lowest = other, cost
        except KeyboardInterrupt:
            self.interrupted = True
        return found

    def _weighted(self, start: PatchWeights, groups: Groups, weights: tuple[float, float]) -> PatchWeights:
        """Alphas from the first of these weights to the last, by depth, and lambdas in the middle.

        Norm layers whose identity is not at 0 keep what they have: they see the example already.
        """
        ramp = dict(zip(self._identities, np.linspace(*weights, len(self._identities)).tolist(), strict=True))
        first: dict[str, str] = {}  # of each group
        for name, group in groups.alphas.items():
            first.setdefault(group, name)
        alphas = {n: ramp[first[group]] for n, group in groups.alphas.items() if self._identities[n] == 0}
        return PatchWeights(
            {**start.alphas, **alphas}, {**start.lambdas, **dict.fromkeys(groups.lambdas, 0.5)}
        )

    def _learn(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        if not isinstance(self.model, TorchModel):
            raise NoGradientError
        label = "learning a weight per layer"
        fit = self.fit[:_LEARNED_EXAMPLES]
        values = next(self.examples.batches(1, fit)).x.numel()
        course = Course.of(len(fit), self.judge.set_size)
        batch_size = min(course.batch_size, max(self.plan.batch_size, _LEARNED_VALUES // values))
        while True:
            try:
                return learn(
                    self.model,
                    self.examples,
                    fit,
                    self.judge.loss,
                    lambda: self.selection.cost(self.model.setting(), label),
                    start=start,
                    groups=groups,
                    course=course,
                    batch_size=batch_size,
                    seed=self.plan.seed,
                    stop=self._hurry,
                    on_batch=lambda count: self._spend(label, count, STEP_COST),
                )
            except NotEnoughMemoryError:  # gradients take more than the global searches before
                if batch_size == 1:
                    raise
            batch_size //= 2

    def _walk(self, start: PatchWeights, groups: Groups) -> PatchWeights:
        portion = np.random.default_rng(self.plan.seed).permutation(self.fit)[:_WALKED_EXAMPLES]
        coordinates = []
        for kind, by_name in (("alpha", groups.alphas), ("lambda", groups.lambdas)):
            members: dict[str, list[str]] = {}
            for name, group in by_name.items():
                members.setdefault(group, []).append(name)
            coordinates += [Coordinate(kind, tuple(names)) for names in members.values()]
        guide = self.selection.guide

        def scores(indices: Indices, setting: PatchWeights) -> Values | None:
            return if_finite(partial(self._units, setting, indices, guide))

        return coordinate_search(
            partial(scores, portion),
            start,
            coordinates,
            higher_is_better=guide.higher_is_better,
            glance=partial(scores, portion[: max(_GLANCED_EXAMPLES, self.judge.set_size)]),
            stop=self._hurry,
        )

    def _refine(self, start: PatchWeights) -> PatchWeights:
        """What gradients can't see: the metric itself, and small weights that may as well be none."""

        def setting(params: Mapping[str, float]) -> PatchWeights:
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
        return setting(self._run_race("refined", setting, space, origin, first, start).best.params)

    def _groups(self, per: str) -> dict[str, str]:
        """Which norm layers share a weight; those where an example has a single value stay at their
        identity.
        """
        batch = next(self.examples.batches(1, self.tuning))
        shapes = self.model.norm_shapes(batch.x)
        everywhere = self.model.include_1x1
        weighed = [n for n in self._identities if everywhere or n not in shapes or math.prod(shapes[n]) > 1]
        if per == "layer":
            return {name: name for name in weighed}
        return {name: "x".join(map(str, shapes.get(name, ("unknown",)))) for name in weighed}

    def _units(self, setting: PatchWeights, indices: Indices, metric: Metric) -> Values:
        """Scores by example, or by set of examples."""
        label, sets = "turning one weight at a time", in_sets(indices, self.judge.set_size)
        return np.concatenate([self._board.of(part, setting, label)[metric.name] for part in sets])

    def _spend(self, label: str, examples: int, cost: float = 1.0) -> None:
        self.seen += cost * examples
        self._count(label, examples)

    def _retarget(self) -> None:
        examples, indices = self.targets_from

        found = target_moments(
            self.model,
            examples,
            indices=indices,
            batch_size=max(self.plan.batch_size, _RETARGET_BATCH),
            seed=self.plan.seed,
            on_batch=partial(self._spend, "re-estimating moments"),
        )
        self.model.retarget(found)
        self._board.forget()

    def _study(self, candidate: str) -> Study:
        higher = self.judge.metric.higher_is_better
        name = self.plan.study or "bnpatch"
        # Scores are kept by place: of other examples, or of these in another order, they mean nothing.
        order = np.concatenate(self._board.blocks).astype(np.int64)
        return open_study(
            self.plan.storage,
            name if candidate == "alpha" else f"{name}.{candidate.replace(', ', '+')}",
            direction="maximize" if higher else "minimize",
            fingerprint={**self.plan.fingerprint, "examples": _hash(order.tobytes()), "rung": candidate},
        )

    def _hurry(self) -> bool:
        return self.plan.timeout is not None and time.monotonic() - self._started >= self.plan.timeout

    def _left(self) -> float | None:
        if self.plan.timeout is None:
            return None
        return max(0.0, self.plan.timeout - (time.monotonic() - self._started))


def _as_trial(candidate: str, runner: Runner, whole: Mapping[str, float], sizes: Sequence[int]) -> Trial:
    """What a global search knows of a trial, as it would be on all examples; ``whole`` is what it began with
    there.
    """
    changes = runner.changes

    def within(metric: str, value: float) -> float:
        # Judged by few, it may lie beyond what a rate can be.
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
    """Parameters of a global search as people think of them, see :class:`Trial`."""
    if "sqrt_alpha" in params:
        return {"weight": params["sqrt_alpha"] ** 2}
    return {"weight" if name == "lambda" else name: value for name, value in params.items()}


def _digest(setting: PatchWeights) -> str:
    return _hash(json.dumps([dict(setting.alphas), dict(setting.lambdas)], sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
