import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.search import objective, tune
from bnpatch.search.cross_fit import Searches
from bnpatch.search.gradient_search import Course
from bnpatch.search.held_out import scores
from bnpatch.search.label_free import Seen, infomax, unlabeled_step
from bnpatch.search.latency_limit import Choice
from bnpatch.search.objective import LabelledObjective, ObjectiveSpec
from tests.closed_form import contrast
from tests.search.tiny import Opposites, of_one_norm, small


@pytest.fixture(scope="module")
def tuned(checkpoint, foggy):
    """One weight for all."""
    return bnpatch.tune_alpha(bnpatch.load(checkpoint), foggy, granularity="global")


@pytest.fixture(scope="module")
def searched(tiny_module, dim):
    """All candidates, of the tiny classifier."""
    return bnpatch.tune_alpha(tiny_module, dim, metric="cross-entropy")


def test_one_alpha_gains_under_a_shift(tuned):
    assert str(tuned.verdict) == "gain"
    assert [candidate.name for candidate in tuned.candidates] == ["identity", "alpha"]
    assert tuned.chosen.name == "alpha"
    accuracy = tuned.comparisons[0]
    assert accuracy.metric.name == "accuracy"
    # Ten seeds of the classifier gained 21 to 36 points, of deviation 5, with an alpha of 0.12 to 0.42.
    assert accuracy.after.value > accuracy.before.value + 0.08
    assert 0.01 < tuned.alpha < 0.9
    assert tuned.num_tuning == tuned.num_held_out == 300
    assert tuned.verdict.flips.gained - tuned.verdict.flips.lost == round(300 * accuracy.change.value)
    assert tuned.verdict.classes.shape == (3, 300)


def test_one_alpha_costs_at_most_three_passes(tuned):
    assert 2 < tuned.passes <= 3
    assert tuned.trials[0].weight == 0
    assert tuned.trials[0].examples == 300
    assert set(tuned.trials[0].scores) == {"accuracy", "cross-entropy", "top5"}
    best = max((t for t in tuned.trials if t.examples == 300), key=lambda t: t.scores["accuracy"])
    assert tuned.alpha == best.weight


def test_other_candidates_go_beyond_one_alpha(searched, tiny, plain, dim):
    names = [candidate.name for candidate in searched.candidates]
    assert names[:6] == [
        "identity",
        "alpha",
        "lambda",
        "lambda, alpha",
        "lambda and alpha per layer",
        "lambda, alpha and slope per layer",
    ]
    means = {candidate.name: candidate.mean for candidate in searched.candidates}
    assert searched.chosen.mean == min(means.values())
    assert max(means[name] for name in names[4:6]) < 0.5 * means["alpha"]
    tuning, _ = bnpatch.data.dataset.split(dim[1].astype(np.int64), 0.5, seed=0)
    examples = bnpatch.open_examples(dim, tiny)
    with tiny.borrowed():  # a global search compares on all tuning examples
        tiny.set_state(
            tiny.state.with_re_estimated(
                re_estimate_statistics(tiny, examples, indices=tuning, batch_size=250)
            )
        )
        found_globally = []
        for candidate in searched.candidates[:4]:
            tiny.set_weights(candidate.weights)
            found_globally.append(evaluate(tiny, examples, indices=tuning).mean(CROSS_ENTROPY))
    identity, one_alpha, one_lambda, both = found_globally
    assert one_alpha < 0.5 * identity  # ten seeds: 0.11 to 0.29 of it, on part of these examples
    assert one_lambda < 0.3 * identity  # ten seeds: at most 0.10
    assert both < one_lambda * (1 + 1e-4)
    # Lambda alone undoes contrast: what is gained is all that was lost, and one alpha does not reach it.
    found = {c.metric.name: c.after.value for c in searched.comparisons}
    without_loss = held_out_scores(tiny, plain)
    one_alpha = held_out_scores(tiny, dim, searched.candidates[1].weights)
    lost = searched.comparisons[0].before.value - without_loss.mean(CROSS_ENTROPY)
    assert found["cross-entropy"] - without_loss.mean(CROSS_ENTROPY) < 0.15 * lost  # ten seeds: at most 0.04
    assert found["accuracy"] > without_loss.mean(ACCURACY) - 0.1  # ten seeds: at most 0.04 less
    assert found["cross-entropy"] < 0.9 * one_alpha.mean(CROSS_ENTROPY)  # ten seeds: 0.27 to 0.54 of it
    assert searched.verdict.calibration.change.high < 0


