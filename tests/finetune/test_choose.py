import copy
import pickle
from dataclasses import replace

import optuna
import pytest
import timm
import torch
import torchvision

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.evaluation.evaluate import OutputsNotFiniteError
from bnpatch.finetune import technique_search, techniques
from bnpatch.finetune.ablation import Contribution, variants
from bnpatch.finetune.checkpoint import Epoch
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.engine import Engine
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.finetune.trainer import NotFiniteLossError


@pytest.fixture(scope="module")
def residual():
    module = timm.create_model("test_resnet", num_classes=10)
    return bnpatch.load(module, preprocessing={"img_size": 32})


@pytest.mark.parametrize(
    ("batch_size", "spec"),
    [
        (128, NormSpec.ghost(16)),
        (16, NormSpec.ghost(8)),
        (8, NormSpec.batch()),
        (2, NormSpec.batch_group(techniques.CHANNELS_PER_GROUP)),
    ],
)
def test_guidance_goes_by_the_batch_size(residual, batch_size, spec):
    choice = techniques.by_guidance(residual, FineTuneSettings(batch_size=batch_size, weight_decay=3e-4))
    assert choice.spec == spec
    assert choice.norm_decay.rate == 3e-4
    assert len(choice.reasons) == 4
    assert any(str(batch_size) in reason for reason in choice.reasons)


def test_decay_sites_are_those_that_reach_the_output(residual):
    norm_layers = {norm_layer.name for norm_layer in residual.inventory().norm_layers}
    assert techniques.decayed_norms(residual) < norm_layers
    inception = bnpatch.load(
        torchvision.models.googlenet(num_classes=3, init_weights=False, aux_logits=False),
        preprocessing={"img_size": 64},
    )
    found = techniques.decayed_norms(inception)
    assert found
    assert all(name.startswith("inception5b") for name in found)


def results(scores, monkeypatch):
    """Let runs give scores without training; a score of None diverges."""
    seen = []

    def train(model, examples, settings, *, callbacks):
        rate = settings.norm_decay.rate if settings.norm_decay else 0.0
        seen.append((str(settings.spec), rate))
        if (accuracy := scores(settings.spec, rate)) is None:
            raise NotFiniteLossError("diverged")
        epochs = [Epoch(n + 1, 0.1, 8, 1.0, accuracy * (n + 1) / 2, 1.0, 0.0) for n in range(2)]
        for epoch in epochs:
            callbacks.on_epoch(epoch)
        return type("Result", (), {"best": epochs[-1]})

    monkeypatch.setattr(technique_search, "train", train)
    return seen


@pytest.fixture(scope="module")
def examples(residual):
    return bnpatch.open_examples((torch.zeros(40, 3, 32, 32), [i % 4 for i in range(40)]), residual)


def test_search_finds_what_does_best_and_gives_up_what_does_not(residual, examples, monkeypatch):
    seen = results(lambda spec, rate: 0.9 if spec.examples_per_group == 4 else 0.5 - rate, monkeypatch)
    told = []
    choice = technique_search.by_search(
        residual,
        examples,
        FineTuneSettings(batch_size=8, epochs=9),
        trials=25,
        epochs=2,
        callbacks=Callbacks(tell=told.append),
    )
    assert seen[0] == ("Batch Norm", 0.0)
    assert choice.spec == NormSpec.ghost(4)
    assert len(seen) == len(told) == 25
    assert any(line.endswith(": given up") for line in told)  # pruned
    assert "90.00%" in choice.reasons[0]


def _score(spec, rate):
    return 0.9 - 0.1 * abs((spec.examples_per_group or 8) - 4) - rate


