import itertools
from argparse import Namespace

import pytest
import timm
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.checkpoint import read_checkpoint
from tests.nn.norms import settle

MODEL = settle(timm.create_model("test_resnet", num_classes=3))
STATE = MODEL.state_dict()
OTHER = settle(timm.create_model("test_resnet", num_classes=3), seed=1).state_dict()
LARGER = timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict()
FIRST = "conv1.0.weight" if "conv1.0.weight" in STATE else next(iter(STATE))


def under(prefix, state=STATE):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def load(tmp_path, content, **kwargs):
    torch.save(content, tmp_path / "model.pt")
    return bnpatch.load(tmp_path / "model.pt", **kwargs)


def takes(loaded, state=STATE):
    ours = loaded.module.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[key], state[key]) for key in state)


LOSS = {"criterion.weight": torch.ones(3), "criterion.bank": torch.full((4,), torch.nan)}
EXTRA = {
    "a loss": {**STATE, **LOSS},
    "a loss of a wrapped model": {**under("model"), **LOSS},
    "thop's counters": {**STATE, "total_ops": torch.zeros(1), "bn1.total_params": torch.zeros(1)},
    "a teacher": {**under("teacher", OTHER), **under("student")},
    "a teacher beside a model": {**under("teacher.net", OTHER), **under("model.net")},
    "an average": {**under("ema.module", OTHER), **under("model")},
    "momentum contrast": {**under("encoder_k", OTHER), **under("encoder_q"), "queue": torch.ones(2)},
    "a prefix that no list has": under("trunk.inner.wrapped"),
    "a prefix that no list has, and a metric": {**under("trunk.inner"), "train_acc.total": torch.ones(1)},
}


@pytest.mark.parametrize("name", EXTRA)
def test_the_model_is_found_among_more(name, tmp_path):
    loaded = load(tmp_path, EXTRA[name])
    assert takes(loaded)
    left = [note for note in loaded.notes if note.startswith("left out")]
    assert bool(left) == (name not in ("thop's counters", "a prefix that no list has"))


@pytest.mark.parametrize("norm", [{}, {"fc.1.weight": torch.ones(8), "fc.1.running_mean": torch.zeros(8)}])
def test_a_head_of_several_layers_is_left_out_and_said(tmp_path, norm):
    """As momentum contrast (MoCo v2) and SimCLR write theirs: there is no classifier in it."""
    body = {key: t for key, t in STATE.items() if not key.startswith("fc.")}
    wide = STATE["fc.weight"].shape[1]
    mlp = {"fc.0.weight": torch.ones(8, wide), "fc.0.bias": torch.ones(8), **norm}
    mlp |= {"fc.2.weight": torch.ones(4, 8), "fc.2.bias": torch.ones(4)}
    query = {f"module.encoder_q.{key}": t for key, t in {**body, **mlp}.items()}
    key = {f"module.encoder_k.{key}": t for key, t in {**body, **mlp}.items()}
    loaded = load(
        tmp_path, {**query, **key, "module.queue": torch.ones(4, 9), "module.queue_ptr": torch.ones(1)}
    )
    assert loaded.num_outputs() == wide
    said = " ".join(loaded.notes)
    assert "left out a head of several layers (fc.0.bias, fc.0.weight" in said
    assert "the outputs are features, not classes" in said
    assert torch.equal(loaded.module.state_dict()["bn1.running_mean"], STATE["bn1.running_mean"])
    assert load(tmp_path, query, arch="timm:test_resnet").num_outputs() == wide


def test_notes_say_what_was_left_out(tmp_path):
    notes = load(tmp_path, {**under("student"), **under("teacher", OTHER), **LOSS}).notes
    assert f"left out {len(STATE) + 2} tensors beside the model: teacher.*, criterion.*" in notes


