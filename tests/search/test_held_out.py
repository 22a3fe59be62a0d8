import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import CONFIDENCE, CROSS_ENTROPY
from bnpatch.models.running_stats import re_estimate_statistics
from bnpatch.search import tune
from bnpatch.search.cross_fit import Searches
from bnpatch.search.latency_limit import Choice
from bnpatch.search.objective import LabelledObjective


class Used:
    """Notes which examples a search scores (seen) and learns from, and which the verdict scores (judged)."""

    def __init__(self, monkeypatch):
        self.seen, self.learned, self.judged = set(), set(), []
        scores, loss = LabelledObjective.scores, LabelledObjective.loss

        def spy_scores(objective, model, examples, indices):
            if CONFIDENCE in objective.metrics:  # only the verdict scores it
                self.judged.append(set(indices.tolist()))
                assert not self.judged[-1] & (self.seen | self.learned)  # by the search that is judged
            else:
                self.seen.update(indices.tolist())
            return scores(objective, model, examples, indices)

        def spy_loss(objective, model, batches):
            self.learned.update(index for batch in batches for index in batch.indices.tolist())
            return loss(objective, model, batches)

        monkeypatch.setattr(LabelledObjective, "scores", spy_scores)
        monkeypatch.setattr(LabelledObjective, "loss", spy_loss)


@pytest.fixture
def used(monkeypatch):
    return Used(monkeypatch)


@pytest.mark.parametrize("granularity", ["global", "layer"])
def test_the_search_never_sees_the_held_out_part(tiny, dim, granularity, used):
    result = bnpatch.tune_alpha(tiny, dim, granularity=granularity, holdout=0.25)
    judged = set.union(*used.judged)
    assert len(used.seen) == result.num_tuning == 450
    assert not (used.seen | used.learned) & judged
    assert len(judged) == result.num_held_out == 150
    if granularity == "layer":  # examples that stop learning and that choose candidates are not learned from
        assert 250 < len(used.learned) < 350


def test_test_data_gives_the_verdict(tiny, dim, plain):
    own_answers = plain[0], answers(tiny, plain[0]).argmax(1).numpy()
    result = bnpatch.tune_alpha(tiny, dim, test_data=own_answers, granularity="global")
    assert (result.num_tuning, result.num_held_out) == (600, 600)
    assert result.comparisons[0].before.value == 1  # any patch can but lose
    assert result.verdict == "loss"
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
        claims += result.verdict == "gain"
        ends.append(result.alpha)
    assert claims <= 1  # ten seeds: none of 20
    assert np.median(ends) < 0.02


def test_all_candidates_claim_no_gain_where_there_is_none(tiny, plain):
    result = bnpatch.tune_alpha(tiny, (plain[0], drawn_labels(tiny, plain[0])))
    assert result.verdict != "gain"


def test_a_tie_goes_to_the_baseline(tiny, plain):
    result = bnpatch.tune_alpha(
        tiny, plain, metric=lambda outputs, targets: torch.ones(len(targets)), granularity="layer"
    )
    assert result.alpha == 0
    assert result.chosen.name == "baseline"
    assert result.verdict == "no significant change"
    assert result.comparisons[0].change.value == 0


def test_chance_is_warned_of(tiny, dim):
    with pytest.warns(BnpatchWarning, match="and chance is 10.0%"):
        bnpatch.tune_alpha(tiny, (dim[0], (dim[1] + 1) % 10), granularity="global", max_passes=1)


def test_few_examples_take_turns_in_being_held_out(tiny, dim, used, monkeypatch):
    begin = Searches._begin

    def spy_begin(*args):
        used.seen.clear()
        used.learned.clear()
        return begin(*args)

    monkeypatch.setattr(Searches, "_begin", spy_begin)
    result = bnpatch.tune_alpha(
        tiny, (dim[0][:100], dim[1][:100]), metric="cross-entropy", granularity="layer", trials=4
    )
    assert set.union(*used.judged) == set(range(100))
    assert result.num_tuning == result.num_held_out == 100
    assert any("cross-fitting" in note for note in result.notes)
    assert result.verdict == "gain"
    assert result.held_out.classes.shape == (3, 100)


def test_a_verdict_on_few_examples_says_so(tiny, dim):
    run = {"granularity": "global", "trials": 2}
    tuning, judging = ((dim[0][part], dim[1][part]) for part in (slice(100), slice(100, 120)))
    result = bnpatch.tune_alpha(tiny, tuning, test_data=judging, **run)
    assert "20 examples judged: so few say little" in result.notes
    result = bnpatch.tune_alpha(tiny, tuning, test_data=(dim[0][100:200], dim[1][100:200]), **run)
    assert "below 300 examples the interval of the cross-entropy is rough" in result.notes


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