def held_out_scores(model, data, weights=None):
    """Of the half that a search of this data leaves to the verdict."""
    _, held_out = bnpatch.data.dataset.split(data[1].astype(np.int64), 0.5, seed=0)
    examples = bnpatch.open_examples(data, model)
    with model.borrowed():
        model.set_weights(weights or model.weights)
        return evaluate(model, examples, indices=held_out)


def test_scores_are_those_of_the_patched_model(model, foggy, tuned):
    """The same numbers by hand: no search, no cache, no batches."""
    _, held_out = bnpatch.data.dataset.split(foggy[1].astype(np.int64), 0.5, seed=0)
    module = bnpatch.patch(model.module, tuned.alpha).eval()
    with torch.inference_mode():
        logits = module(torch.from_numpy(foggy[0][held_out])[:, None].float() / 127.5 - 1)
    correct = (logits.argmax(1).numpy() == foggy[1][held_out]).mean()
    assert tuned.comparisons[0].after.value == pytest.approx(correct, abs=1e-12)


def test_a_recipe_applied_gives_what_the_verdict_says(tiny, dim, searched):
    path_free = bnpatch.Recipe.from_json(json.loads(json.dumps(searched.recipe.to_json())))
    tiny.apply(path_free)
    scores = held_out_scores(tiny, dim)
    assert scores.mean(CROSS_ENTROPY) == pytest.approx(searched.comparisons[0].after.value, rel=1e-5)


def test_is_reproducible(tiny, dim):
    first, again, other = (
        bnpatch.tune_alpha(tiny, dim, granularity="global", seed=seed) for seed in (0, 0, 1)
    )
    assert [(t.weight, t.examples) for t in again.trials] == [(t.weight, t.examples) for t in first.trials]
    assert other.trials[0].scores != first.trials[0].scores  # of other examples


@pytest.mark.parametrize("granularity", ["global", "layer"])
def test_the_search_never_sees_the_held_out_part(tiny, dim, granularity, monkeypatch):
    seen, learned = set(), set()
    scores, loss = LabelledObjective.scores, LabelledObjective.loss
    verdict = []

    def spy_scores(self, model, examples, indices):
        if len(self.metrics) > 3:  # the verdict scores confidence, too
            verdict.extend(indices.tolist())
        else:
            seen.update(indices.tolist())
        return scores(self, model, examples, indices)

    def spy_loss(self, model, batches):
        learned.update(index for batch in batches for index in batch.indices.tolist())
        return loss(self, model, batches)

    monkeypatch.setattr(LabelledObjective, "scores", spy_scores)
    monkeypatch.setattr(LabelledObjective, "loss", spy_loss)
    result = bnpatch.tune_alpha(tiny, dim, granularity=granularity, holdout=0.25)
    assert len(seen) == result.num_tuning == 450
    assert not (seen | learned) & set(verdict)
    assert len(set(verdict)) == result.num_held_out == 150
    if (
        granularity == "layer"
    ):  # what learning is stopped by and candidates are chosen by, it does not learn from
        assert 250 < len(learned) < 350


def test_the_model_is_left_as_it_was(tiny, dim):
    types = [type(m) for m in tiny.module.modules()]
    state = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    bnpatch.tune_alpha(tiny, dim, metric="cross-entropy")
    assert [type(m) for m in tiny.module.modules()] == types
    module = tiny.module.train()
    bnpatch.tune_alpha(module, _floats(dim), granularity="global")
    assert [type(m) for m in module.modules()] == types
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def _floats(data):
    return data[0][:, None].astype(np.float32) / 127.5 - 1, data[1]


