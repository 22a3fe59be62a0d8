from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.trial import TrialState

import bnpatch
from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.search import candidates
from bnpatch.search.candidates import CandidateSearch, _as_trial
from bnpatch.search.global_search import Runner
from bnpatch.search.gradient_search import Course, Groups
from bnpatch.search.score_cache import ScoreCache, blocks_of
from bnpatch.search.standings import Difference


def test_what_is_best_so_far_is_the_best_of_all_global_searches(tiny, dim, monkeypatch):
    monkeypatch.setattr(
        Course, "of", lambda examples, set_size=1: Course(2, 16)
    )  # global searches are looked at
    few, seen = (dim[0][:100], dim[1][:100]), []

    def look(trial, is_best):
        seen.append((trial, is_best))
        if trial.candidate == "alpha":
            assert set(trial.state.weights.alphas.values()) == {trial.weight}

    bnpatch.tune_alpha(tiny, few, metric="cross-entropy", trials=4, on_trial=look)
    assert sum(trial.candidate == "alpha" and trial.number == 0 for trial, _ in seen) == 1  # of no cross-fit
    assert len({trial.candidate for trial, _ in seen}) == 4
    scores = [trial.scores["cross-entropy"] for trial, is_best in seen if is_best]
    assert len(scores) > 2
    assert scores == sorted(set(scores), reverse=True)
    assert {trial.weight for trial, _ in seen if trial.candidate == "refined"} == {None}


def test_a_study_of_other_examples_is_refused(tiny, folder, tmp_path):
    """Scores are kept by place: an image that can be read at last would move all that come after it."""
    data = tmp_path / "val"
    for path in folder.rglob("*.png"):
        copy = data / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = min(data.rglob("*.png"))
    content = broken.read_bytes()
    run = {"granularity": "global", "storage": str(tmp_path / "s.journal"), "trials": 2, "holdout": 0.5}
    broken.write_bytes(b"no image")
    assert bnpatch.tune_alpha(tiny, data, **run).skipped
    broken.write_bytes(content)
    with pytest.raises(BnpatchError, match="made with another examples"):
        bnpatch.tune_alpha(tiny, data, **run)


@pytest.mark.parametrize(
    ("count", "set_size", "blocks"), [(300, 250, 2), (12, 1, 2), (1000, 250, 4), (64, 1, 8)]
)
def test_there_are_examples_to_learn_from_and_others_to_choose_by(count, set_size, blocks):
    order = np.random.default_rng(0).permutation(count)
    found = blocks_of(order, set_size)
    assert len(found) == blocks
    assert np.concatenate(found).tolist() == order.tolist()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_learning_makes_do_with_the_memory_there_is(tiny, dim, monkeypatch, where):
    forward, backward, sizes = type(tiny).forward, torch.autograd.backward, []

    def limited_forward(self, x):
        sizes.append(len(x) if torch.is_grad_enabled() else 0)
        if where == "forward" and sizes[-1] > 40:
            raise NotEnoughMemoryError("cuda", len(x))
        return forward(self, x)

    def limited_backward(*args, **kwargs):
        if where == "backward" and sizes[-1] > 40:
            raise torch.OutOfMemoryError
        backward(*args, **kwargs)

    monkeypatch.setattr(type(tiny), "forward", limited_forward)
    monkeypatch.setattr(torch.autograd, "backward", limited_backward)
    result = bnpatch.tune_alpha(tiny, dim, metric="cross-entropy", granularity="layer")
    learned = next(candidate for candidate in result.candidates if candidate.name == "alpha per layer")
    assert len(set(learned.weights.alphas.values())) == 3
    tried = [size for size in sizes if size]
    assert max(tried) > 40
    assert 20 < max(tried[-20:]) <= 40


def test_an_image_that_is_lost_on_the_way_is_named():
    class Lost:
        set_size = 1

        def scores(self, model, examples, indices):
            examples.skipped[7] = "no such file"
            return {"accuracy": np.ones(len(indices) - 1)}

    examples = SimpleNamespace(skipped={}, source=SimpleNamespace(name=lambda index: f"{index}.png"))
    model = SimpleNamespace(state=PatchState(), set_state=lambda state: None)
    weights = PatchWeights()
    board = ScoreCache(model, examples, Lost(), [np.arange(5), np.arange(5, 10)], lambda label, count: None)
    with pytest.raises(BnpatchError, match=r"7\.png can't be read any more: no such file"):
        board.on(range(2), weights, "", "accuracy")


def test_other_targets_change_the_scores_of_lambdas_alone():
    class Counts:
        set_size, asked = 1, 0

        def scores(self, model, examples, indices):
            self.asked += 1
            return {"score": np.full(len(indices), float(self.asked))}

    judge, examples = Counts(), SimpleNamespace(skipped={})
    model = SimpleNamespace(state=PatchState(), set_state=lambda state: None)
    board = ScoreCache(model, examples, judge, [np.arange(5)], lambda label, count: None)
    plain, weighted = PatchWeights({"a": 0.5}, {"a": 0.0}), PatchWeights({"a": 0.5}, {"a": 0.5})

    def seen(weights):
        return board.on(range(1), weights, "", "score")[0]

    assert [seen(plain), seen(weighted), seen(plain), seen(weighted)] == [1, 2, 1, 2]
    board.use(PatchState())
    assert [seen(plain), seen(weighted)] == [1, 3]