def test_a_head_beside_the_model_is_not_left_out_in_silence(tmp_path):
    content = {**under("backbone"), "head.weight": torch.ones(2, 3), "head.bias": torch.ones(2)}
    with pytest.raises(
        BnpatchError, match=r"under backbone\. are those of timm:test_.*head\.weight"
    ) as error:
        load(tmp_path, content)
    assert "--arch timm:test_resnet leaves these out" in str(error.value)
    loaded = load(tmp_path, content, arch="timm:test_resnet")  # the remedy
    assert takes(loaded)
    assert "left out 2 tensors beside the model: head.*" in loaded.notes


ELSEWHERE = {
    "a key of its own": {"network": STATE, "epoch": 3},
    "a key of its own, in a dictionary": {"best": {"model": STATE}},
    "a student": {"student": under("module"), "teacher": OTHER, "optimizer": {"state": {}}},
    "a student with a head": {
        "teacher": {**under("backbone", OTHER), "head.mlp.weight": torch.ones(2, 3)},
        "student": under("module.backbone"),
    },
    "parts": {
        "encoder": {key: t for key, t in STATE.items() if not key.startswith("fc.")},
        "classifier": {"weight": STATE["fc.weight"], "bias": STATE["fc.bias"]},
        "random": {"cpu": torch.zeros(9, dtype=torch.uint8)},
    },
    "averaged weights alone": {"weights_ema": STATE},
    "arrays": {key: tensor.numpy() for key, tensor in STATE.items()},
    "arrays in a dictionary": {"model": {key: tensor.numpy() for key, tensor in STATE.items()}, "epoch": 3},
    "counters": {**under("online_model"), "initted": torch.tensor([True]), "step": torch.tensor(7)},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_weights_may_be_anywhere(name, tmp_path):
    loaded = load(tmp_path, ELSEWHERE[name])
    assert takes(loaded)
    assert any("left out" in note and "teacher" in note for note in loaded.notes) == ("student" in name)


AVERAGES = {
    "timm": {"state_dict": STATE, "state_dict_ema": OTHER},
    "ema": {"model": STATE, "ema": OTHER},
    "model_ema": {"model": STATE, "model_ema": under("module", OTHER)},
    "ema_state_dict": {"model": STATE, "ema_state_dict": OTHER},
    "averaged_model": {
        "model": STATE,
        "averaged_model": {"n_averaged": torch.tensor(2), **under("module", OTHER)},
    },
    "swa": {"model": STATE, "swa_state_dict": OTHER},
    "in a dictionary of its own": {"model": STATE, "ema": {"module": OTHER, "updates": 100}},
    "ema_pytorch": {
        "model": STATE,
        "ema": {**under("online_model"), **under("ema_model", OTHER), "step": torch.tensor(1)},
    },
    "a callback of Lightning": {
        "state_dict": under("model"),
        "callbacks": {"EMA": {"ema_weights": under("model", OTHER)}},
    },
    "a list": {"state_dict": under("model"), "callbacks": {"EMA": {"ema_weights": list(OTHER.values())}}},
    "a list at the top": {"state_dict": under("model"), "ema_weights": list(OTHER.values())},
    "Lightning's WeightAveraging": {
        "state_dict": under("model", OTHER),
        "current_model_state": under("model"),
    },
    "beside the model": {"state_dict": {**under("model"), **under("ema_model.module", OTHER)}},
    "a teacher": {"student": under("module"), "teacher": OTHER},
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averaged_weights_have_many_names(name, tmp_path):
    assert takes(load(tmp_path, AVERAGES[name], use_ema=True), OTHER)


@pytest.mark.parametrize("ema", [None, 0.999, {"decay": 0.9}, [torch.ones(1)]])
def test_no_averaged_weights_and_the_remedy(ema, tmp_path):
    with pytest.raises(BnpatchError, match=r"no averaged weights.*; leave out --use-ema"):
        load(tmp_path, {"model": STATE, "ema": ema}, use_ema=True)
    assert takes(load(tmp_path, {"model": STATE, "ema": ema}))


def test_remedies_do_not_point_at_each_other(tmp_path):
    with pytest.raises(BnpatchError, match="they fit timm:test_resnet: name that, or leave out --arch"):
        load(tmp_path, STATE, arch="resnet18")
    assert takes(load(tmp_path, STATE, arch="timm:test_resnet"))
    assert takes(load(tmp_path, STATE))
    strange = {"w": torch.zeros(3)}
    messages = []
    for arch in (None, "resnet18"):
        with pytest.raises(BnpatchError, match=r"bnpatch\.tune_alpha\(module, data\)") as error:
            load(tmp_path, strange, arch=arch)
        messages.append(str(error.value))
    assert not any("--arch" in message for message in messages)


def test_a_whole_model_needs_no_architecture(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(BnpatchError, match="add --unsafe-load"):
        load(tmp_path, module, arch="resnet18")
    with pytest.raises(BnpatchError, match="holds a whole model; leave out --arch"):
        load(tmp_path, module, arch="resnet18", unsafe_load=True)
    assert load(tmp_path, module, unsafe_load=True).module[0].out_channels == 4


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


BAD = {
    "is no dense tensor .*to_dense": lambda t: t.to_sparse(),
    r"is no dense tensor \(sparse_csr\)": lambda t: t.flatten(1).to_sparse_csr(),
    "has no values, only a shape": lambda t: t.to("meta"),
    "is quantized": quantized,
    r"claims 1099511627776 elements and holds 1; .* at most 268435456; save it after \.contiguous": (
        lambda t: torch.zeros(1).expand(1 << 40)
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("message", BAD)
def test_tensors_of_other_kinds_are_refused_by_name(message, tmp_path):
    torch.save({**STATE, FIRST: BAD[message](STATE[FIRST])}, tmp_path / "model.pt")
    with pytest.raises(BnpatchError, match=message) as error:
        bnpatch.load(tmp_path / "model.pt")
    assert FIRST in str(error.value)
    assert "model.pt" in str(error.value)


def test_small_expanded_tensors_are_read(tmp_path):
    state = {**STATE, "bn1.bias": torch.zeros(1).expand(STATE["bn1.bias"].shape)}
    assert takes(load(tmp_path, state), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions(dtype, tmp_path):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in STATE.items()}
    loaded = load(tmp_path, state)
    assert all(p.dtype == torch.float32 for p in loaded.module.parameters())
    assert takes(loaded, {key: value.to(STATE[key].dtype) for key, value in state.items()})
    half = bnpatch.load(settle(timm.create_model("test_resnet", num_classes=3)).to(dtype))
    half.set_alphas(0.1)
    assert half.predict(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 3)


@pytest.mark.parametrize("value", ["eight", None, -1, True, [8], 2.5])
def test_training_arguments_of_other_types(value, tmp_path):
    loaded = load(tmp_path, {"model": STATE, "args": {"batch_size": value, "model": value}})
    assert loaded.train_batch_size is None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_names_that_are_no_strings(tmp_path):
    content = dict(itertools.chain([(1, torch.ones(1))], STATE.items()))
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(BnpatchError, match="no weights that bnpatch can find among its keys 1, "):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "about",
    [
        {"model_name": "tf_efficientnet_b0"},
        {"arch": "own_net", "config": {"model": {"name": "timm/tf_efficientnet_b0.ns_jft_in1k"}}},
        {"hyper_parameters": {"encoder_name": "tf_efficientnet_b0_ns", "optimizer": "adam"}},
        {"args": Namespace(backbone="tf_efficientnet_b0", teacher="resnet50")},
        {"teacher": {"arch": "resnet50"}, "student": {"arch": "tf_efficientnet_b0"}},
        {"args": {"model": "tf_efficientnet_b0"}, "pretrained": "resnet50"},
    ],
)
def test_the_architecture_is_named_anywhere(about, tmp_path):
    """It decides between architectures with the same tensors, which compute otherwise."""
    torch.save({"model": {"w": torch.ones(1)}, **about}, tmp_path / "model.pt")
    arch = read_checkpoint(tmp_path / "model.pt").arch
    assert arch.removeprefix("timm:") == "tf_efficientnet_b0"


def test_a_name_that_no_library_has_stays_where_nothing_else_is_said(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "arch": "own_net", "loss": "resnet50"}, tmp_path / "model.pt")
    assert read_checkpoint(tmp_path / "model.pt").arch == "own_net"
