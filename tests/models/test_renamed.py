"""Architectures that timm and torchvision have, in weights with other names."""

import json
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.architecture import Architecture
from bnpatch.models.renamed import candidates
from tests.nn.norms import images, settle


@pytest.fixture(scope="module")
def resnet():
    return settle(torchvision.models.resnet18(num_classes=6))


def loaded(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "model.pth")
    return bnpatch.load(tmp_path / "model.pth", device="cpu")


def assert_same(model, module, side=64):
    x = images(2, 3, side, side)
    with torch.inference_mode():
        # The same layers with the same weights; only the forms of some activations differ.
        torch.testing.assert_close(model.module(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prefixes",
    [
        {"fc.": "head.fc.", "": "backbone."},  # mmpretrain
        {"fc.": "classifier."},
        {"fc.": "net.linear.", "": "net.encoder."},
    ],
)
def test_a_resnet_with_other_prefixes(prefixes, resnet, tmp_path):
    def renamed(key):
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        return key if prefix is None else prefixes[prefix] + key.removeprefix(prefix)

    content = {renamed(key): tensor for key, tensor in resnet.state_dict().items()}
    model = loaded(tmp_path, {**content, "criterion.weight": torch.ones(6)})
    assert_same(model, resnet)
    assert any("check that the accuracy is what you know it to be" in note for note in model.notes)


@pytest.mark.parametrize(
    ("body", "head"),
    [("backbone.", "head."), ("model.encoder.", "model.classifier.1."), ("backbone._orig_mod.", "fc.")],
)
def test_a_classifier_of_ones_own_after_any_model_of_timm(body, head, tmp_path):
    module = settle(timm.create_model("test_efficientnet", num_classes=4))
    content = {}
    for key, tensor in module.state_dict().items():
        is_head = key.startswith("classifier.")
        content[head + key.removeprefix("classifier.") if is_head else body + key] = tensor
    model = loaded(tmp_path, content)
    assert_same(model, module)
    assert any("the classifier has another name" in note for note in model.notes)
    # What is beside body and classifier may be part of the model.
    with pytest.raises(BnpatchError, match="fit no architecture"):
        loaded(tmp_path, {**content, "pool.p": torch.ones(1)})


def test_shortcuts_may_come_before_the_other_branch(resnet, tmp_path):
    """As they are defined in many projects; names are those of a module that was written anew."""
    content = {}
    for key, tensor in resnet.state_dict().items():
        name = re.sub(r"layer(\d)\.(\d)\.", r"stages.\1.blocks.\2.", key).replace("downsample", "shortcut")
        content[name] = tensor
    keys = sorted(content, key=lambda key: (_block(key), "shortcut" not in key))
    assert keys != list(content)
    assert_same(loaded(tmp_path, {key: content[key] for key in keys}), resnet)


def _block(key):
    found = re.match(r"stages\.(\d)\.blocks\.(\d)", key)
    return found.groups() if found else ("9",) if key.startswith("fc") else ("0",)


def test_layers_in_a_sequence_without_a_classifier_give_features(resnet, tmp_path):
    body = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    model = loaded(tmp_path, body.state_dict())
    assert_same(model, body.eval())
    assert "the weights have no classifier: the outputs are features, not classes" in model.notes


def test_an_efficientnet_that_is_named_as_in_efficientnet_pytorch(tmp_path):
    module = settle(timm.create_model("tf_efficientnet_lite0", num_classes=5))
    model = loaded(tmp_path, _as_efficientnet_pytorch(module.state_dict()))
    assert str(model.arch) == "timm:tf_efficientnet_lite0"
    assert_same(model, module)


def _as_efficientnet_pytorch(state_dict):
    names = {
        "conv_stem": "_conv_stem",
        "bn1": "_bn0",
        "conv_head": "_conv_head",
        "bn2": "_bn1",
        "classifier": "_fc",
    }
    blocks = list(dict.fromkeys(re.findall(r"blocks\.\d+\.\d+\.", " ".join(state_dict))))
    content = {}
    for key, tensor in state_dict.items():
        block = next((block for block in blocks if key.startswith(block)), None)
        if block is None:
            module, _, role = key.partition(".")
            content[f"{names[module]}.{role}"] = tensor
        else:
            content[f"_blocks.{blocks.index(block)}._{key.removeprefix(block)}"] = tensor
    return content


def test_other_shapes_are_no_match(resnet, tmp_path):
    content = {f"own.{key}": tensor for key, tensor in resnet.state_dict().items()}
    content["own.layer3.0.conv2.weight"] = torch.zeros(256, 256, 5, 5)
    with pytest.raises(BnpatchError, match="fit no architecture"):
        loaded(tmp_path, content)


HUGGING_FACE = {
    "resnet18": (
        (r"conv1\.", "resnet.embedder.embedder.convolution."),
        (r"bn1\.", "resnet.embedder.embedder.normalization."),
        (r"layer(\d)\.(\d+)\.downsample\.0\.", "resnet.encoder.stages.{}.layers.{}.shortcut.convolution."),
        (r"layer(\d)\.(\d+)\.downsample\.1\.", "resnet.encoder.stages.{}.layers.{}.shortcut.normalization."),
        (r"layer(\d)\.(\d+)\.conv(\d)\.", "resnet.encoder.stages.{}.layers.{}.layer.{}.convolution."),
        (r"layer(\d)\.(\d+)\.bn(\d)\.", "resnet.encoder.stages.{}.layers.{}.layer.{}.normalization."),
        (r"fc\.", "classifier.1."),
    ),
}


def test_a_folder_that_hugging_face_saved(resnet, tmp_path):
    """Its file has the tensors in the order of their names."""
    content = {}
    for key, tensor in resnet.state_dict().items():
        pattern, name = next((p, n) for p, n in HUGGING_FACE["resnet18"] if re.match(p, key))
        stage, layer, *number = [*map(int, re.match(pattern, key).groups()), 0, 0, 0]
        content[name.format(stage - 1, layer, number[0] - 1) + re.sub(pattern, "", key)] = tensor.contiguous()
    save_file(content, tmp_path / "model.safetensors")
    labels = {str(index): f"class {index}" for index in range(6)}
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "id2label": labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "size": {"shortest_edge": 64},
        "crop_pct": 0.875,
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    model = bnpatch.load(tmp_path, device="cpu")
    assert_same(model, resnet)
    assert model.class_names == tuple(labels.values())
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)


