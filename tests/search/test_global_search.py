import warnings

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from bnpatch.core.errors import BnpatchError
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, paired_difference
from bnpatch.search.global_search import global_search
from bnpatch.search.score_cache import block_sizes
from bnpatch.search.storages import Storage
from bnpatch.search.studies import open_study
from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials
from tests.search.global_search_worker import summaries

GRID = np.linspace(0, 1, 101)
FIRST = [{"x": x} for x in (0.1, 0.2, 0.35, 0.6, 1.0)]


class Problem:
    """Examples that each have a best parameter of their own, on average near ``best``.

    An example is right where it is less than ``1 / steepness`` away from its own best.
    """

    def __init__(self, examples, best=0.4, seed=0, steepness=4.0, sizes=None):
        rng = np.random.default_rng(seed)
        self.sizes = block_sizes(examples) if sizes is None else sizes
        self.bests = rng.normal(best, 0.1, examples)
        self.steepness = steepness * rng.uniform(0.5, 1.5, examples)
        self.hardness = rng.exponential(0.3, examples)
        self.ends = np.cumsum([0, *self.sizes])
        self.scored = 0

    def scores(self, x):
        away = self.steepness * np.abs(x - self.bests)
        return {"cross-entropy": self.hardness + 0.5 * away**2, "accuracy": (away < 1).astype(float)}

    def __call__(self, params, block):
        part = slice(self.ends[block], self.ends[block + 1])
        self.scored += self.sizes[block]
        return {name: values[part] for name, values in self.scores(params["x"]).items()}


class Flat(Problem):
    """Nothing depends on the parameter."""

    def scores(self, x):
        return super().scores(0.3)


def run(problem, metric=CROSS_ENTROPY, study=None, **options):
    direction = "maximize" if metric.higher_is_better else "minimize"
    what = {"space": {"x": (0.0, 1.0)}, "start": {"x": 0.0}, "first": FIRST, **options}
    how = {name: what.pop(name) for name in ("timeout", "on_trial") if name in what}

    def evaluate_blocks(params, blocks):
        return [problem(params, block) for block in blocks]

    study = study or open_study(direction=direction)
    return global_search(study, evaluate_blocks, GlobalSearchConfig(problem.sizes, metric, **what), **how)


def regret(problem, result):
    best = min(problem.scores(x)["cross-entropy"].mean() for x in GRID)
    return problem.scores(result.best.params["x"])["cross-entropy"].mean() / best - 1


@pytest.mark.slow
def test_cross_entropy_lands_where_the_grid_does_in_three_passes():
    regrets = []
    for seed, best in enumerate((0.0, 0.05, 0.3, 0.7, 1.0)):
        problem = Problem(3000, best, seed)
        result = run(problem, seed=seed)
        assert problem.scored <= 3 * 3000
        assert result.passes == problem.scored / 3000
        regrets.append(regret(problem, result))
    assert max(regrets) < 0.005  # of the cross-entropy, the promise of the search


def test_accuracy_lands_within_the_paired_interval_of_the_grids_best():
    outside = 0
    for seed, best in enumerate((0.05, 0.15, 0.3, 0.5, 0.7, 0.9)):
        problem = Problem(1000, best, seed)
        result = run(problem, ACCURACY, seed=seed)
        assert problem.scored <= 3 * 1000
        on_grid = max((problem.scores(x)["accuracy"] for x in GRID), key=np.mean)
        found = problem.scores(result.best.params["x"])["accuracy"]
        outside += paired_difference(found, on_grid).low > 0
    assert outside <= 1  # of 6: the best of 101 noisy means is itself flattered


@pytest.mark.parametrize("metric", [CROSS_ENTROPY, ACCURACY], ids=lambda metric: metric.name)
def test_where_nothing_matters_nothing_is_changed(metric):
    result = run(Flat(400), metric)
    assert result.best.params == {"x": 0.0}
    assert result.best.number == 0
    assert result.passes <= 3


def test_where_the_baseline_is_best_it_wins_and_the_rest_is_dropped_early():
    problem = Problem(1000, best=0.0)
    problem.bests = np.abs(problem.bests) / 100
    result = run(problem)
    assert result.best.params["x"] < 0.01
    assert all(r.num_blocks <= 3 for r in result.trials if r.params["x"] >= 0.1)


