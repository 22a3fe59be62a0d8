"""Searches that don't go as planned: interrupted, out of time, or with weights that overflow."""

from dataclasses import replace

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.report.text import verdict_sentence
from bnpatch.search import cross_fit, tune
from bnpatch.search.candidates import CandidateSearch
from bnpatch.search.objective import LabelledObjective


def few(data):
    """So few that they take turns in being held out."""
    return data[0][:100], data[1][:100]


def test_an_interrupt_keeps_the_best_so_far(tiny, dim):
    def interrupt(trial, is_best):
        if trial.candidate == "alpha" and trial.number == 3:
            raise KeyboardInterrupt

    with pytest.warns(BnpatchWarning, match="interrupted: what was found so far is judged now"):
        result = bnpatch.tune_alpha(tiny, dim, on_trial=interrupt)
    assert result.interrupted
    assert result.recipe.provenance["interrupted"]
    assert [candidate.name for candidate in result.candidates] == ["baseline", "alpha"]


def test_an_interrupt_before_anything_is_known_is_passed_on(tiny, dim, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelledObjective, "scores", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bnpatch.tune_alpha(tiny, dim)


def test_an_interrupt_while_learning_keeps_what_was_found_globally(tiny, dim, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LabelledObjective, "loss", interrupt)
    with pytest.warns(BnpatchWarning, match="interrupted"):
        result = bnpatch.tune_alpha(tiny, dim, recalibrate=False)
    assert result.interrupted
    assert result.chosen.name == "alpha"
    assert result.verdict == "gain"


def test_a_timeout_ends_the_search(tiny, dim):
    result = bnpatch.tune_alpha(tiny, dim, timeout=0)
    assert [candidate.name for candidate in result.candidates] == ["baseline"]
    assert result.alpha == 0


def test_a_weight_that_overflows_is_a_failed_trial(tiny, dim, monkeypatch):
    predict = type(tiny).predict

    def overflow(self, x):
        y = predict(self, x)
        return y * float("inf") if max(self.alphas().values()) == 1 else y

    monkeypatch.setattr(type(tiny), "predict", overflow)
    result = bnpatch.tune_alpha(tiny, dim, granularity="global")
    assert 1.0 not in [t.weight for t in result.trials]
    assert result.verdict == "gain"
    monkeypatch.setattr(type(tiny), "predict", lambda self, x: predict(self, x) * float("nan"))
    with pytest.raises(BnpatchError, match="infinities or NaN for example"):
        bnpatch.tune_alpha(tiny, dim)


def test_an_interrupt_ends_a_cross_fit_where_the_search_was(tiny, dim):
    """Searches that go no further judge the parts: otherwise the verdict would be of something else."""

    def interrupt(trial, is_best):
        if trial.candidate == "alpha" and trial.number == 3 and not interrupted:
            interrupted.append(trial)
            raise KeyboardInterrupt

    interrupted = []
    with pytest.warns(BnpatchWarning, match="interrupted"):
        result = bnpatch.tune_alpha(tiny, few(dim), metric="cross-entropy", on_trial=interrupt)
    assert result.interrupted
    assert [candidate.name for candidate in result.candidates] == ["baseline", "alpha"]
    assert result.num_held_out == 100
    # Six global searches, of one or two passes more than three, as blocks are few
    assert result.passes < 6 * 4


def test_an_interrupt_while_learning_ends_a_cross_fit_where_the_search_was(tiny, dim, monkeypatch):
    loss, interrupted = LabelledObjective.loss, []

    def interrupt(self, *args):
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(LabelledObjective, "loss", interrupt)
    searched = recorded(monkeypatch)
    with pytest.warns(BnpatchWarning, match="interrupted"):
        result = bnpatch.tune_alpha(tiny, few(dim), metric="cross-entropy", recalibrate=False)
    assert result.interrupted
    assert [[candidate.name for candidate in candidates] for candidates in searched] == [
        ["baseline", "alpha"]
    ] * 6


def recorded(monkeypatch):
    """The candidates of each list of candidates, in the order in which they are found."""
    find, searched = CandidateSearch.find, []

    def record(self):
        searched.append(candidates := find(self))
        return candidates

    monkeypatch.setattr(CandidateSearch, "find", record)
    return searched


@pytest.mark.parametrize("where", ["find", "gather"])
def test_an_interrupt_during_a_cross_fit_leaves_the_parts_that_were_judged(tiny, dim, monkeypatch, where):
    calls, owner = [], CandidateSearch if where == "find" else cross_fit
    original, last = getattr(owner, where), 4 if where == "find" else 3

    def interrupt(*args):
        calls.append(args)
        if len(calls) == last:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, where, interrupt)
    result = bnpatch.tune_alpha(tiny, few(dim), granularity="global", trials=3)
    assert len(calls) == last
    assert result.interrupted
    assert result.num_parts == 2
    assert result.num_held_out == 40
    assert any("2 of 5 parts took turns in being held out" in note for note in result.notes)