def _unit(name, conv="convolution", norm="normalization"):
    """Names of a convolution and of its Batch Norm in Hugging Face's library."""
    return [f"{name}.{conv}", f"{name}.{norm}"]


def _mobilenet_v1():
    layers = [f"mobilenet_v1.layer.{index}" for index in range(26)]
    return [part for name in ("mobilenet_v1.conv_stem", *layers) for part in _unit(name)]


def _mobilenet_v2():
    stem = [f"conv_stem.{unit}" for unit in ("first_conv", "conv_3x3", "reduce_1x1")]
    layers = [
        f"layer.{index}.{unit}" for index in range(16) for unit in ("expand_1x1", "conv_3x3", "reduce_1x1")
    ]
    return [part for name in (*stem, *layers, "conv_1x1") for part in _unit(f"mobilenet_v2.{name}")]


def _efficientnet_b0():
    names = _unit("efficientnet.embeddings", norm="batchnorm")
    for index in range(16):
        block = f"efficientnet.encoder.blocks.{index}"
        names += _unit(f"{block}.expansion", "expand_conv", "expand_bn") if index else []
        names += _unit(f"{block}.depthwise_conv", "depthwise_conv", "depthwise_norm")
        names += [f"{block}.squeeze_excite.reduce", f"{block}.squeeze_excite.expand"]
        names += _unit(f"{block}.projection", "project_conv", "project_bn")
    return names + _unit("efficientnet.encoder", "top_conv", "top_bn")


IN_ORDER = {
    "tf_mobilenetv1_025": _mobilenet_v1,
    "tf_mobilenetv2_035": _mobilenet_v2,
    "tf_efficientnet_b0": _efficientnet_b0,
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("tf_mobilenetv2_035", "tf_efficientnet_b0")]


@pytest.fixture(params=["tf_mobilenetv1_025", *SLOW])
def in_alphabetical_order(request, tmp_path):
    """A folder that Hugging Face's library saves, and the model of timm that computes the same."""
    module = settle(Architecture("timm", request.param, num_classes=4).build())
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in module.state_dict()))
    names = dict(zip(modules, [*IN_ORDER[request.param](), "classifier"], strict=True))
    content = {}
    for key, tensor in module.state_dict().items():
        place, _, role = key.rpartition(".")
        content[f"{names[place]}.{role}"] = tensor.contiguous()
    save_file(content, tmp_path / "model.safetensors")
    config = {"model_type": names[modules[0]].split(".")[0]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, module, config


def test_mobilenets_and_efficientnets_of_hugging_face(in_alphabetical_order):
    """Padding is that of TensorFlow: at stride 2 it lies at the end alone."""
    folder, module, _ = in_alphabetical_order
    model = bnpatch.load(folder, device="cpu")
    assert_same(model, module)
    model.set_alphas(0.2)
    assert model.save(folder / "patched.pt", model.recipe())  # by the name of its architecture
    again = bnpatch.load(folder / "patched.pt", device="cpu")
    x = images(2, 3, 64, 64)
    torch.testing.assert_close(again.module(x), model.module(x))


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("resnet", {"downsample_in_bottleneck": True}),
        ("mobilenet_v2", {"tf_padding": False}),
        ("efficientnet", {"hidden_act": "relu"}),
    ],
)
def test_a_configuration_of_another_architecture_is_refused(family, change, resnet, tmp_path):
    """Its tensors would fit, and the outputs would be wrong."""
    save_file({key: t.contiguous() for key, t in resnet.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    bnpatch.load(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **change}))
    with pytest.raises(BnpatchError, match=rf"config.json says {next(iter(change))} = .*no {family}"):
        bnpatch.load(tmp_path, device="cpu")


def test_the_architecture_of_renamed_tensors_can_be_chosen(resnet, tmp_path):
    content = {f"own.{key}": tensor for key, tensor in resnet.state_dict().items()}
    torch.save(content, tmp_path / "model.pth")
    model = bnpatch.load(tmp_path / "model.pth", arch="timm:resnetblur18", device="cpu")
    assert str(model.arch) == "timm:resnetblur18"
    with pytest.raises(BnpatchError, match="do not fit"):
        bnpatch.load(tmp_path / "model.pth", arch="timm:resnet34")


def test_a_timm_model_that_hugging_face_wrapped(tmp_path):
    module = settle(timm.create_model("test_resnet", num_classes=4))
    content = {f"timm_model.{key}": t.contiguous() for key, t in module.state_dict().items()}
    save_file(content, tmp_path / "model.safetensors")
    config = {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(bnpatch.load(tmp_path, device="cpu"), module)


@pytest.mark.slow
def test_the_numbers_of_tensors_are_right():
    for library, name, count in candidates():
        state_dict = Architecture(library, name).sketch().state_dict()
        assert len([key for key in state_dict if not key.endswith("num_batches_tracked")]) == count, name
