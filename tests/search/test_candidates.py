import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from optuna.trial import TrialState

import bnpatch
from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.nn.functional import mixture
from bnpatch.search.config import Plan
from bnpatch.search.coordinate_search import TRIED_SLOPES
from bnpatch.search.gradient_search import Start
from bnpatch.search.layer_search import LayerSearch
from bnpatch.search.progress import Budget
from bnpatch.search.score_cache import ScoreCache, blocks_of
from bnpatch.search.trials import GlobalSearchConfig, StoredTrial, Trials, as_trial
from tests.search.tiny import WIDTHS


@pytest.mark.slow
def test_what_is_best_so_far_is_the_best_of_all_global_searches(tiny, dim):
    few, seen = (dim[0][:100], dim[1][:100]), []

    def look(trial, is_best):
        seen.append((trial, is_best))
        if trial.candidate == "alpha":
            assert set(trial.state.weights.alphas.values()) == {trial.weight}

    bnpatch.tune_alpha(tiny, few, metric="cross-entropy", trials=4, on_trial=look)
    assert sum(trial.candidate == "alpha" and trial.number == 0 for trial, _ in seen) == 1  # of no cross-fit
    assert {trial.candidate for trial, _ in seen} >= {"alpha", "lambda", "lambda, alpha"}
    scores = [trial.scores["cross-entropy"] for trial, is_best in seen if is_best]
    assert len(scores) > 2
    assert scores == sorted(set(scores), reverse=True)
    assert {trial.weight for trial, _ in seen if trial.candidate == "refined"} <= {None}


def test_a_study_of_other_examples_is_refused(tiny, folder, tmp_path):
    """Scores are kept by place: an image that can be read at last would move all that come after it."""
    data = tmp_path / "val"
    for path in folder.rglob("*.png"):
        copy = data / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    broken = min(data.rglob("*.png"))
    content = broken.read_bytes()
    run = {"granularity": "global", "storage": f"sqlite:///{tmp_path}/s.db", "trials": 2, "holdout": 0.5}
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


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_learning_makes_do_with_the_memory_there_is(tiny, dim, monkeypatch, where):
    forward, backward, sizes = type(tiny).forward, torch.autograd.backward, []

    def limited_forward(self, x):
        sizes.append(len(x) if torch.is_grad_enabled() else 0)
        if where == "forward" and sizes[-1] > 10:
            raise NotEnoughMemoryError("cuda", len(x))
        return forward(self, x)

    def limited_backward(*args, **kwargs):
        if where == "backward" and sizes[-1] > 10:
            raise torch.OutOfMemoryError
        backward(*args, **kwargs)

    monkeypatch.setattr(type(tiny), "forward", limited_forward)
    monkeypatch.setattr(torch.autograd, "backward", limited_backward)
    result = bnpatch.tune_alpha(tiny, dim, metric="cross-entropy", granularity="layer", trials=2)
    learned = next(candidate for candidate in result.candidates if candidate.name == "alpha per layer")
    assert len(set(learned.weights.alphas.values())) == 3
    tried = [size for size in sizes if size]
    assert max(tried) > 10
    assert 5 < max(tried[-20:]) <= 10


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
    """On the first half the trial gains 0.5 over the baseline, whose mean is 0.5 there and 1 on the rest."""
    base, found = [np.tile([0.0, 1.0], 4), np.ones(8)], [np.ones(8)]

    def trial_of(number, alpha, values, state):
        blocks = {block: {"accuracy": v, "cross-entropy": v} for block, v in enumerate(values)}
        return StoredTrial(number, {"alpha": alpha}, 0, blocks, state)

    config = GlobalSearchConfig([8, 8], ACCURACY, {"alpha": (0.0, 1.0)}, {"alpha": 0.0})
    baseline = trial_of(0, 0.0, base, TrialState.COMPLETE)
    pruned = trial_of(1, 0.25, found, TrialState.PRUNED)
    trial = as_trial("alpha", pruned, Trials(config, [baseline, pruned]))
    assert trial.scores["accuracy"] == 1.0
    assert trial.scores["cross-entropy"] > 1.1
    assert trial.examples == 8
    assert trial.weight == 0.25