def test_what_few_examples_say_of_a_rate_is_still_a_rate():
    change = {name: Difference(0.4, 0.1, 8) for name in ("accuracy", "cross-entropy")}
    runner = Runner(1, {"sqrt_alpha": 0.5}, 1, TrialState.PRUNED, {}, change)
    trial = _as_trial("alpha", runner, {"accuracy": 0.8, "cross-entropy": 0.8}, [8, 8])
    assert trial.scores == {"accuracy": 1.0, "cross-entropy": pytest.approx(1.2)}
    assert trial.weight == 0.25


class Learner(CandidateSearch):
    """Learns nothing but one weight, of which less is better."""

    def __init__(self, outcomes, identities, set_size=250, hurry=False):
        self.judge = SimpleNamespace(set_size=set_size)
        self.selection = SimpleNamespace(cost=lambda weights, label: weights.alphas["b"])
        self.interrupted, self.outcomes, self.starts = False, iter(outcomes), []
        self._identities, self._out_of_time = identities, lambda: hurry

    def _by_gradient(self, start, groups):
        self.starts.append(start)
        outcome = next(self.outcomes)
        if outcome is None:
            raise KeyboardInterrupt
        return PatchWeights({**start.alphas, "b": outcome}, start.lambdas)


RACED = PatchWeights({"a": 0.4, "b": 0.4, "gn": 1.0, "c": 0.4}, {"a": 1.0, "b": 1.0})
IDENTITIES = {"a": 0.0, "b": 0.0, "gn": 1.0, "c": 0.0}
LAMBDAS = {"a": "a", "b": "b"}


@pytest.fixture
def two_more_places(monkeypatch):
    monkeypatch.setattr(candidates, "_OTHER_STARTS", ((0.1, 0.1), (0.8, 0.2)))


def test_without_labels_learning_begins_at_several_places(two_more_places):
    """And the valley that is lowest by the selection examples is kept."""
    groups = Groups({"a": "a", "b": "b", "gn": "gn"}, LAMBDAS)
    learner = Learner([0.3, 0.1, 0.2], IDENTITIES)
    assert learner._from_places(learner._by_gradient, RACED, groups).alphas["b"] == 0.1
    found_globally, flat, falling = learner.starts
    assert found_globally == RACED
    assert flat == PatchWeights({"a": 0.1, "b": 0.1, "gn": 1.0, "c": 0.4}, {"a": 0.5, "b": 0.5})
    assert falling.alphas == pytest.approx({"a": 0.8, "b": 0.6, "gn": 1.0, "c": 0.4})
    stages = Groups({"a": "s", "b": "s", "c": "s"}, LAMBDAS)
    learner = Learner([0.3, 0.3, 0.3], IDENTITIES)
    learner._from_places(learner._by_gradient, RACED, stages)
    assert {name: learner.starts[2].alphas[name] for name in "abc"} == dict.fromkeys("abc", 0.8)


def test_one_place_is_enough_with_labels_for_alphas_alone_and_where_all_are_the_same(two_more_places):
    groups = Groups({"a": "a", "b": "b"}, LAMBDAS)
    for learner, some in (
        (Learner([0.3], IDENTITIES, set_size=1), groups),
        (Learner([0.3], IDENTITIES), Groups(groups.alphas, {})),
        (Learner([0.3], IDENTITIES, hurry=True), groups),
    ):
        assert learner._from_places(learner._by_gradient, RACED, some).alphas["b"] == 0.3
        assert len(learner.starts) == 1
    learner = Learner([0.3, 0.2], dict.fromkeys(IDENTITIES, 1.0))
    assert learner._from_places(learner._by_gradient, RACED, groups).alphas["b"] == 0.2
    assert len(learner.starts) == 2  # Group Norm stays where it is


def test_an_interrupt_at_a_further_place_keeps_what_was_learned(two_more_places):
    learner, groups = Learner([0.3, None], IDENTITIES), Groups({"a": "a", "b": "b"}, LAMBDAS)
    assert learner._from_places(learner._by_gradient, RACED, groups).alphas["b"] == 0.3
    assert learner.interrupted


@pytest.mark.parametrize(("kind", "find"), [("torch", "learn"), ("onnx", "coordinate_search")])
def test_both_ways_to_find_weights_begin_at_several_places(
    tiny, tiny_onnx, dim, two_more_places, monkeypatch, kind, find
):
    starts = []

    def found(*args, **options):
        starts.append(options["start"] if find == "learn" else args[1])
        return starts[-1]

    monkeypatch.setattr(candidates, find, found)
    model = tiny if kind == "torch" else bnpatch.load(tiny_onnx)
    run = {"metric": "unlabeled", "granularity": "layer", "recalibrate": True, "trials": 2}
    bnpatch.tune_alpha(model, dim[0][:60], test_data=dim[0][60:120], **run)
    assert len(starts) == 1 + 3  # alphas; both weights, from three places
    assert set(starts[2].lambdas.values()) == {0.5}