def test_a_module_and_a_metric_of_ones_own(tiny, dim):
    def margin(outputs, targets):
        return outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)

    result = bnpatch.tune_alpha(tiny.module, _floats(dim), metric=margin, granularity="layer")
    assert result.metric.name == "margin"
    assert result.chosen.mean == max(candidate.mean for candidate in result.candidates)
    assert result.candidates[2].mean > result.candidates[1].mean  # the metric itself has a gradient


def test_test_data_gives_the_verdict(tiny, dim, plain):
    own_answers = plain[0], answers(tiny, plain[0]).argmax(1).numpy()
    result = bnpatch.tune_alpha(tiny, dim, test_data=own_answers, granularity="global")
    assert (result.num_tuning, result.num_held_out) == (600, 600)
    assert result.comparisons[0].before.value == 1  # any patch can but lose
    assert str(result.verdict) == "loss"
    assert result.alpha == 0
    assert any("on held-out examples; not applied" in note for note in result.notes)


def answers(model, images):
    with torch.inference_mode():
        return model.forward(torch.from_numpy(images)[:, None].float() / 127.5 - 1)


def drawn_labels(model, images, seed=0):
    """Classes as the model expects them, by its own probabilities: no other answers are truly better."""
    chances = answers(model, images).double().softmax(1).cumsum(1).numpy()
    return (np.random.default_rng(seed).random((len(images), 1)) > chances[:, :-1]).sum(1)


def test_no_gain_is_claimed_where_there_is_none(tiny, plain):
    """Seeded null cases: a gain of the model as it is over any patch of it is real, the opposite never is."""
    images = plain[0][:400]
    with torch.no_grad():
        for parameter in tiny.module[-1].parameters():
            parameter.mul_(0.2)  # unsure: which labels are drawn is much of what a search sees
    claims, ends = 0, []
    for seed in range(10):
        data = images, drawn_labels(tiny, images, seed)
        result = bnpatch.tune_alpha(tiny, data, granularity="global", trials=5, seed=seed)
        claims += str(result.verdict) == "gain"
        ends.append(result.alpha)
    assert claims <= 1  # ten seeds: none of 20
    assert np.median(ends) < 0.02


def test_all_candidates_claim_no_gain_where_there_is_none(tiny, plain):
    result = bnpatch.tune_alpha(tiny, (plain[0], drawn_labels(tiny, plain[0])))
    assert str(result.verdict) != "gain"


def test_a_tie_goes_to_the_identity(tiny, plain):
    result = bnpatch.tune_alpha(
        tiny, plain, metric=lambda outputs, targets: torch.ones(len(targets)), granularity="layer"
    )
    assert result.alpha == 0
    assert result.chosen.name == "identity"
    assert str(result.verdict) == "no significant change"
    assert result.comparisons[0].change.value == 0


def test_chance_is_warned_of(tiny, dim):
    with pytest.warns(BnpatchWarning, match="and chance is 10.0%"):
        bnpatch.tune_alpha(tiny, (dim[0], (dim[1] + 1) % 10), granularity="global", max_passes=1)


def test_few_examples_take_turns_in_being_held_out(tiny, dim, monkeypatch):
    seen, judged = set(), []
    scores, loss, begin = LabelledObjective.scores, LabelledObjective.loss, Searches._begin

    def spy_begin(*args):
        seen.clear()
        return begin(*args)

    def spy_scores(self, model, examples, indices):
        if len(self.metrics) > 3:  # the verdict scores confidence, too
            judged.append(set(indices.tolist()))
            assert not judged[-1] & seen  # by the search that judges this part
        else:
            seen.update(indices.tolist())
        return scores(self, model, examples, indices)

    def spy_loss(self, model, batches):
        seen.update(index for batch in batches for index in batch.indices.tolist())
        return loss(self, model, batches)

    monkeypatch.setattr(Searches, "_begin", spy_begin)
    monkeypatch.setattr(LabelledObjective, "scores", spy_scores)
    monkeypatch.setattr(LabelledObjective, "loss", spy_loss)
    result = bnpatch.tune_alpha(
        tiny, (dim[0][:100], dim[1][:100]), metric="cross-entropy", granularity="layer", trials=4
    )
    assert set.union(*judged) == set(range(100))
    assert result.num_tuning == result.num_held_out == 100
    assert any("cross-fitting" in note for note in result.notes)
    assert str(result.verdict) == "gain"
    assert result.verdict.classes.shape == (3, 100)