@pytest.mark.parametrize(
    ("number", "error"),
    [
        pytest.param(1, KeyboardInterrupt, marks=pytest.mark.slow),
        pytest.param(2, OSError, marks=pytest.mark.slow),
        pytest.param(4, RuntimeError, marks=pytest.mark.slow),
        # Optuna notes no end, as of a process that is killed
        pytest.param(7, SystemExit, marks=pytest.mark.slow),
        pytest.param(7, KeyboardInterrupt, marks=pytest.mark.slow),
        *(pytest.param(number, SystemExit, marks=pytest.mark.slow) for number in (1, 2, 4)),
    ],
)
def test_a_search_that_was_cut_off_goes_on(residual, examples, monkeypatch, tmp_path, number, error):
    settings, database = FineTuneSettings(batch_size=8), tmp_path / "choose.db"
    options = {"trials": 9, "epochs": 2, "database": database}
    whole = results(_score, monkeypatch)
    best = technique_search.by_search(residual, examples, settings, **options)
    runs = [(trial.params, trial.value) for trial in _trials(database)]
    first = []

    def cut_off(spec, rate):
        first.append(spec)
        if len(first) == number:
            raise error
        return _score(spec, rate)

    results(cut_off, monkeypatch)
    with pytest.raises(error):
        technique_search.by_search(residual, examples, settings, **options)
    rest = results(_score, monkeypatch)
    assert technique_search.by_search(residual, examples, settings, **options, resume=True) == best
    assert rest == whole[number - 1 :]  # the run that was cut off comes first
    assert [(t.params, t.value) for t in _trials(database) if t.number != number - 1] == runs
    again = results(_score, monkeypatch)
    assert technique_search.by_search(residual, examples, settings, **options, resume=True) == best
    assert not again


@pytest.mark.slow
def test_a_search_goes_on_after_several_cuts_and_runs_that_diverged(
    residual, examples, monkeypatch, tmp_path
):
    settings, database = FineTuneSettings(batch_size=8), tmp_path / "choose.db"
    options = {"trials": 9, "epochs": 2, "database": database}

    def score(spec, rate):
        return None if not rate else _score(spec, rate)

    whole = results(score, monkeypatch)
    best = technique_search.by_search(residual, examples, settings, **options)
    assert (str(NormSpec.batch()), 0.0) in whole
    ended = []
    database.unlink()
    while len(ended) < 9:
        runs = []

        def cut_off(spec, rate, runs=runs):
            runs.append((str(spec), rate))
            if len(runs) == 3:  # two more than before
                raise KeyboardInterrupt
            return score(spec, rate)

        results(cut_off, monkeypatch)
        try:
            assert technique_search.by_search(residual, examples, settings, **options, resume=True) == best
        except KeyboardInterrupt:
            runs.pop()
        ended += runs
    assert ended == whole


class _Processes:
    """The first of two processes, and then the second."""

    def __init__(self):
        self.rank, self.count, self.said = 0, 2, []

    def tell(self, message):
        if self.rank == 0:
            self.said.append(pickle.dumps(message))
        return pickle.loads(self.said.pop(0) if self.rank else self.said[-1])


@pytest.fixture
def as_process(residual, examples, monkeypatch, tmp_path):
    """Search in a process of two, the first of which comes first."""
    processes = _Processes()
    monkeypatch.setattr(technique_search, "start", lambda: processes)

    def search(rank, **changes):
        processes.rank = rank
        settings = replace(FineTuneSettings(batch_size=8), **changes)
        database = tmp_path / "choose.db"
        return technique_search.by_search(
            residual, examples, settings, trials=5, database=database, resume=True
        )

    return search