def starts_of(tiny, found, *, recalibrate=True, set_size=1, few=False):
    """Where a search per layer starts."""
    target = tiny.state.with_re_estimated(
        {name: Moments(np.zeros(c), np.ones(c)) for name, c in zip(tiny.alphas(), WIDTHS, strict=True)}
    )
    search = LayerSearch.__new__(LayerSearch)
    search._baseline_alphas = tiny.baseline_alphas()
    search._cache = SimpleNamespace(base=target if recalibrate else tiny.state, has_few_blocks=few)
    search._objective = SimpleNamespace(set_size=set_size)
    search._plan = Plan(recalibrate=recalibrate)
    return search._starts(found, {name: name for name in tiny.alphas()})


@pytest.mark.parametrize("recalibrate", [True, False])
def test_learning_starts_at_several_places(tiny, recalibrate):
    """From what one weight for all found, a small weight, a ramp, and with lambdas of a half and of 1."""
    names, zeros = list(tiny.alphas()), dict.fromkeys(tiny.alphas(), 0.0)
    baseline = PatchWeights(zeros, zeros, zeros)
    nothing = {"baseline": baseline, "alpha": baseline, "lambda, alpha": baseline}
    starts = starts_of(tiny, nothing, recalibrate=recalibrate)
    ramp = {name: pytest.approx(alpha) for name, alpha in zip(names, (0.8, 0.425, 0.05), strict=True)}
    assert [start.weights.alphas for start in starts[:2]] == [dict.fromkeys(names, 0.01), ramp]
    assert not any(start.groups.get("lambda") for start in starts[:2])
    assert [set(start.weights.lambdas.values()) for start in starts[2:]] == [{0.5}, {1.0}][: 2 * recalibrate]
    assert all(start.groups.get("lambda") for start in starts[2:])
    both = PatchWeights(dict.fromkeys(names, 0.3), dict.fromkeys(names, 0.7), zeros)
    first, *others = starts_of(tiny, nothing | {"lambda, alpha": both})
    assert first.weights == both
    assert first.groups.get("lambda")
    assert len(others) == 4


@pytest.mark.parametrize(
    ("few", "set_size", "recalibrate", "number"),
    [(True, 250, True, 2), (True, 250, False, 2), (True, 1, True, 4), (False, 250, True, 4)],
)
def test_starts_without_lambdas_are_left_out_where_each_costs_passes(
    tiny, few, set_size, recalibrate, number
):
    zeros = dict.fromkeys(tiny.alphas(), 0.0)
    nothing = dict.fromkeys(("baseline", "alpha", "lambda, alpha"), PatchWeights(zeros, zeros, zeros))
    starts = starts_of(tiny, nothing, recalibrate=recalibrate, set_size=set_size, few=few)
    assert len(starts) == number
    assert all(start.groups.get("lambda") for start in starts) == (number == 2 and recalibrate)


@pytest.mark.parametrize(
    ("costs", "set_size", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.1, 9.0], 1, [1, 2]),
        ([4.0, 3.0, 5.0, 4.0, 3.5], 1, [1]),
        ([3.0, 1.0, math.inf, math.inf, 3.0], 1, [1]),
        ([0.5, 0.1, 0.3, 0.2, 0.4], 1, [1, 3, 2, 4]),
        ([9.0, 9.5, 9.9, 9.1, 9.2], 1, [0]),
        ([3.0, 1.0, 2.0, 2.1, 9.0], 250, [0, 1, 2, 3, 4]),
    ],
)
def test_learning_does_not_start_where_the_baseline_is_better(costs, set_size, kept):
    baseline, *others = (PatchWeights({"norm": alpha}, {}, {}) for alpha in range(6))
    by_alpha, scored = dict(enumerate([2.0, *costs])), []

    def cost(weights, label):
        scored.append(by_alpha[weights.alphas["norm"]])
        return scored[-1]

    def at_once_worse(weights, than):
        return by_alpha[weights.alphas["norm"]] > by_alpha[than.alphas["norm"]] + 6

    search = LayerSearch.__new__(LayerSearch)
    search._objective, search._keep = SimpleNamespace(set_size=set_size), None
    search._selection = SimpleNamespace(cost=cost, at_once_worse=at_once_worse)
    starts = [Start(weights, {}) for weights in others]
    assert search._promising(starts, baseline) == [starts[number] for number in kept]
    assert max(scored, default=0) < 8 or min(costs) > 8  # what few examples refute is not scored on all