def test_a_verdict_on_few_examples_says_so(tiny, dim):
    run = {"granularity": "global", "trials": 2}
    tuning, judging = ((dim[0][part], dim[1][part]) for part in (slice(100), slice(100, 120)))
    result = bnpatch.tune_alpha(tiny, tuning, test_data=judging, **run)
    assert "20 examples judged: so few say little" in result.notes
    result = bnpatch.tune_alpha(tiny, tuning, test_data=(dim[0][100:200], dim[1][100:200]), **run)
    assert "below 300 examples the interval of the cross-entropy is rough" in result.notes


def test_stages_share_a_weight(model, foggy, monkeypatch):
    monkeypatch.setattr(Course, "of", lambda examples, starts, set_size=1: Course(32, 2, 4))
    some = foggy[0][:200], foggy[1][:200]
    result = bnpatch.tune_alpha(model, some, metric="cross-entropy", granularity="stage", trials=2)
    candidate = next(candidate for candidate in result.candidates if candidate.name == "alpha per stage")
    shapes = model.norm_shapes()
    by_stage = {}
    for name, alpha in candidate.weights.alphas.items():
        by_stage.setdefault(shapes[name], set()).add(alpha)
    assert all(len(values) == 1 for values in by_stage.values())
    assert len(by_stage) > 3


def test_sites_of_a_single_value_are_left_at_their_identity(model, foggy, monkeypatch):
    monkeypatch.setattr(Course, "of", lambda examples, starts, set_size=1: Course(32, 2, 4))
    some = foggy[0][:200], foggy[1][:200]
    result = bnpatch.tune_alpha(model, some, metric="cross-entropy", granularity="layer", trials=2)
    shapes = model.norm_shapes()
    single = [name for name, shape in shapes.items() if shape == (1, 1)]
    assert single
    learned = next(candidate for candidate in result.candidates if candidate.name == "alpha per layer")
    identity = result.candidates[0].weights
    assert learned.weights != identity
    kept = {learned.weights.alphas[name] for name in single}
    assert len(kept) == 1  # what they have in the start that was the best