@pytest.mark.slow
def test_processes_have_the_same_runs_before_them_and_refuse_alike(as_process, monkeypatch, tmp_path):
    first = results(_score, monkeypatch)
    best = as_process(0)
    assert len(first) == 5
    second = results(_score, monkeypatch)
    assert as_process(1) == best
    assert second == first  # both train; one keeps the database
    assert len(_trials(tmp_path / "choose.db")) == 5
    refused = []
    for rank in (0, 1):
        with pytest.raises(BnpatchError, match=r"of another search: settings\.lr differs") as caught:
            as_process(rank, lr=0.5)
        refused.append(str(caught.value))
    assert refused[0] == refused[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rate", [1e-6, pytest.param(0.05, marks=pytest.mark.slow)])
def test_the_guided_rate_may_lie_beyond_those_that_are_searched(as_process, monkeypatch, rate):
    seen = results(_score, monkeypatch)
    best = as_process(0, weight_decay=rate)
    assert seen[1][1] == rate
    assert as_process(1, weight_decay=rate) == best
    for rank in (0, 1):  # now the second has copies of the first one's runs
        assert as_process(rank, weight_decay=rate) == best
    assert len(seen) == 2 * 5


def test_a_search_goes_on_only_where_its_scores_would_be_the_same(
    residual, examples, as_process, monkeypatch, tmp_path
):
    results(_score, monkeypatch)
    as_process(0)
    with pytest.raises(BnpatchError, match=r"settings\.workers differs"):
        as_process(0, workers=2)
    monkeypatch.setattr(technique_search, "start", lambda: None)
    settings, database = FineTuneSettings(batch_size=8), tmp_path / "choose.db"
    with pytest.raises(BnpatchError, match=r"choose\.db is of another search: processes differs"):
        technique_search.by_search(residual, examples, settings, trials=5, database=database, resume=True)


def test_a_database_that_cannot_be_removed_is_named(residual, examples, tmp_path):
    (database := tmp_path / "choose.db").mkdir()
    with pytest.raises(BnpatchError, match=r"cannot use sqlite:///.*choose\.db for a study"):
        technique_search.by_search(residual, examples, FineTuneSettings(batch_size=8), database=database)


def _trials(database):
    return optuna.load_study(study_name="choose", storage=f"sqlite:///{database}").trials


def test_search_survives_runs_that_diverge_unless_all_do(residual, examples, monkeypatch):
    settings = FineTuneSettings(batch_size=8)
    results(lambda spec, rate: None if rate else 0.5, monkeypatch)
    assert technique_search.by_search(residual, examples, settings, trials=8).norm_decay is None
    results(lambda spec, rate: None, monkeypatch)
    with pytest.raises(BnpatchError, match="every run diverged"):
        technique_search.by_search(residual, examples, settings, trials=3)


def test_a_run_that_its_last_step_ruins_has_diverged(residual, examples, monkeypatch, tmp_path):
    step, steps, told = Engine.step, [], []

    def ruin(engine, update):
        step(engine, update)
        steps.append(update)
        if len(steps) == 4:  # the last of the first run
            next(engine.module.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Engine, "step", ruin)
    settings = FineTuneSettings(batch_size=8)
    options = {"trials": 3, "epochs": 1, "database": tmp_path / "choose.db"}
    best = technique_search.by_search(
        residual, examples, settings, **options, callbacks=Callbacks(tell=told.append)
    )
    assert [line.endswith(": given up") for line in told] == [True, False, False]
    assert technique_search.by_search(residual, examples, settings, **options, resume=True) == best
    assert len(steps) == 3 * 4  # nothing came again


def test_a_model_that_is_broken_before_it_is_trained_ends_the_search(residual, examples):
    broken = replace(residual, module=copy.deepcopy(residual.module))
    next(b for name, b in broken.module.named_buffers() if "running_mean" in name).fill_(float("nan"))
    with pytest.raises(OutputsNotFiniteError, match="check the weights"):
        technique_search.by_search(broken, examples, FineTuneSettings(batch_size=8), trials=3, epochs=1)


def test_contributions_come_one_by_one(residual):
    decay = NormDecay(0.01)
    settings = FineTuneSettings(batch_size=32, spec=NormSpec.ghost(4), norm_decay=decay)
    found = variants(residual, settings)
    trained = [(s.spec, s.norm_decay, tuned) for s, tuned in found.values()]
    plain, pooled = NormSpec.batch(), NormSpec.batch_group(techniques.CHANNELS_PER_GROUP)
    assert trained == [
        (plain, None, False),
        (plain, None, True),
        (NormSpec.ghost(4), None, False),
        (plain, decay, False),
        (pooled, None, False),
        (NormSpec.ghost(4), decay, True),
    ]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"batch_size": 2}, ["Batch/Group Norm of 16 channels and all examples"]),
        (
            {"batch_size": 32, "spec": NormSpec.batch_group(8, 4)},
            ["Ghost Batch Norm of 8 examples", "Batch/Group Norm of 8 channels and 4 examples"],
        ),
    ],
)
def test_each_technique_is_there_once(residual, settings, names):
    found = variants(residual, FineTuneSettings(**settings))
    assert [name for name in found if "Norm of" in name] == names
    assert str(found["all"][0].spec) == names[-1]


def test_changes_have_an_interval_where_there_are_seeds():
    one, three = (
        Contribution("x", {"accuracy": [0.5] * n, "cross-entropy": [1.0] * n}, changes).to_json()["cells"]
        for n, changes in (
            (1, {"accuracy": [0.01], "cross-entropy": [-0.1]}),
            (3, {"accuracy": [0.01, 0.02, 0.03], "cross-entropy": [-0.1, -0.2, -0.3]}),
        )
    )
    assert one[1] == "+1.00"
    assert three[1] == "+2.00 [-0.48, +4.48]"  # 4.3027 (Student, 2 degrees) * 0.01 / sqrt(3) = 0.0248
    assert three[3] == "-0.2000 [-0.4484, +0.0484]"