@pytest.mark.parametrize(
    ("examples", "sizes"),
    [(50, None), (50, [50]), (300, [7, 100, 3, 90, 50, 50]), (9, None)],
    ids=["few", "one block", "unequal", "very few"],
)
def test_any_blocks_do(examples, sizes):
    problem = Problem(examples, best=0.6, sizes=sizes)
    result = run(problem)
    assert result.passes == problem.scored / examples <= 3
    assert result.best.num_blocks == len(problem.sizes)
    change = result.change(result.best)
    assert change.value < 0 < change.stderr
    expected = problem.scores(result.best.params["x"])["cross-entropy"] - problem.scores(0.0)["cross-entropy"]
    assert change.value == pytest.approx(expected.mean(), rel=1e-5)  # scores are kept in float32


def test_blocks_weigh_what_they_have_examples_even_where_they_have_one_score():
    problem = Problem(300, best=0.6, sizes=[100, 20, 60, 40, 80])

    def whole(params, block):
        return {name: values.mean(keepdims=True) for name, values in problem(params, block).items()}

    whole.sizes = problem.sizes
    result = run(whole)
    mean = problem.scores(result.best.params["x"])["cross-entropy"].mean()
    assert result.mean(result.best) == pytest.approx(mean, rel=1e-5)
    assert result.best.params["x"] == pytest.approx(0.6, abs=0.15)


def test_a_failing_candidate_fails_alone():
    class Fragile(Problem):
        def __call__(self, params, block):
            if params["x"] > 0.5:
                raise OutputsNotFiniteError("infinities")
            return super().__call__(params, block)

    problem = Fragile(400, best=0.4)
    result = run(problem)
    failed = [r for r in result.trials if r.state == TrialState.FAIL]
    assert {r.params["x"] for r in failed} >= {0.6, 1.0}
    assert all(r.num_blocks == 0 for r in failed)
    assert regret(problem, result) < 0.02  # 400 examples, of which the first round saw few


def test_a_failing_baseline_is_the_models_fault():
    class Broken(Problem):
        def __call__(self, params, block):
            raise OutputsNotFiniteError("infinities")

    with pytest.raises(OutputsNotFiniteError):
        run(Broken(100))


def test_scores_that_are_not_numbers_are_refused():
    class Undefined(Problem):
        def scores(self, x):
            return {name: values + np.nan for name, values in super().scores(x).items()}

    with pytest.raises(BnpatchError, match="cross-entropy is not a finite number"):
        run(Undefined(100))


def test_a_search_does_not_show_a_warning_again():
    class Warns(Problem):
        def __call__(self, params, block):
            warnings.warn("the same", UserWarning, stacklevel=1)
            return super().__call__(params, block)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # once for each place
        run(Warns(300))
    assert [str(warning.message) for warning in caught].count("the same") == 1


def test_enough_passes_make_it_a_plain_search():
    problem = Problem(100)
    result = run(problem, max_passes=float("inf"), max_trials=9)
    assert [r.num_blocks for r in result.trials] == [len(problem.sizes)] * 9
    assert {r.state for r in result.trials} == {TrialState.COMPLETE}
    assert result.passes == 9
    with pytest.raises(BnpatchError, match="nothing bounds"):
        run(problem, max_passes=float("inf"))


@pytest.mark.parametrize("budget", [{"max_passes": 1.0}, {"max_passes": 0.0}, {"max_trials": 1}])
def test_no_budget_leaves_the_baseline(budget):
    result = run(Problem(100), **budget)
    assert [r.params["x"] for r in result.trials] == [0.0]
    assert result.best.state == TrialState.COMPLETE
    assert result.passes == 1


def test_out_of_time_the_baseline_stands():
    assert len(run(Problem(100), timeout=0.0).trials) == 1


def test_two_passes_leave_no_room_to_explore_but_a_trial_to_compare():
    result = run(Problem(100, best=0.1), max_passes=2.0)
    assert result.passes <= 2