def test_a_study_goes_on_where_it_was(tiny, dim, tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    run = {"granularity": "layer", "storage": storage, "metric": "cross-entropy"}
    some = dim[0][:300], dim[1][:300]
    first = bnpatch.tune_alpha(tiny, some, **run)
    again = bnpatch.tune_alpha(tiny, some, **run)
    assert again.weights == first.weights
    assert again.trials == first.trials
    assert again.passes < first.passes / 3  # hardly anything is scored or learned again
    with pytest.raises(BnpatchError, match="made with another metric"):
        bnpatch.tune_alpha(tiny, some, **run | {"metric": "entropy"})
    with pytest.raises(BnpatchError, match="made with another data"):
        bnpatch.tune_alpha(tiny, (dim[0][:250], dim[1][:250]), **run)


@pytest.mark.filterwarnings("ignore:of .* near-copies")  # they are eight images with some noise
@pytest.mark.parametrize("make", ["torch", "onnx"])
def test_each_layer_gets_the_weight_that_it_needs(make, tmp_path):
    """With gradients, and without."""
    module = Opposites().eval()
    x, y = module.examples(600)
    model = bnpatch.load(module)
    if make == "onnx":
        bnpatch.export_onnx(model, tmp_path / "model.onnx", torch.from_numpy(x[:2]))
        model = bnpatch.load(tmp_path / "model.onnx")
    result = bnpatch.tune_alpha(model, (x, y), metric="cross-entropy", recalibrate=False)
    means = {candidate.name: candidate.mean for candidate in result.candidates}
    assert means["alpha per layer"] < 0.5 * means["alpha"] < 0.5 * means["identity"]
    assert result.weights.alphas == pytest.approx({"keep": 0.0, "remove": 1.0}, abs=0.1)
    assert str(result.verdict) == "gain"


def share_given_back(model, data, seen, result):
    """Of the accuracy that is lost between two data sets, the share that a recipe gives back."""
    without_loss, before = (evaluate(model, bnpatch.open_examples(some, model)) for some in (data, seen))
    model.apply(result.recipe)
    after = evaluate(model, bnpatch.open_examples(seen, model)).mean(ACCURACY)
    return (after - before.mean(ACCURACY)) / (without_loss.mean(ACCURACY) - before.mean(ACCURACY))


def test_labels_are_not_needed(digits, plain, monkeypatch):
    """The only norm is of the image, so that lambda undoes contrast, and there is no local minimum."""
    monkeypatch.setattr(objective, "SELF_LABELLED_SETS", 1)
    model = bnpatch.load(of_one_norm(small(digits[0][0]), digits[0][1]))
    dim = contrast(plain[0], 0.4), plain[1]
    result = bnpatch.tune_alpha(model, dim[0], metric="unlabeled", trials=4)
    assert result.comparisons[0].metric.name == "unlabeled"
    assert result.verdict.flips is None
    assert share_given_back(model, plain, dim, result) > 0.95  # 0.98 to 1.00, at contrasts from 0.3 to 0.6


def test_several_norms_are_tuned_without_labels(tiny, plain, dim, monkeypatch):
    monkeypatch.setattr(objective, "SELF_LABELLED_SETS", 1)
    result = bnpatch.tune_alpha(tiny, dim[0], metric="unlabeled", trials=4)
    assert result.verdict.changed > 100  # of 300; ten seeds: 179 to 211
    assert share_given_back(tiny, plain, dim, result) > 0.4  # ten seeds: 0.68 to 1.00, of deviation 0.11


@pytest.mark.parametrize("count", [150, 300])
def test_few_images_without_labels_cost_at_most_forty_passes(tiny, dim, count):
    result = bnpatch.tune_alpha(tiny, dim[0][:count], test_data=dim[0][300:], metric="unlabeled")
    assert result.num_tuning == count
    assert 20 < result.passes <= 40
    assert str(result.verdict) == "gain"


@pytest.mark.parametrize(("sets", "classes", "labels"), [(4, 10, True), (3, 10, False), (4, 11, False)])
def test_labels_are_made_where_sets_are_balanced_but_for_chance(sets, classes, labels):
    """Else information is maximised, step by step, too."""
    images, logits = torch.zeros(250 * sets, 1, 2, 2), torch.randn(250, classes)
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(4, classes))
    model = bnpatch.load(module.eval())
    examples = bnpatch.open_examples((images, np.zeros(len(images), np.int64)), model)
    judge = ObjectiveSpec.of("unlabeled", None, 64).objective(model, examples, np.arange(len(images)))
    state = Seen(logits, {}, {}, {})
    hard, soft = unlabeled_step()(state, {}), infomax()(state, {})
    assert judge.step(state, {}).item() == pytest.approx((hard if labels else soft).item())
    judge = replace(judge, step=lambda seen, norm_layers: seen.logits.sum() * 0 + 7)
    assert [part.item() for part in judge.loss(model, list(examples.batches(64, np.arange(64))))] == [7]


def test_where_there_are_labels_they_give_the_verdict(tiny, dim):
    result = bnpatch.tune_alpha(tiny, dim, metric="unlabeled", granularity="global")
    assert result.comparisons[0].metric.name == "accuracy"
    assert any("equally frequent" in note for note in result.notes)


def test_a_verdict_without_labels_has_an_interval(tiny, dim, plain):
    """The images alone, in the order of a folder: by class."""
    run = {"metric": "unlabeled", "granularity": "global", "recalibrate": True, "trials": 4}
    sorted_dim, sorted_plain = (images[np.argsort(labels)] for images, labels in (dim, plain))
    result = bnpatch.tune_alpha(tiny, sorted_dim[::2], test_data=sorted_dim[1::2], **run)
    assert str(result.verdict) == "gain"
    change = result.comparisons[0].change
    assert change.low < change.value < change.high < 0
    result = bnpatch.tune_alpha(tiny, sorted_plain[::2], test_data=sorted_plain[1::2], **run)
    assert str(result.verdict) != "loss"


