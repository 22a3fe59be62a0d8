"""The candidates of a search, from one weight for all norm layers to one per layer, and which one is kept."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from bnpatch.core.patch import BESIDE_ALPHA, PatchState, PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.data.groups import shuffled
from bnpatch.evaluation.metrics import Values
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.search.config import GLOBAL_CANDIDATES, Candidate, Trial, chosen_of
from bnpatch.search.global_search import global_search
from bnpatch.search.keep import KeepSet
from bnpatch.search.layer_search import LayerSearch
from bnpatch.search.objective import Objective
from bnpatch.search.progress import Budget, Progress
from bnpatch.search.score_cache import ScoreCache, blocks_of
from bnpatch.search.selection import Selection
from bnpatch.search.studies import Study, open_study
from bnpatch.search.task import Task
from bnpatch.search.temperature import without_scaled
from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials, as_trial

#: Fraction of the tuning examples on which candidates are compared; they also decide when learning stops.
SELECTION = 0.3

#: First points of a global search for alpha. Their square roots are evenly spread, because small alphas are
#: often useful. A search of few trials covers the range with them; one of more trials leaves no gap wide
#: enough to miss the second peak of a curve.
FIRST_ALPHAS = (0.01, 0.1225, 0.4225, 1.0, 0.04, 0.25, 0.64, 0.81, 0.49)

# Where there are too few blocks for successive halving, this many trials are scored on all blocks.
_TRIALS_OF_FEW = 5

# Statistics are re-estimated in batches of at least this size, because those of smaller ones are noisy.
_STATISTICS_BATCH = 250

#: Finds candidates: their weights by name.
Find = Callable[[], Mapping[str, PatchWeights]]


class CandidateSearch:
    """Finds candidates, the baseline first, and keeps the one that the selection examples support.

    The candidates are, in order:

    - one alpha for all norm layers;
    - with recalibration, one lambda for all, and then one alpha with that lambda;
    - weights per stage or layer, without and with slopes. A model with gradients learns them, and with the
      slopes also var_offsets; a coordinate search finds them for other models;
    - the best of these, refined by the metric itself.

    Attributes:
        tuning: indices of the examples that the search scores.
        trials: the trials of its global searches.
        selection: scores and compares candidates.
        budget: time and examples.
        num_tried: number of ways to find candidates that were tried to their end.
        cut_short: time ran out, so that the last candidate may be worse than it could have been.
        interrupted: the user interrupted the search.
        resumed: number of trials that the storage already had.
    """

    def __init__(
        self,
        task: Task,
        tuning: Indices,
        objective: Objective,
        *,
        keep: KeepSet | None = None,
        progress: Progress | None = None,
        on_trial: Callable[[Trial, bool], None] = lambda trial, is_best: None,
    ) -> None:
        """Prepare a search.

        Args:
            task: what to search.
            tuning: indices of the examples to score, which can be read.
            objective: scores the examples.
            keep: images on which a patch must do no harm; None for none.
            progress: counts the examples that are scored; it must expect as many as :meth:`expected` says.
            on_trial: called after each trial of a global search, as that of :func:`bnpatch.tune_alpha`.
        """
        model, examples, plan = task.model, task.seen, task.plan
        self.model, self.tuning, self.objective, self.plan = model, tuning, objective, plan
        self._progress = progress or Progress(lambda label, done, total: None)
        self.budget = Budget(plan.timeout, self._progress.count)
        self.trials: list[Trial] = []
        self.num_tried, self.resumed = 0, 0
        self.cut_short = self.interrupted = False
        self._statistics_from = (examples, tuning) if task.calib is None else (task.calib, None)
        self._on_trial, self._keep = on_trial, keep
        self._baseline_alphas = model.baseline_alphas()
        self._best_score = -math.inf  # of all trials so far; higher is better
        order = shuffled(tuning, examples.groups, np.random.default_rng(plan.seed))
        blocks = blocks_of(order, objective.set_size, examples.groups)
        self._cache = ScoreCache(model, examples, objective, blocks, self.budget.spend)
        # A global search scores its best trial on all blocks, so the selection needs no more scoring. One
        # weight for all norm layers hardly overfits, so all tuning examples select if there are no other
        # candidates.
        part = 1.0 if plan.granularity == "global" else SELECTION
        first = len(blocks) - max(1, round(part * len(blocks)))
        self.selection = Selection(self._cache, range(first, len(blocks)))
        fit = np.concatenate(blocks[:first] or blocks)
        self._layers = LayerSearch(self._cache, self.selection, fit, plan, self.budget, keep)

    @property
    def base(self) -> PatchState:
        """The state that weights apply to; a search for lambda adds re-estimated statistics to it."""
        return self._cache.base

    @property
    def passes(self) -> float:
        """The cost of the search so far, in passes over the tuning examples."""
        return self.budget.spent / len(self.tuning)

    def expected(self) -> float:
        """Estimate how many examples :meth:`find` will score."""
        return sum(cost for cost, _ in self._ways({})[: self.plan.reach])

    def find(self) -> list[Candidate]:
        """Find the candidates, the baseline first, and mark the one that is kept.

        Raises:
            KeyboardInterrupt: the user interrupted before any candidate was found.
        """
        found = {"baseline": PatchWeights.baseline(self._baseline_alphas)}
        try:
            for cost, find in self._ways(found)[: self.plan.reach]:
                with self._progress.part(cost):
                    if self.budget.is_over() or self.interrupted:
                        continue
                    found |= find()
                    self.num_tried += 1
        except KeyboardInterrupt:  # the user wants the best so far
            if len(found) == 1:
                raise
            self.interrupted = True
        self.cut_short = self.budget.is_over()
        return self.selection.choose(found)

    def _ways(self, found: Mapping[str, PatchWeights]) -> Sequence[tuple[float, Find]]:
        """List ways to find candidates, each from those that were found before it.

        Returns:
            For each, an estimate of how many examples it scores, and the function that finds the candidates.
        """
        plan = self.plan
        per: str | None = {"auto": "layer", "global": None}.get(plan.granularity, plan.granularity)
        if plan.granularity == "auto" and len(self.tuning) < 200 and not self._layers.has_gradients:
            per = None  # too few examples to tell which of many changes helped
        passes, trials = self._limits
        one_pass = len(self.tuning)
        cost = min(passes, trials or math.inf) * one_pass  # of a global search
        ways: list[tuple[float, Find]] = [
            (cost, lambda: self._one_weight("alpha", "alpha", found["baseline"]))
        ]
        if plan.recalibrate:
            ways += [
                # Statistics are re-estimated in one pass; the scores of the start are in the cache already.
                (cost, lambda: self._one_weight("lambda", "lambda", found["baseline"])),
                (cost - one_pass, lambda: self._one_weight("lambda, alpha", "alpha", found["lambda"])),
            ]
        if per:
            ways += [
                (self._layers.expected(), lambda: self._per_layer(found, per)),
                (cost - one_pass, lambda: self._refined(chosen_of(self.selection.choose(found)))),
            ]
        return ways

    def _per_layer(self, found: Mapping[str, PatchWeights], per: str) -> Mapping[str, PatchWeights]:
        """Find a weight per stage or layer.

        The study stores what was found, unless time ran out, and a resumed search reads that.
        """
        key = (
            f"per {per} from {_digest(found['alpha'])} {_digest(found.get('lambda, alpha', found['alpha']))}"
        )
        if self._keep is not None:
            key += f" keeping {self._keep.examples.fingerprint()}"
        study = self._study("alpha")
        if known := study.recall(key):
            return {name: PatchWeights(*weights) for name, weights in known.items()}
        candidates = self._layers.find(found, per)
        if not self.budget.is_over():
            study.remember(
                key,
                {n: [dict(values) for _, values in w.kinds()] for n, w in candidates.items()},
            )
        return candidates

    def _one_weight(
        self, name: str, kind: Literal["alpha", "lambda"], start: PatchWeights
    ) -> Mapping[str, PatchWeights]:
        """Search one weight for all norm layers; the others stay as in ``start``."""
        if kind == "lambda":
            self._re_estimate()
        first = (1.0, 0.5, 0.8) if kind == "lambda" else FIRST_ALPHAS

        def weights(params: Mapping[str, float]) -> PatchWeights:
            return start if params[kind] == 0 else self._moved(kind, start, params[kind])

        return self._global_search(
            name,
            weights,
            {kind: (0.0, 1.0)},
            {kind: 0.0},
            [{kind: v} for v in first],
            start if any(start.lambdas.values()) else None,
        )

    def _moved(self, kind: str, start: PatchWeights, weight: float) -> PatchWeights:
        """Return ``start`` with one lambda everywhere, or with all alphas this far from the baseline."""
        if kind == "lambda":
            return replace(start, lambdas={**start.lambdas, **dict.fromkeys(self.base.re_estimated, weight)})
        return replace(start, alphas={name: abs(i - weight) for name, i in self._baseline_alphas.items()})

    def _refined(self, best: Candidate) -> Mapping[str, PatchWeights]:
        """Scale all alphas and drop small ones, by the metric itself: gradients can't do either.

        The search for one weight for all norm layers has scaled that already, so it is not refined.
        """
        if best.name in GLOBAL_CANDIDATES:
            return {}
        start = best.weights

        def weights(params: Mapping[str, float]) -> PatchWeights:
            alphas = {}
            for name, alpha in start.alphas.items():
                baseline = self._baseline_alphas[name]
                away = min(1.0, params["scale"] * abs(alpha - baseline))
                alphas[name] = abs(baseline - (away if away >= params["threshold"] else 0.0))
            return replace(start, alphas=alphas)

        first = [
            {"scale": scale, "threshold": threshold}
            for scale, threshold in ((1.0, 0.02), (1.0, 0.05), (0.7, 0.02), (1.4, 0.02))
        ]
        return self._global_search(
            "refined",
            weights,
            {"scale": (0.0, 2.0), "threshold": (0.0, 0.1)},
            {"scale": 1.0, "threshold": 0.0},
            first,
            start,
        )

    def _global_search(
        self,
        name: str,
        weights: Callable[[Mapping[str, float]], PatchWeights],
        space: Mapping[str, tuple[float, float]],
        start: Mapping[str, float],
        first: Sequence[Mapping[str, float]],
        apart: PatchWeights | None = None,
    ) -> Mapping[str, PatchWeights]:
        """Search a few parameters, which ``weights`` makes weights of; report and keep the trials.

        ``start``, ``space`` and ``first`` are those of :class:`GlobalSearchConfig`. If ``weights`` depends on
        other weights, ``apart`` has them, so that a search with others gets a study of its own.
        """
        sizes = [len(block) for block in self._cache.blocks]
        passes, trials = self._limits

        def evaluate_blocks(params: Mapping[str, float], blocks: range) -> Sequence[Mapping[str, Values]]:
            scored = self._cache.by_block(weights(params), blocks, name)
            return [without_scaled(scores) for scores in scored]

        def report(ended: StoredTrial, so_far: Trials) -> None:
            trial = as_trial(name, ended, so_far)
            state = self.base.with_weights(weights(ended.params))
            self._report(replace(trial, state=state), so_far.best.number == ended.number)
            if self.plan.callbacks:
                stored = study.optuna_study.trials[ended.stored]
                for callback in self.plan.callbacks:
                    callback(study.optuna_study, stored)

        study = self._study(name if apart is None else f"{name}.{_digest(apart)}")
        self.resumed += len(study.trials())
        result = global_search(
            study,
            evaluate_blocks,
            GlobalSearchConfig(
                sizes,
                self.objective.metric,
                space,
                start,
                first,
                by_root=("alpha",),
                max_passes=passes,
                max_trials=trials,
                seed=self.plan.seed,
                groups=self._cache.groups_by_block(),
            ),
            timeout=self.budget.seconds_left(),
            on_trial=report,
        )
        # The result also has the trials that an earlier run of this study finished.
        self.trials = [t for t in self.trials if t.candidate != name]
        self.trials += [as_trial(name, trial, result) for trial in result.trials if trial.num_blocks]
        self.interrupted = self.interrupted or result.interrupted
        return {name: weights(result.best.params)}

    def _report(self, trial: Trial, is_best_of_search: bool) -> None:
        """Keep a trial that has just ended, and tell the user of it."""
        self.trials.append(trial)
        score = self.objective.metric.sign * trial.scores[self.objective.metric.name]
        is_best = is_best_of_search and score > self._best_score
        if is_best:
            self._best_score = score
        self._on_trial(trial, is_best)

    @property
    def _limits(self) -> tuple[float, int | None]:
        """Limits of a global search in passes and in trials; with few blocks, only trials limit it."""
        if self._cache.has_few_blocks:
            return math.inf, self.plan.trials or _TRIALS_OF_FEW
        return self.plan.max_passes, self.plan.trials

    def _re_estimate(self) -> None:
        """Add re-estimated statistics to the base state."""
        examples, indices = self._statistics_from
        re_estimated = re_estimate_statistics(
            self.model,
            examples,
            indices=indices,
            batch_size=max(self.plan.batch_size, _STATISTICS_BATCH),
            seed=self.plan.seed,
            on_batch=partial(self.budget.spend, "re-estimating statistics"),
        )
        self._cache.use(self.base.with_re_estimated(re_estimated))

    def _study(self, candidate: str) -> Study:
        higher = self.objective.metric.higher_is_better
        name = self.plan.study or "bnpatch"
        # A study stores scores by position, so they are valid only for the same examples in the same order.
        order = np.concatenate(self._cache.blocks).astype(np.int64)
        return open_study(
            self.plan.database,
            name if candidate == "alpha" else f"{name}.{candidate.replace(', ', '+')}",
            direction="maximize" if higher else "minimize",
            fingerprint={**self.plan.fingerprint, "examples": _hash(order.tobytes()), "candidate": candidate},
            about={
                "metric": self.objective.metric.name,
                "model": self.model.name,
                "data": f"{len(order)} examples",
            },
        )


def _digest(weights: PatchWeights) -> str:
    values = [dict(weights.alphas), dict(weights.lambdas)]
    values += [dict(weights.of(kind)) for kind in BESIDE_ALPHA if any(weights.of(kind).values())]
    return _hash(json.dumps(values, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
