import json
from argparse import Namespace

import numpy as np
import onnx
import pytest
import timm
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.stored_preprocessing import of_hugging_face
from tests.models.onnx_graph import graph

STATE = timm.create_model("test_resnet", num_classes=3).state_dict()
CFG = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 1.0}
CFG |= {"interpolation": "bilinear", "architecture": "test_resnet", "num_classes": 3}
HUB = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 40, 40]}}
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 2,
    "size": {"height": 48, "width": 48},
}


def loaded_with(tmp_path, preprocessing=None, beside=None, arch=None, **content):
    torch.save({"state_dict": STATE, **content} if content else STATE, tmp_path / "model.pt")
    for name, value in (beside or {}).items():
        (tmp_path / name).write_text(json.dumps(value))
    return bnpatch.load(tmp_path / "model.pt", preprocessing=preprocessing, arch=arch)


@pytest.mark.parametrize("key", ["pretrained_cfg", "default_cfg", "cfg", "data_config"])
def test_a_configuration_beside_the_weights(key, tmp_path):
    known = loaded_with(tmp_path, **{key: CFG}).preprocessing
    assert (known.input_size, known.mean, known.std) == ((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (known.interpolation, known.crop_pct) == ("bilinear", 1.0)
    assert known.source == f"the checkpoint's {key}"


@pytest.mark.parametrize("folder", ["", "onnx"])
def test_a_configuration_beside_a_graph(folder, tmp_path):
    """As the hub of Hugging Face has them; the graph may lie in a folder of its own."""
    (place := tmp_path / folder).mkdir(exist_ok=True)
    onnx.save(graph(["n", 3, 8, 8], last="flat"), place / "model.onnx")
    plain = bnpatch.load(place / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate("abcd"))}))
    model = bnpatch.load(place / "model.onnx")
    known = model.preprocessing
    assert (known.mean, known.std, known.crop_mode) == ((0.5,) * 3, (0.25,) * 3, "squash")
    assert known.input_size == (3, 8, 8)  # the graph knows it better
    assert known.source == "preprocessor_config.json beside the file"
    assert (plain.class_names, model.class_names) == (None, tuple("abcd"))
    assert model.notes == ["names of the classes from id2label of config.json"]
    bnpatch.export_onnx(model, place / "again.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**VIT, "image_mean": [0.1] * 3}))
    again = bnpatch.load(place / "again.onnx")  # which has its own
    assert again.preprocessing.mean == (0.5,) * 3
    assert not again.notes


def test_a_configuration_in_the_folder_above_a_graph_is_of_something_else(tmp_path):
    (place := tmp_path / "models").mkdir()
    onnx.save(graph(["n", 3, 8, 8], last="flat"), place / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(VIT))
    assert bnpatch.load(place / "model.onnx").preprocessing.mean != (0.5,) * 3


def test_who_is_believed(tmp_path):
    """The user, then the checkpoint, then the files beside it, then the default of the architecture."""
    beside = {"config.json": HUB, "preprocessor_config.json": VIT}
    args = Namespace(img_size=24, mean=None, input_size=None)
    asked = loaded_with(tmp_path, {"img_size": 16}, beside, args=args, pretrained_cfg=CFG).preprocessing
    assert asked.input_size == (3, 16, 16)
    assert asked.source == "the checkpoint's training arguments and pretrained_cfg, but img_size as asked"
    both = loaded_with(tmp_path, args=args, pretrained_cfg=CFG).preprocessing
    assert (both.input_size, both.mean) == ((3, 24, 24), CFG["mean"])
    assert loaded_with(tmp_path, pretrained_cfg=CFG).preprocessing.input_size == (3, 32, 32)
    hub = loaded_with(tmp_path).preprocessing
    assert (hub.input_size, hub.source) == ((3, 40, 40), "config.json beside the checkpoint")
    (tmp_path / "config.json").unlink()
    vit = loaded_with(tmp_path).preprocessing
    assert (vit.input_size, vit.mean, vit.crop_mode) == ((3, 48, 48), (0.5,) * 3, "squash")
    assert vit.source == "preprocessor_config.json beside the checkpoint"
    (tmp_path / "preprocessor_config.json").unlink()
    default = loaded_with(tmp_path).preprocessing
    assert (default.input_size, default.source) == ((3, 160, 160), "timm's default for test_resnet")
    tag = loaded_with(tmp_path, arch="timm:test_resnet.r160_in1k", pretrained_cfg=CFG).preprocessing
    assert (tag.input_size, tag.source) == ((3, 160, 160), "timm's published test_resnet.r160_in1k")


def test_a_hub_configuration_names_architecture_and_classes(tmp_path):
    hub = {**HUB, "label_names": ["a", "b", "c"]}
    loaded = loaded_with(tmp_path, beside={"config.json": hub})
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.notes == ["names of the classes from label_names of config.json"]


def test_a_hub_configuration_of_another_architecture_is_not_used(tmp_path):
    loaded = loaded_with(tmp_path, beside={"config.json": {**HUB, "architecture": "test_vit"}})
    assert loaded.preprocessing.source == "timm's default for test_resnet"


def test_what_hugging_face_does():
    crop = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    values = of_hugging_face({**crop, "do_center_crop": True, "resample": 3}, "")
    assert (values["input_size"], values["interpolation"]) == ((3, 224, 224), "bicubic")
    assert int(224 / values["crop_pct"]) == 256
    convnext = of_hugging_face({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, "")
    assert (convnext["input_size"], convnext["crop_pct"]) == ((3, 224, 224), 0.875)
    squashed = of_hugging_face({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, "")
    assert (squashed["crop_mode"], squashed["crop_pct"]) == ("squash", 1.0)
    assert of_hugging_face({"size": 224, "do_normalize": False}, "")["mean"] == (0.0,)
    assert of_hugging_face({"pretrained_cfg": CFG}, "")["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pretrained_cfg": {"mean": "white"}}, r"model\.pt: pretrained_cfg\.mean is 'white', not a number"),
        ({"args": {"img_size": "32 px"}}, r"model\.pt: args\.img_size is '32 px', not a size in pixels"),
        ({"args": {"val_crop_size": [1, 2, 3, 4]}}, r"model\.pt: args\.val_crop_size"),
        ({"args": {"img_size": 1 << 20}}, "not a size of 1 to 65536 pixels"),
        ({"args": {"std": [0.0]}}, r"model\.pt: args\.std is a list, not a positive number"),
        ({"args": {"mean": [float("nan")] * 3}}, r"args\.mean is a list, not a number"),
        ({"args": {"crop_mode": "spiral"}}, r"args\.crop_mode is 'spiral', not one of center, squash"),
        ({"args": {"interpolation": np.zeros(3)}}, r"model\.pt"),
    ],
)
def test_values_of_other_types_are_refused_by_name(content, message, tmp_path):
    with pytest.raises(BnpatchError, match=message) as error:
        loaded_with(tmp_path, **content)
    assert "\n" not in str(error.value)
    assert loaded_with(tmp_path, **{key: {} for key in content}).preprocessing  # the remedy: leave it out


