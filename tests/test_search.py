import numpy as np
import pytest
import torch

import bnpatch
from bnpatch import search
from bnpatch.errors import BnpatchError, BnpatchWarning
from bnpatch.evaluation import evaluate
from bnpatch.metrics import CROSS_ENTROPY


@pytest.fixture
def model(checkpoint):
    return bnpatch.load(checkpoint)


@pytest.fixture(scope="module")
def tuned(checkpoint, foggy):
    return bnpatch.tune_alpha(bnpatch.load(checkpoint), foggy, trials=10)


def test_finds_a_gain_under_a_shift(tuned):
    assert tuned.verdict == "gain"
    accuracy = tuned.comparisons[0]
    assert accuracy.metric.name == "accuracy"
    assert accuracy.after.value > accuracy.before.value + 0.2
    assert 0.05 < tuned.alpha < 0.9
    assert tuned.num_tuning == tuned.num_held_out == 300


def test_the_identity_is_trial_zero_and_all_trials_are_kept(tuned):
    assert tuned.trials[0].alpha == 0
    assert [t.number for t in tuned.trials] == list(range(10))
    assert tuned.alpha == max(tuned.trials, key=lambda t: (t.scores["accuracy"], -t.alpha)).alpha
    assert set(tuned.trials[0].scores) == {"accuracy", "cross-entropy", "top5"}


def test_minimizes_cross_entropy(model, foggy):
    result = bnpatch.tune_alpha(model, foggy, metric="cross-entropy", trials=8)
    assert result.alpha == min(result.trials, key=lambda t: t.scores["cross-entropy"]).alpha
    assert result.comparisons[0].after.value < result.comparisons[0].before.value
    assert result.verdict == "gain"


def test_scores_are_those_of_the_patched_model(model, foggy, tuned):
    """The same numbers by hand: no search, no cache, no batches."""
    _, held_out = search.split(foggy[1].astype(np.int64), 0.5, seed=0)
    module = bnpatch.patch(model.module, tuned.alpha).eval()
    with torch.inference_mode():
        logits = module(torch.from_numpy(foggy[0][held_out])[:, None].float() / 127.5 - 1)
    correct = (logits.argmax(1).numpy() == foggy[1][held_out]).mean()
    assert tuned.comparisons[0].after.value == pytest.approx(correct, abs=1e-12)


def test_is_reproducible(model, foggy, tuned):
    again = bnpatch.tune_alpha(model, foggy, trials=10, batch_size=50)
    assert [t.alpha for t in again.trials] == [t.alpha for t in tuned.trials]
    other = bnpatch.tune_alpha(model, foggy, trials=10, seed=1)
    assert [t.alpha for t in other.trials] != [t.alpha for t in tuned.trials]


def test_the_search_never_sees_the_held_out_part(model, foggy, monkeypatch):
    seen = []

    def spy(model, examples, *args, indices, **kwargs):
        seen.append(set(indices.tolist()))
        return evaluate(model, examples, *args, indices=indices, **kwargs)

    monkeypatch.setattr(search, "evaluate", spy)
    result = bnpatch.tune_alpha(model, foggy, trials=3, holdout=0.25)
    assert len(seen) == 3
    assert len(set.union(*seen)) == result.num_tuning == 450
    assert result.num_held_out == 150


def test_the_model_is_left_as_it_was(model, foggy):
    types = [type(m) for m in model.module.modules()]
    bnpatch.tune_alpha(model, foggy, trials=2)
    assert [type(m) for m in model.module.modules()] == types
    module = model.module.train()
    bnpatch.tune_alpha(module, _floats(foggy), trials=2)
    assert [type(m) for m in module.modules()] == types
    assert module.training


def _floats(data):
    return data[0][:, None].astype(np.float32) / 127.5 - 1, data[1]


def test_a_module_and_a_metric_of_ones_own(model, foggy, tuned):
    def margin(outputs, targets):
        return outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)

    result = bnpatch.tune_alpha(model.module, _floats(foggy), metric=margin, trials=4)
    assert result.metric.name == "margin"
    assert result.alpha == max(result.trials, key=lambda t: t.scores["margin"]).alpha


def test_test_data_gives_the_verdict(model, foggy, clean):
    result = bnpatch.tune_alpha(model, foggy, test_data=clean, trials=4)
    assert (result.num_tuning, result.num_held_out) == (600, 600)
    assert result.comparisons[0].before.value > 0.95  # of the clean images


def test_no_gain_is_said_plainly_on_matched_data(model, clean):
    """Seeded null cases: the data is what the model was trained for, so that a gain is rarely real."""
    claims = 0
    for seed in range(8):
        result = bnpatch.tune_alpha(model, clean, trials=6, seed=seed)
        claims += result.verdict == "gain"
    assert claims <= 1