def test_sets_and_groups_of_images_look_alike_whatever_their_order(tiny, dim):
    """A folder is sorted by class: a set of its neighbours would be of one."""
    images, labels = (part[np.argsort(dim[1], kind="stable")][::2] for part in dim)
    examples, by_class, asked = bnpatch.open_examples((images, labels), tiny), np.arange(len(labels)), []

    class OfSets:
        set_size = 60

        def scores(self, model, examples, indices):
            asked.append(indices)
            return {"score": np.zeros(1)}

    scores(tiny, examples, OfSets(), tiny.state, by_class)
    assert sorted(np.concatenate(asked)) == by_class.tolist()
    assert min(len(np.unique(labels[part])) for part in asked) > 7

    judge = ObjectiveSpec.of("unlabeled", None, 64).objective(tiny, examples, by_class)
    judge = replace(judge, metrics=(bnpatch.evaluation.metrics.ACCURACY,)).with_intervals(len(by_class))
    shuffled = np.random.default_rng(1).permutation(by_class)
    with tiny.evaluating():
        first = scores(tiny, examples, judge, tiny.state, by_class)
        second = judge.scores(tiny, examples, shuffled)
    assert len(first["unlabeled"]) == len(second["unlabeled"]) == 20
    assert 0.5 < np.std(first["unlabeled"]) / np.std(second["unlabeled"]) < 2
    assert first["accuracy"].mean() == second["accuracy"].mean()


@pytest.mark.parametrize("objective", ["information", "alignment", "entropy", "evalnorm"])
def test_other_objectives_run(tiny, dim, objective):
    result = bnpatch.tune_alpha(tiny, dim, metric=objective, granularity="global")
    assert result.candidates[1].mean <= result.candidates[0].mean
    assert any(objective in note for note in result.notes)


def test_augmentation_helps_with_what_the_data_does_not_show(digits):
    """All images have the same values in other places: alpha changes nothing, and undoes brightness."""

    def of_same_values(images):
        order = np.argsort(np.argsort(small(images).reshape(-1, 64), kind="stable"))
        return (120 + order).astype(np.uint8).reshape(-1, 8, 8)

    (images, labels), (others, wanted) = digits
    model = bnpatch.load(of_one_norm(of_same_values(images), labels))
    seen = of_same_values(others)
    result = bnpatch.tune_alpha(model, (seen, wanted), augment="brightness", granularity="global")
    accuracy = result.comparisons[0]
    assert (accuracy.change.value, str(result.verdict)) == (0, "no significant change")
    unseen = bnpatch.open_examples(((seen * 0.5).astype(np.uint8), wanted), model)
    before = evaluate(model, unseen).mean(ACCURACY)
    model.apply(result.recipe)
    after = evaluate(model, unseen).mean(ACCURACY)
    assert before < accuracy.before.value - 0.2
    assert after > accuracy.before.value - 0.05


@pytest.mark.slow
def test_a_limit_on_latency_is_kept(tiny, dim):
    result = bnpatch.tune_alpha(tiny, dim, metric="cross-entropy", granularity="layer", max_overhead=1000)
    assert result.chosen.name == "at most 1000x"
    assert result.trade_off[0].gain == 0
    assert [point.num_norms for point in result.trade_off[1:]] == sorted(
        p.num_norms for p in result.trade_off[1:]
    )
    chosen = next(point for point in result.trade_off if point.weights == result.weights)
    assert chosen.gain == max(point.gain for point in result.trade_off)
    strict = bnpatch.tune_alpha(tiny, dim, granularity="global", max_overhead=1.0)
    assert strict.alpha == 0 or strict.trade_off  # nothing that costs time is within 1.0x, but for noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "0 trials find nothing"),
        ({"holdout": 0.0}, "not a fraction"),
        ({"holdout": 1.5}, "not a fraction"),
        ({"metric": "f1"}, "no metric 'f1'.*unlabeled"),
        ({"max_passes": 0}, "0 passes find nothing"),
        ({"max_overhead": 0.9}, "not possible"),
        ({"class_prior": "0.5,0.5"}, "a class prior is for tuning without labels"),
        ({"metric": "unlabeled", "class_prior": "0.5,0.5"}, "2 numbers does not fit 10 classes"),
        ({"augment": "rain"}, "no augmentation 'rain'"),
    ],
)
def test_bad_settings_are_refused(tiny, dim, change, message):
    with pytest.raises(BnpatchError, match=message):
        bnpatch.tune_alpha(tiny, dim, **change)