@pytest.mark.parametrize("text", ["{", "[" * 100_000, f'{{"mean": {"9" * 5000}}}', "\0", " " * (17 << 20)])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_damaged_file_beside_the_checkpoint_is_named(name, text, tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    (tmp_path / name).write_text(text)
    with pytest.raises(BnpatchError, match=rf"{name} .*move it away from beside the weights"):
        bnpatch.load(tmp_path / "model.pt")
    (tmp_path / name).rename(tmp_path / "elsewhere")
    assert bnpatch.load(tmp_path / "model.pt")


def test_arrays_are_numbers_too(tmp_path):
    known = loaded_with(tmp_path, pretrained_cfg={"mean": torch.tensor([0.5, 0.25, 0.125])}).preprocessing
    assert known.mean == (0.5, 0.25, 0.125)


def test_the_normalization_of_hugging_face_is_that_of_its_processor():
    """Bytes x become ((x * factor - offset) - mean) / std, and EfficientNet's processor divides twice."""
    config = {"image_mean": [0.25] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}
    x = np.array([0.0, 51.0, 255.0])
    for change, expected in (
        ({}, (x / 127.5 - 0.25) / 0.5),
        ({"rescale_offset": True}, (x / 127.5 - 1 - 0.25) / 0.5),
        ({"rescale_offset": True, "include_top": True}, (x / 127.5 - 1 - 0.25) / 0.5 / 0.5),
        ({"do_rescale": False}, (x - 0.25) / 0.5),
    ):
        values = of_hugging_face({**config, **change}, "")
        np.testing.assert_allclose((x / 255 - values["mean"][0]) / values["std"][0], expected)


@pytest.mark.parametrize(
    ("content", "size", "mean"),
    [
        ({"args": {"img_size": 24, "mean": [0.1, 0.2, 0.3]}}, 24, (0.1, 0.2, 0.3)),
        ({"pretrained_cfg": CFG}, 32, (0.1, 0.2, 0.3)),
        ({"train_args": {"imgsz": 40}}, 40, (0.0, 0.0, 0.0)),  # as ultralytics' classifiers: values in [0, 1]
    ],
)
def test_beside_a_whole_module(content, size, mean, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save({"model": module, **content}, tmp_path / "model.pt")
    known = bnpatch.load(tmp_path / "model.pt", unsafe_load=True).preprocessing
    assert (known.input_size, known.mean) == ((3, size, size), mean)