def test_a_tie_goes_to_the_identity(model, clean):
    result = bnpatch.tune_alpha(
        model, clean, metric=lambda outputs, targets: torch.ones(len(targets)), trials=4
    )
    assert result.alpha == 0
    assert result.verdict == "no significant change"
    assert result.comparisons[0].change.value == 0


def test_an_interrupt_keeps_the_best_so_far(model, foggy):
    def interrupt(trial, is_best):
        if trial.number == 3:
            raise KeyboardInterrupt

    result = bnpatch.tune_alpha(model, foggy, trials=50, on_trial=interrupt)
    assert result.interrupted
    assert len(result.trials) == 4
    assert result.recipe.provenance["interrupted"]
    assert result.alpha == max(result.trials, key=lambda t: t.scores["accuracy"]).alpha


def test_an_interrupt_before_anything_is_known_is_passed_on(model, foggy, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bnpatch.tune_alpha(model, foggy)


def test_a_timeout_ends_the_search(model, foggy):
    assert len(bnpatch.tune_alpha(model, foggy, trials=50, timeout=0).trials) == 1


def test_a_weight_that_overflows_is_a_failed_trial(model, foggy, monkeypatch):
    predict = type(model).predict

    def overflow(self, x):
        y = predict(self, x)
        return y * float("inf") if max(self.alphas().values()) == 1 else y

    monkeypatch.setattr(type(model), "predict", overflow)
    result = bnpatch.tune_alpha(model, foggy, trials=8)
    assert [t.number for t in result.trials] == [0, 1, 2, 3, 4, 6, 7]
    monkeypatch.setattr(type(model), "predict", lambda self, x: predict(self, x) * float("nan"))
    with pytest.raises(BnpatchError, match="infinities or NaN for example"):
        bnpatch.tune_alpha(model, foggy, trials=8)


def test_chance_is_warned_of(model, foggy):
    with pytest.warns(BnpatchWarning, match="and chance is 10.0%"):
        bnpatch.tune_alpha(model, (foggy[0], (foggy[1] + 1) % 10), trials=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "0 trials find nothing"),
        ({"holdout": 0.0}, "not a fraction"),
        ({"holdout": 1.5}, "not a fraction"),
        ({"metric": "f1"}, "no metric 'f1'"),
    ],
)
def test_bad_settings_are_refused(model, foggy, change, message):
    with pytest.raises(BnpatchError, match=message):
        bnpatch.tune_alpha(model, foggy, **change)


def test_bad_data_for_a_search_is_refused(model, foggy):
    images, labels = foggy
    one = labels == 3
    with pytest.raises(BnpatchError, match="all examples are of one class"):
        bnpatch.tune_alpha(model, (images[one], labels[one]))
    with pytest.raises(BnpatchError, match="too few"):
        bnpatch.tune_alpha(model, (images[:2], np.array([0, 1])), holdout=0.01)
    with pytest.raises(BnpatchError, match="no normalization layer"):
        bnpatch.tune_alpha(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1024, 10)), _floats(foggy))


def test_the_recipe_says_where_it_comes_from(tuned):
    about = tuned.recipe.provenance
    assert about["held_out"]["accuracy"]["change"]["low"] > 0
    assert about["data"]["tuning_examples"] == 300
    assert about["verdict"] == "gain"
    assert set(tuned.recipe.alphas.values()) == {tuned.alpha}
    assert {"bnpatch", "torch", "timm", "optuna", "python"} == set(about["versions"])


def test_progress_reaches_the_end(model, foggy):
    calls = []
    bnpatch.tune_alpha(model, foggy, trials=3, progress=lambda *args: calls.append(args))
    assert calls[-1][1] == calls[-1][2] == 3 * 300 + 2 * 300
    assert {label for label, *_ in calls} == {"searching alpha", "verdict on held-out examples"}


def test_evaluate_does_not_depend_on_the_batch_size(model, foggy):
    model.set_alphas(0.3)
    data = bnpatch.open_examples(foggy, model)
    a, b = (evaluate(model, data, batch_size=size) for size in (600, 7))
    np.testing.assert_allclose(a.values["cross-entropy"], b.values["cross-entropy"], rtol=1e-3, atol=1e-5)
    assert np.array_equal(a.indices, b.indices)
    assert a.estimate(CROSS_ENTROPY).low < a.mean(CROSS_ENTROPY) < a.estimate(CROSS_ENTROPY).high


def test_inputs_as_they_are_leave_no_preprocessing_in_the_recipe(model, foggy, tuned):
    result = bnpatch.tune_alpha(model, _floats(foggy), trials=2)
    assert result.recipe.provenance["preprocessing"] is None
    assert tuned.recipe.provenance["preprocessing"]["input_size"] == (1, 32, 32)
    assert repr(tuned) == f"TuneResult(alpha={tuned.alpha:.4g}, accuracy: gain, 10 trials)"
    with pytest.raises(BnpatchError, match=r"images without classes; give a pair"):
        bnpatch.tune_alpha(model, foggy[0])