def test_weights_without_slopes_are_the_means_of_those_with(tiny, dim):
    """Half of the images are far away at the first norm, and have another weight there."""
    images = np.concatenate([dim[0][:32], 255 - dim[0][:32]])
    examples = bnpatch.open_examples((images, np.zeros(64, int)), tiny)
    names = list(tiny.alphas())
    zeros = dict.fromkeys(names, 0.0)
    offsets = zeros | {names[0]: -2.0}
    weights = PatchWeights(dict.fromkeys(names, 0.2), zeros, zeros | {names[0]: 1.0}, offsets)
    search = LayerSearch.__new__(LayerSearch)
    search._model, search._examples, search._indices = tiny, examples, np.arange(64)
    search._cache, search._budget = SimpleNamespace(base=tiny.state), Budget(None)
    found = search._without_slopes(weights, {name: name for name in names})
    tiny.set_weights(weights)
    layer, used, weight = tiny.module[1], [], weights.example_weight(names[0])
    with torch.inference_mode():
        x = next(examples.batches(64)).x
        layer.register_forward_pre_hook(
            lambda layer, args: used.append(
                mixture(args[0], Moments(*layer.parameters_of_norm()[2:]), layer.eps, weight).weight
            )
        )
        tiny.predict(x)
    assert found.alphas[names[0]] == pytest.approx(used[0].mean().item(), rel=1e-4)
    assert found.alphas[names[0]] != pytest.approx(0.2, rel=0.01)
    assert (found.alphas[names[1]], found.slopes, found.var_offsets) == (0.2, zeros, offsets)


@pytest.mark.slow
def test_an_onnx_file_learns_by_the_gradients_of_a_copy_in_torch(tiny, tiny_onnx, dim):
    options = {"metric": "cross-entropy", "granularity": "layer"}
    by_torch, by_onnx = (bnpatch.tune_alpha(m, dim, **options) for m in (tiny, bnpatch.load(tiny_onnx)))
    assert by_onnx.passes == by_torch.passes
    for one, other in zip(by_onnx.candidates, by_torch.candidates, strict=True):
        assert one.name == other.name
        assert one.weights.alphas == pytest.approx(other.weights.alphas, abs=0.01)  # rounding differs
        assert one.weights.var_offsets == pytest.approx(other.weights.var_offsets, abs=0.05)
        assert any(one.weights.var_offsets.values()) is ("per layer" in one.name or one.name == "refined")


def in_numpy(outputs, targets):
    return torch.from_numpy((outputs.numpy().argmax(1) == targets.numpy()).astype(np.float32))


@pytest.mark.parametrize(
    ("score", "learns"),
    [
        (lambda outputs, targets: (outputs.argmax(1) == targets).float(), False),
        (in_numpy, False),
        (lambda outputs, targets: outputs.softmax(1)[torch.arange(len(targets)), targets], True),
    ],
    ids=["counts", "leaves torch", "has a gradient"],
)
def test_without_a_gradient_few_examples_find_no_weight_per_layer(tiny, dim, score, learns):
    few, others = ((dim[0][part], dim[1][part]) for part in (slice(100), slice(100, 130)))
    options = {"test_data": others, "trials": 1, "recalibrate": False, "slopes": False}
    found = bnpatch.tune_alpha(tiny, few, metric=bnpatch.Metric("mine", score), **options)
    assert ("alpha per layer" in {candidate.name for candidate in found.candidates}) is learns


@pytest.mark.slow
def test_without_gradients_an_onnx_file_gets_slopes_by_coordinates(tiny_onnx, dim, monkeypatch):
    monkeypatch.setattr("bnpatch.models.onnx_model.OnnxModel.with_gradients", lambda model, x: None)
    result = bnpatch.tune_alpha(bnpatch.load(tiny_onnx), dim, metric="cross-entropy", granularity="layer")
    names = [candidate.name for candidate in result.candidates]
    assert names[:4] == ["baseline", "alpha", "alpha per layer", "alpha and slope per layer"]
    constant, varying = result.candidates[2:4]
    assert varying.weights.alphas == constant.weights.alphas
    assert set(varying.weights.slopes.values()) <= set(TRIED_SLOPES)


@pytest.mark.parametrize("metric", [ACCURACY, CROSS_ENTROPY])
def test_weights_are_changed_by_scores_of_which_the_higher_is_better(metric):
    search = LayerSearch.__new__(LayerSearch)
    search._objective, search._selection = SimpleNamespace(set_size=1), SimpleNamespace(step_metric=metric)
    search._cache = SimpleNamespace(of=lambda indices, weights, label: {metric.name: indices + 1.0})
    assert search._scores(PatchWeights(), np.arange(2)).tolist() == [metric.sign, 2 * metric.sign]