def test_the_same_seed_gives_the_same_search():
    first, again, other = (summaries(run(Problem(300), seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_two_parameters():
    class Plane(Problem):
        def __call__(self, params, block):
            moved = {"x": np.hypot(params["x"] - 0.5, params["y"] - 0.2)}
            return super().__call__(moved, block)

    first = [{"x": x, "y": y} for x in (0.2, 0.8) for y in (0.2, 0.8)]
    space = {"x": (0.0, 1.0), "y": (0.0, 2.0)}
    result = run(Plane(1000, best=0.0), space=space, start={"x": 0.0, "y": 0.0}, first=first)
    assert result.passes <= 3
    assert np.hypot(result.best.params["x"] - 0.5, result.best.params["y"] - 0.2) < 0.2


@pytest.mark.slow
def test_optuna_calls_the_same_trial_best_even_among_equals(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = open_study(Storage(url), direction="maximize")
    result = run(Problem(20, steepness=1.0), ACCURACY, study, max_passes=float("inf"), max_trials=7)
    best = optuna.load_study(study_name="bnpatch", storage=url).best_trial
    assert (best.params, best.value) == (result.best.params, result.mean(result.best))
    assert sum(result.mean(trial) == best.value for trial in result.trials if trial.blocks) > 1


class Interrupted(Problem):
    """Ctrl-C while some block is scored."""

    def __init__(self, *args, after):
        super().__init__(*args)
        self.calls, self.after = 0, after

    def __call__(self, params, block):
        self.calls += 1
        if self.calls == self.after:
            raise KeyboardInterrupt
        return super().__call__(params, block)


def test_an_interrupted_search_keeps_the_best_so_far_and_can_go_on():
    whole = run(Problem(300))
    for after in (40, 60, 75):
        study = open_study()
        part = run(Interrupted(300, after=after), study=study)
        assert part.interrupted
        assert part.best.num_blocks == len(block_sizes(300))
        rest = Problem(300)
        result = run(rest, study=study)
        assert summaries(result) == summaries(whole)
        assert not result.interrupted
        assert result.passes - part.passes == pytest.approx(rest.scored / 300)


def test_before_the_baseline_is_scored_there_is_nothing_to_keep():
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(300, after=5))


def test_trials_are_told():
    problem, told = Problem(300), []
    result = run(
        problem,
        on_trial=lambda trial, so_far: told.append((trial, so_far.best.number == trial.number)),
    )
    assert sorted(trial.number for trial, _ in told) == [r.number for r in result.trials]
    assert [trial.number for trial, is_best in told if is_best][-1] == result.best.number
    assert told[0][0].params == {"x": 0.0}


@pytest.mark.parametrize("examples", [1, 7, 8, 100, 257, 5000])
def test_block_sizes_cover_all_examples(examples):
    sizes = block_sizes(examples)
    assert sum(sizes) == examples
    assert max(sizes) - min(sizes) <= 1


def test_what_is_said_of_a_trial_uses_what_is_known_of_the_examples():
    """A trial's scores on some examples say more where those of the baseline are known on all."""
    rng = np.random.default_rng(0)
    hard = rng.exponential(3.0, (8, 20))  # of the baseline: some examples are much harder than others
    errors, gains = [], []
    for _ in range(200):
        base = rng.permutation(hard.ravel()).reshape(8, 20)
        better = 0.1 * base + rng.normal(0.2, 0.05, (8, 20))
        trials = [
            trial(0, {"x": 0.0}, base, TrialState.COMPLETE),
            trial(1, {"x": 0.5}, better[:2], TrialState.PRUNED),
        ]
        config = GlobalSearchConfig([20] * 8, CROSS_ENTROPY, {"x": (0, 1)}, {"x": 0.0})
        comparison = Trials(config, trials)
        change = comparison.change(trials[1])
        truth = (better - base).mean()
        errors.append(change.value - truth)
        gains.append(comparison.difference(trials[1], trials[0]).value - truth)
        assert change.stderr < comparison.difference(trials[1], trials[0]).stderr / 1.5
    assert np.std(errors) < np.std(gains) / 2
    whole = trial(1, {"x": 0.5}, better, TrialState.COMPLETE)
    paired = comparison.difference(whole, trials[0])
    assert comparison.change(whole) == paired


def trial(number, params, blocks, state):
    scores = {block: {"cross-entropy": values} for block, values in enumerate(blocks)}
    return StoredTrial(number, params, 0, scores, state)
