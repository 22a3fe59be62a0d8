import copy
import json
import shutil
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import bnpatch
import bnpatch.models.architecture
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from tests.models.small import bare
from tests.nn.norms import images, settle


def same(loaded, model, *shape):
    x = images(*(shape or (2, 3, 64, 64)))
    with torch.inference_mode():
        assert torch.equal(loaded.predict(x), model(x))


def test_a_bare_state_dict_loads_without_a_flag(tmp_path):
    model, path = bare(tmp_path, num_classes=7)
    loaded = bnpatch.load(path)
    same(loaded, model)
    assert loaded.num_outputs() == 7
    assert "timm:test_resnet, identified by its tensors" in loaded.notes[0]
    assert loaded.preprocessing.source == "timm's default for test_resnet"


def test_torchvision_checkpoint(tmp_path):
    model, path = bare(tmp_path, "torchvision", "resnet18", num_classes=7)
    loaded = bnpatch.load(path)
    same(loaded, model)
    assert loaded.class_order == "plain"
    assert loaded.preprocessing.input_size == (3, 224, 224)
    assert "torchvision's default" in loaded.preprocessing.source


def test_averaged_weights(tmp_path):
    model = settle(timm.create_model("test_resnet"))
    averaged = settle(timm.create_model("test_resnet"), seed=1)
    path = tmp_path / "last.pth.tar"
    torch.save(
        {"arch": "test_resnet", "state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()},
        path,
    )
    same(bnpatch.load(path), model)
    same(bnpatch.load(path, use_ema=True), averaged)


def test_a_hub_folder(tmp_path):
    model = settle(timm.create_model("test_resnet", num_classes=4))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    cfg = {
        "mean": [0.1, 0.2, 0.3],
        "input_size": [3, 64, 64],
        "num_classes": 4,
        "label_names": ["a", "b", "c", "d"],
    }
    content = {
        "architecture": "test_resnet",
        "num_classes": 4,
        "pretrained_cfg": cfg,
        "label_names": cfg["label_names"],
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = bnpatch.load(tmp_path)
    same(loaded, model)
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)
    assert loaded.class_names == ("a", "b", "c", "d")


def test_a_model_of_the_hub_from_its_cache(tmp_path, monkeypatch):
    """hf-hub: names, served from a cache folder in the hub's real layout."""
    import huggingface_hub.constants as constants

    model = settle(timm.create_model("test_resnet", num_classes=4))
    snapshot = tmp_path / "models--org--net" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--net" / "refs").mkdir()
    (tmp_path / "models--org--net" / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    content = {"architecture": "test_resnet", "num_classes": 4, "pretrained_cfg": {"num_classes": 4}}
    (snapshot / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(bnpatch.load("hf-hub:org/net"), model)


@pytest.mark.parametrize(
    "name", ["timm:test_resnet.r160_in1k", "hf-hub:org/no-such-net", "torchvision:resnet18"]
)
def test_names_that_need_a_download_say_so_in_one_line(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(
        BnpatchError, match=r"cannot (load|download) .*download the weights and give the file"
    ) as error:
        bnpatch.load(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, partial(torch.compile, backend="eager")]
)
def test_a_wrapped_module_is_preprocessed_as_what_it_wraps(wrap):
    module = timm.create_model("test_resnet", num_classes=7).eval()
    module.pretrained_cfg = {**module.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    model = bnpatch.load(wrap(module))
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert (model.name, model.num_outputs()) == ("ResNet", 7)
    patched = bnpatch.apply(wrap(module), bnpatch.load(copy.deepcopy(module)).recipe())
    assert bnpatch.inventory(patched).norm_layers


def test_suffixes_in_capitals(exported, foggy, tmp_path):
    shutil.copy(exported, tmp_path / "MODEL.ONNX")
    np.savez(tmp_path / "DATA.npz", x=foggy[0][:4], y=foggy[1][:4])
    (tmp_path / "DATA.npz").rename(tmp_path / "DATA.NPZ")
    model = bnpatch.load(tmp_path / "MODEL.ONNX")
    assert model.runs_onnx
    assert len(bnpatch.open_examples(tmp_path / "DATA.NPZ", model)) == 4


def test_refuses_what_is_not_there(tmp_path):
    for name, message in {
        "timm:resnt18": "no architecture 'resnt18' in (timm|torchvision); did you mean",
        "torchvision:resnt18": "no architecture 'resnt18' in (timm|torchvision); did you mean",
        "resnet18": "no file resnet18; give a file or torchvision:resnet18 or timm:resnet18",
        "nope.pt": "cannot read nope.pt: no such file",
        str(tmp_path): "is a folder",
    }.items():
        with pytest.raises(BnpatchError, match=message):
            bnpatch.load(name)


def test_a_wrong_arch_is_refused(tmp_path):
    _, path = bare(tmp_path)
    with pytest.raises(BnpatchError, match="do not fit torchvision:resnet18"):
        bnpatch.load(path, arch="torchvision:resnet18")
    assert str(bnpatch.load(path, arch="test_resnet").arch) == "timm:test_resnet"


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = timm.create_model("test_resnet")
    model.layer1[0].bn1.running_var[0] = float("nan")
    with pytest.raises(BnpatchError, match=r"running_var of norm layer 'layer1\.0\.bn1' is not finite"):
        bnpatch.load(model)


def test_a_patched_checkpoint_comes_back_patched(tmp_path, checkpoint):
    loaded = bnpatch.load(checkpoint)
    loaded.set_alphas(0.2)
    loaded.save(tmp_path / "patched.pt", loaded.recipe())
    again = bnpatch.load(tmp_path / "patched.pt")
    assert again.alphas() == loaded.alphas()
    assert again.class_names == loaded.class_names
    assert again.preprocessing.to_json() | {"source": ""} == loaded.preprocessing.to_json() | {"source": ""}
    x = images(2, 1, 32, 32)
    assert torch.equal(again.predict(x), loaded.predict(x))
    plain = torch.load(tmp_path / "patched.pt", weights_only=True)["state_dict"]
    timm.create_model("test_resnet", num_classes=10, in_chans=1).load_state_dict(plain)  # without bnpatch too


class Own(nn.Sequential):
    """An architecture that no library has."""


def test_a_module_of_ones_own_is_pickled_whole(tmp_path):
    loaded = bnpatch.load(
        settle(Own(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    )
    loaded.set_alphas(0.2)
    path = tmp_path / "patched.pt"
    loaded.save(path, loaded.recipe())
    with pytest.raises(BnpatchError, match=r"--unsafe-load"):
        bnpatch.load(path)
    again = bnpatch.load(path, unsafe_load=True)
    assert again.alphas() == {"1": 0.2}
    same(again, loaded.module)


def test_apply_checks_that_the_recipe_is_for_this_model(tmp_path):
    model = settle(timm.create_model("test_resnet"))
    patched = bnpatch.load(model)
    patched.set_alphas(0.2)
    patched.recipe(provenance={"seed": 0}).save(tmp_path / "recipe.json")
    twin = settle(timm.create_model("test_resnet"))
    twin.load_state_dict(model.state_dict())
    assert bnpatch.apply(twin, tmp_path / "recipe.json") is twin
    assert {norm_layer.alpha for norm_layer in bnpatch.inventory(twin).norm_layers} == {0.2}
    stranger = settle(timm.create_model("test_resnet"), seed=1)
    with pytest.raises(BnpatchError, match=r"parameters of norm layer 'conv1\.1' differ"):
        bnpatch.apply(stranger, Recipe.load(tmp_path / "recipe.json"))
    assert not any(norm_layer.alpha for norm_layer in bnpatch.inventory(stranger).norm_layers)


def test_borrowing_gives_back(checkpoint):
    loaded = bnpatch.load(checkpoint)
    loaded.module.train()
    types = [type(m) for m in loaded.module.modules()]

    def change_and_be_interrupted():
        with loaded.borrowed():
            assert not loaded.module.training
            loaded.set_alphas(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change_and_be_interrupted()
    assert [type(m) for m in loaded.module.modules()] == types
    assert all(m.training for m in loaded.module.modules())
    name = loaded.inventory().norm_layers[2].name
    module = bnpatch.patch(loaded.module, 0.1, where=lambda norm_layer: norm_layer.name == name)
    loaded = bnpatch.load(module)
    with loaded.borrowed():
        loaded.set_alphas(0.3)
    assert {n.name: n.alpha for n in loaded.inventory().norm_layers if n.patched} == {name: 0.1}
    assert {n: a for n, a in loaded.alphas().items() if a} == {name: 0.1}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: {"logits": y}, None),
        (lambda y: (y, y), None),
        (lambda y: y[..., None, None], None),
        (str, "returns a str"),
    ],
)
def test_outputs_are_looked_for(output, message):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return output(self.bn(x).mean((2, 3)))

    loaded = bnpatch.load(Wrapped())
    if message:
        with pytest.raises(BnpatchError, match=message):
            loaded.num_outputs()
    else:
        assert loaded.num_outputs() == 3


def test_an_input_that_the_model_refuses_is_said():
    loaded = bnpatch.load(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(BnpatchError, match=r"does not take an input of shape \(1, 5, 8, 8\)"):
        loaded.predict(torch.zeros(1, 5, 8, 8))
    with pytest.raises(BnpatchError, match=r"not one number per class; .* a metric of your own in Python"):
        loaded.num_outputs()


def test_half_precision_and_amp(checkpoint, clean):
    x = torch.from_numpy(clean[0][:8, None])
    full = bnpatch.load(checkpoint).predict(x)
    amp = bnpatch.load(checkpoint, amp=True, device="cpu").predict(x)
    half = bnpatch.load(bnpatch.load(checkpoint).module.bfloat16())
    half.preprocessing = bnpatch.load(checkpoint).preprocessing
    assert half.predict(torch.zeros(1, 1, 32, 32)).dtype == torch.bfloat16
    # bfloat16 rounds by up to 0.4%, in each of 15 layers: ten seeds of the classifier gave 1.6% to 3.6%.
    deviation = (amp.float() - full).norm() / full.norm()
    assert 0 < deviation < 0.06


def test_an_unknown_device_is_refused(checkpoint):
    with pytest.raises(BnpatchError, match="no device 'tpu9' here"):
        bnpatch.load(checkpoint, device="tpu9")


def test_a_model_that_its_name_does_not_give_again_is_pickled(tmp_path):
    """Constructor arguments change what a model computes without changing any tensor."""
    module = settle(timm.create_model("test_resnet", num_classes=4, act_layer="silu"))
    loaded = bnpatch.load(module)
    loaded.arch = bnpatch.models.architecture.fit("timm:test_resnet", module.state_dict())
    loaded.set_alphas(0.1)
    loaded.save(tmp_path / "patched.pt", loaded.recipe())
    same(bnpatch.load(tmp_path / "patched.pt", unsafe_load=True), loaded.module)


def test_evaluation_does_not_train(checkpoint, clean):
    loaded = bnpatch.load(checkpoint)
    loaded.module.train()
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    bnpatch.evaluate(loaded, bnpatch.open_examples(clean, loaded))
    assert loaded.module.training
    assert all(torch.equal(value, before[name]) for name, value in loaded.module.state_dict().items())


@pytest.mark.parametrize(("side", "threads", "sizes"), [(224, 2, [4, 4, 2]), (224, 8, [8, 2]), (32, 2, [10])])
def test_a_cpu_takes_large_images_few_at_a_time(side, threads, sizes, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = bnpatch.load(nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4), *pool))
    rng = np.random.default_rng(0)
    data = rng.normal(size=(10, 3, side, side)).astype(np.float32), rng.integers(0, 3, 10)
    examples = bnpatch.open_examples(data, model)
    whole = bnpatch.evaluate(model, examples)  # also asks the model for its outputs
    seen = []
    model.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    assert bnpatch.evaluate(model, examples).values.keys() == whole.values.keys()
    assert seen == sizes


def test_probabilities_are_told_from_logits(checkpoint, clean):
    logits = bnpatch.load(checkpoint)
    softmax = bnpatch.load(nn.Sequential(bnpatch.load(checkpoint).module, nn.Softmax(1)))
    softmax.preprocessing = logits.preprocessing
    scores = [
        bnpatch.evaluate(m, bnpatch.open_examples(clean, m)).values["cross-entropy"]
        for m in (logits, softmax)
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-3, atol=1e-5)  # float32 rounding