def test_bad_data_for_a_search_is_refused(tiny, dim):
    images, labels = dim
    one = labels == 3
    with pytest.raises(BnpatchError, match="all examples are of one class"):
        bnpatch.tune_alpha(tiny, (images[one], labels[one]))
    with pytest.raises(BnpatchError, match="too few"):
        bnpatch.tune_alpha(tiny, (images[:2], np.array([0, 1])), holdout=0.01)
    with pytest.raises(BnpatchError, match="no normalization layer"):
        bnpatch.tune_alpha(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), _floats(dim))


def test_the_recipe_says_where_it_comes_from(tuned):
    about = tuned.recipe.provenance
    assert about["held_out"]["accuracy"]["change"]["low"] > 0
    assert about["held_out"]["flips"]["gained"] > 30  # ten seeds: 89 to 130
    assert about["data"]["tuning_examples"] == 300
    assert about["verdict"] == "gain"
    assert [candidate["rung"] for candidate in about["ladder"]] == ["identity", "alpha"]
    assert set(tuned.recipe.alphas.values()) == {tuned.alpha}
    assert {"bnpatch", "torch", "timm", "optuna", "python"} == set(about["versions"])


@pytest.mark.parametrize(
    "kind", ["layers", "one weight", "no labels", "few images", "to keep", "augmented", "coordinates"]
)
def test_the_progress_tells_what_is_left(tiny, dim, plain, kind, monkeypatch):
    """Four seeds: wrong by 0.14 at most, and by 0.46 where gains decide how long the search is."""
    options = {
        "one weight": {"granularity": "global", "recalibrate": True},
        "no labels": {"metric": "unlabeled"},
        "to keep": {"keep": plain, "margin": 0.05},
        "augmented": {"augment": "noise"},
    }.get(kind, {})
    data = tuple(part[:100] for part in dim) if kind == "few images" else dim
    calls = []
    if kind == "coordinates":
        monkeypatch.setattr(type(tiny), "with_gradients", lambda model, x: None)
    bnpatch.tune_alpha(tiny, data, progress=lambda *args: calls.append(args), **options)
    end = calls[-1][1]
    assert calls[-1][2] == end > 600
    assert {label for label, *_ in calls} >= {"alpha", "held-out evaluation"}
    most = 0.6 if kind in ("layers", "no labels", "coordinates") else 0.25
    assert all(abs(done / total - done / end) < most for _, done, total in calls)


def test_evaluate_does_not_depend_on_the_batch_size(model, foggy):
    model.set_alphas(0.3)
    data = bnpatch.open_examples((foggy[0][:100], foggy[1][:100]), model)
    a, b = (evaluate(model, data, batch_size=size) for size in (100, 7))
    np.testing.assert_allclose(a.values["cross-entropy"], b.values["cross-entropy"], rtol=1e-3, atol=1e-5)
    assert np.array_equal(a.indices, b.indices)
    assert a.estimate(CROSS_ENTROPY).low < a.mean(CROSS_ENTROPY) < a.estimate(CROSS_ENTROPY).high


def test_inputs_as_they_are_leave_no_preprocessing_in_the_recipe(model, foggy, tuned):
    some = _floats((foggy[0][:160], foggy[1][:160]))
    result = bnpatch.tune_alpha(model, some, granularity="global", trials=2)
    assert result.recipe.provenance["preprocessing"] is None
    assert tuned.recipe.provenance["preprocessing"]["input_size"] == (1, 32, 32)
    assert repr(tuned) == "TuneResult(alpha, accuracy: gain)"
    with pytest.raises(BnpatchError, match=r"images without classes; give a pair"):
        bnpatch.tune_alpha(model, foggy[0])


def test_a_study_of_other_calibration_data_is_refused(tiny, dim, plain, tmp_path):
    run = {"granularity": "global", "recalibrate": True, "storage": f"sqlite:///{tmp_path}/s.db", "trials": 2}
    bnpatch.tune_alpha(tiny, dim, **run, calib_data=dim[0][:50])
    with pytest.raises(BnpatchError, match="another calibration data"):
        bnpatch.tune_alpha(tiny, dim, **run, calib_data=plain[0][:50])