def test_an_interrupt_before_any_part_was_judged_is_passed_on(tiny, dim, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cross_fit, "gather", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bnpatch.tune_alpha(tiny, few(dim), granularity="global", trials=3)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(cross_fit.time, "monotonic", lambda: self.now)


def test_the_searches_of_a_cross_fit_share_the_time(tiny, dim, monkeypatch):
    clock, given = Clock(monkeypatch), []

    class Timed(CandidateSearch):
        def find(self):
            given.append(self.plan.timeout)
            candidates = super().find()
            clock.now += 10.0
            return candidates

    monkeypatch.setattr(cross_fit, "CandidateSearch", Timed)
    bnpatch.tune_alpha(tiny, few(dim), granularity="global", timeout=60.0, trials=2)
    np.testing.assert_allclose(given, [10.0, 20.0, 10.0, 10.0, 10.0, 10.0])  # twice: one part is a must


def test_a_verdict_is_of_parts_that_were_searched_as_far_as_the_whole(tiny, dim, monkeypatch):
    """A limit on latency takes all the time: a search that has none left would find the baseline."""
    clock, measured = Clock(monkeypatch), tune.trade_off

    def slow(*args, **kwargs):
        clock.now += 60.0
        return measured(*args, **kwargs)

    class Timed(CandidateSearch):
        def find(self):
            candidates = super().find()
            clock.now += 5.0
            return candidates

    monkeypatch.setattr(cross_fit, "CandidateSearch", Timed)
    monkeypatch.setattr(tune, "trade_off", slow)
    options = {"granularity": "global", "metric": "cross-entropy", "max_overhead": 1000.0}
    result = bnpatch.tune_alpha(tiny, few(dim), timeout=60.0, trials=3, **options)
    assert any("1 of 5 parts" in note and "time was over" in note for note in result.notes)
    assert result.num_held_out == 20
    assert result.comparisons[0].change.value != 0
    assert not result.interrupted


def test_a_part_whose_search_was_cut_short_does_not_judge(tiny, dim, monkeypatch):
    """It would have found the baseline, and made the verdict say that little is gained."""
    clock, scores, searching = Clock(monkeypatch), LabelledObjective.scores, []

    class Watched(CandidateSearch):
        def find(self):
            searching.append(0)
            return super().find()

    def timed(self, model, examples, indices):
        searching[-1] += 1
        if len(searching) == 3 and searching[-1] == 2:  # the baseline of the second part is scored
            clock.now += 60.0
        return scores(self, model, examples, indices)

    monkeypatch.setattr(cross_fit, "CandidateSearch", Watched)
    monkeypatch.setattr(LabelledObjective, "scores", timed)
    options = {"granularity": "global", "metric": "cross-entropy", "trials": 4}
    result = bnpatch.tune_alpha(tiny, few(dim), timeout=40.0, **options)
    assert any("1 of 5 parts" in note and "time was over" in note for note in result.notes)
    assert result.num_held_out == 20
    assert result.comparisons[0].change.value != 0


def test_where_all_images_speak_for_none_of_it_the_model_as_it_is_is_judged(tiny, dim, monkeypatch):
    """What is found without one of the parts is not what is kept."""
    find, searched = CandidateSearch.find, []

    def then(self):
        candidates = find(self)
        searched.append(self)
        if len(searched) > 1:
            return candidates
        return [replace(candidate, chosen=number == 0) for number, candidate in enumerate(candidates)]

    monkeypatch.setattr(CandidateSearch, "find", then)
    result = bnpatch.tune_alpha(tiny, few(dim), metric="cross-entropy", granularity="global", trials=3)
    assert result.alpha == 0
    assert result.verdict == result.recipe.provenance["verdict"] == "no significant change"
    assert {c.change.value for c in result.comparisons} == {0.0}
    assert any("all images together speak for none of it" in note for note in result.notes)
    assert verdict_sentence(result).startswith("No significant gain: nothing that was tried")


def test_one_weight_for_all_that_overflows_where_nobody_chose_it_is_no_matter(tiny, dim, monkeypatch):
    gather, gathered = cross_fit.gather, []

    def then(*args):
        found = gather(*args)
        gathered.append(True)
        return found

    monkeypatch.setattr(cross_fit, "gather", then)
    overflowing(tiny, monkeypatch, lambda alphas: gathered and len(set(alphas.values())) == 1)
    result = bnpatch.tune_alpha(tiny, dim, metric="cross-entropy", recalibrate=False)
    assert len(set(result.weights.alphas.values())) > 1
    assert result.verdict == "gain"


def overflowing(model, monkeypatch, where):
    """The model returns infinities with settings that this is true of."""
    predict = type(model).predict

    def overflow(self, x):
        y = predict(self, x)
        return y * float("inf") if where(self.alphas()) else y

    monkeypatch.setattr(type(model), "predict", overflow)


@pytest.mark.parametrize("make", ["torch", "onnx"])
def test_weights_per_layer_that_overflow_are_not_kept(tiny, tiny_onnx, dim, monkeypatch, make):
    """Whether they are learned, or found by coordinate search."""
    model = tiny if make == "torch" else bnpatch.load(tiny_onnx)
    overflowing(model, monkeypatch, lambda alphas: len(set(alphas.values())) > 1)
    result = bnpatch.tune_alpha(model, dim, metric="cross-entropy", recalibrate=False)
    assert len(set(result.weights.alphas.values())) == 1
    assert result.verdict == "gain"


def test_a_loss_that_overflows_ends_learning(tiny, dim, monkeypatch):
    loss = LabelledObjective.loss
    monkeypatch.setattr(
        LabelledObjective, "loss", lambda self, *args: (part * float("nan") for part in loss(self, *args))
    )
    result = bnpatch.tune_alpha(tiny, dim, metric="cross-entropy", recalibrate=False)
    assert len(set(result.weights.alphas.values())) == 1
    assert result.verdict == "gain"


def test_what_overflows_on_clean_images_insures_nothing(tiny, plain, monkeypatch):
    scores, find, searched = LabelledObjective.scores, CandidateSearch.find, []

    def overflow(self, model, examples, indices):
        if searched and max(tiny.alphas().values()) > 0:
            raise OutputsNotFiniteError("too large", "leave it")
        return scores(self, model, examples, indices)

    def then(self):
        """The search chose alpha, whatever contrast does to this classifier."""
        baseline, alpha = find(self)
        searched.append(True)
        weights = replace(alpha.weights, alphas=dict.fromkeys(alpha.weights.alphas, 0.3))
        return [replace(baseline, chosen=False), replace(alpha, weights=weights, chosen=True)]

    monkeypatch.setattr(LabelledObjective, "scores", overflow)
    monkeypatch.setattr(CandidateSearch, "find", then)
    result = bnpatch.tune_alpha(
        tiny, plain, metric="cross-entropy", augment="contrast", granularity="global", recalibrate=False
    )
    assert result.alpha == 0
    assert "alpha: best in tuning, but it does harm to the images at hand" in result.reason
    assert result.candidate_recipe.alphas


def test_thinned_patches_that_overflow_are_left_out(tiny, dim, monkeypatch):
    overflowing(tiny, monkeypatch, lambda alphas: sum(map(bool, alphas.values())) == 1)
    result = bnpatch.tune_alpha(tiny, dim, granularity="global", max_overhead=1000)
    assert 1 not in [point.num_norms for point in result.trade_off]
    assert len(result.trade_off) > 2