def test_a_limit_on_latency_holds_against_what_held_out_examples_like_better(tiny, dim, monkeypatch):
    monkeypatch.setattr(tune, "choose", lambda points, limit: Choice(points[0], "nothing is affordable"))
    result = bnpatch.tune_alpha(tiny, dim, granularity="global", max_overhead=1.5)
    assert result.chosen.name == "at most 1.5x"
    assert result.alpha == 0


def test_a_cross_fit_leaves_the_targets_of_the_whole(tiny, dim):
    few = dim[0][:100], dim[1][:100]
    run = {"granularity": "global", "recalibrate": True, "metric": "cross-entropy", "trials": 4}
    result = bnpatch.tune_alpha(tiny, few, **run)
    assert result.num_parts > 1
    whole = re_estimate_statistics(
        tiny, bnpatch.open_examples(few, tiny), indices=np.arange(100), batch_size=250
    )
    stored = {norm_layer.name: norm_layer for norm_layer in result.recipe.norm_layers}
    assert any(norm_layer.lambda_ for norm_layer in stored.values())
    for name, norm_layer in stored.items():
        np.testing.assert_allclose(norm_layer.re_estimated.mean, whole[name].mean, rtol=1e-3, atol=1e-4)


def test_where_nothing_can_be_read_without_labels_is_said(model, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(BnpatchError, match="none of the images can be read"):
        bnpatch.tune_alpha(model, tmp_path, metric="unlabeled", num_workers=0)


@pytest.mark.parametrize("make", ["torch", "onnx"])
def test_a_model_that_came_with_lambdas_is_judged_as_it_came(tiny, tiny_onnx, dim, make):
    """Its own targets, not those that the search estimates; and it has them again afterwards."""
    model = tiny if make == "torch" else bnpatch.load(tiny_onnx)
    model.set_state(
        model.state.with_re_estimated(
            {name: Moments(f.source.mean + 0.3, f.source.var) for name, f in model.facts().items()}
        )
    )
    model.set_weights(PatchWeights(lambdas=dict.fromkeys(model.alphas(), 0.7)))
    own = {name: np.array(part.mean) for name, part in model.state.re_estimated.items()}
    test = dim[0][:200], dim[1][:200]
    examples = bnpatch.open_examples(test, model)
    before = evaluate(model, examples).mean(CROSS_ENTROPY)
    run = {"granularity": "global", "recalibrate": True, "metric": "cross-entropy", "trials": 3}
    result = bnpatch.tune_alpha(model, (dim[0][200:], dim[1][200:]), test_data=test, **run)
    assert result.comparisons[0].before.value == pytest.approx(before, rel=1e-4)
    assert all(np.array_equal(part.mean, own[name]) for name, part in model.state.re_estimated.items())
    assert evaluate(model, examples).mean(CROSS_ENTROPY) == pytest.approx(before, rel=1e-6)


def test_held_out_examples_have_no_say_in_what_is_chosen(tiny, dim):
    """Their labels are the answers of the model with one alpha, which no other candidate gives all of."""
    images, labels = dim
    tuning, held_out = (images[::2], labels[::2]), images[1::2]
    run = {"metric": "accuracy", "granularity": "layer", "recalibrate": False, "trials": 4}
    first = bnpatch.tune_alpha(tiny, tuning, test_data=(held_out, labels[1::2]), **run)
    one_alpha = next(candidate for candidate in first.candidates if candidate.name == "alpha")
    assert first.chosen.name != "alpha"
    with tiny.borrowed():
        tiny.set_weights(one_alpha.weights)
        examples = bnpatch.open_examples((held_out, labels[1::2]), tiny)
        answers = np.concatenate([tiny.predict(b.x).argmax(1).numpy() for b in examples.batches(64)])
    again = bnpatch.tune_alpha(tiny, tuning, test_data=(held_out, answers), **run)
    assert again.chosen.name == first.chosen.name
    assert again.chosen.weights == first.chosen.weights
