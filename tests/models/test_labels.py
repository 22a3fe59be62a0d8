import types

import numpy as np
import onnx
import onnx.helper as oh
import pytest
import timm
import torch
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models import architecture
from bnpatch.models.labels import read_names

STATE = timm.create_model("test_resnet", num_classes=3).state_dict()
FOUND = architecture.identify(STATE)
NAMES = ("ant", "bee", "cat")
STORED = {
    "class_to_idx": {"cat": 2, "ant": 0, "bee": 1},
    "class_names": list(NAMES),
    "classes": NAMES,
    "idx_to_class": {2: "cat", 0: "ant", 1: "bee"},
    "id2label": {"2": "cat", "0": "ant", "1": "bee"},
    "names": {0: "ant", 1: "bee", 2: "cat"},
}


def loaded_with(tmp_path, **content):
    torch.save({"state_dict": STATE, **content}, tmp_path / "model.pt")
    return bnpatch.load(tmp_path / "model.pt")


@pytest.mark.parametrize("key", STORED)
@pytest.mark.parametrize(
    "place", ["", "hyper_parameters", "datamodule_hyper_parameters", "args", "config", "meta"]
)
def test_names_are_found_at_any_place(key, place, tmp_path, monkeypatch):
    # Building the model is not what this tests, and takes most of the time.
    monkeypatch.setattr("bnpatch.models.architecture.identify", lambda *_: FOUND)
    content = {key: STORED[key]}
    loaded = loaded_with(tmp_path, **({place: content} if place else content))
    assert loaded.class_names == NAMES
    where = f"{place}.{key}" if place else key
    assert f"names of the classes from {where} of model.pt" in loaded.notes


def test_names_of_another_number_are_not_used(tmp_path):
    loaded = loaded_with(tmp_path, classes=["a", "b"], hyper_parameters={"class_names": list(NAMES)})
    assert loaded.class_names == NAMES
    loaded = loaded_with(tmp_path, classes=["a", "b"])
    assert loaded.class_names is None
    assert "classes of model.pt names 2 classes, but the model has 3 outputs: not used" in loaded.notes


@pytest.mark.parametrize(
    "value",
    [
        {"a": None, "b": 1},
        {"a": 1, "b": 2, "c": 3},
        {"a": 0, "b": 0, "c": 1},
        [["a"], ["b", "c"]],
        [1.5, None, {}],
    ],
)
def test_what_is_no_list_of_names_is_not_used(value, tmp_path):
    loaded = loaded_with(tmp_path, class_to_idx=value)
    assert loaded.class_names is None
    assert "class_to_idx of model.pt can't be read as names of classes: not used" in loaded.notes


def test_numbers_as_names():
    """Folders that are called 0, 1, 2 are names too; which of the two is the index, the types tell."""
    assert read_names({"1": 0, "2": 1, "0": 2}) == ("1", "2", "0")
    assert read_names({0: "1", 1: "2", 2: "0"}) == ("1", "2", "0")
    assert read_names(np.array(["a", "b"])) == ("a", "b")
    assert read_names({0: "LABEL_0", 1: "LABEL_1"}) is None


def test_modules_know_names():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert bnpatch.load(module).class_names is None
    module.names = {0: "ant", 1: "bee", 2: "cat"}
    loaded = bnpatch.load(module)
    assert loaded.class_names == NAMES
    assert loaded.notes == ["names of the classes from names of the module Sequential"]
    del module.names
    module.config = types.SimpleNamespace(id2label=dict(enumerate(NAMES)))
    loaded = bnpatch.load(module)
    assert loaded.class_names == NAMES
    assert "from config.id2label of" in loaded.notes[0]
    placeholders = {"id2label": {i: f"LABEL_{i}" for i in range(3)}}
    placeholders["label2id"] = {name: i for i, name in placeholders["id2label"].items()}
    module.config = types.SimpleNamespace(**placeholders)
    loaded = bnpatch.load(module)
    assert loaded.class_names is None
    assert not loaded.notes  # as without names: nobody gave some that could be used
    module.config = types.SimpleNamespace(**placeholders, classes=NAMES)
    assert bnpatch.load(module).class_names == NAMES


def onnx_file(path, size=("h", "w"), **metadata):
    """A classifier of three classes with the metadata that a program wrote."""
    graph = oh.make_graph(
        [
            oh.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            oh.make_node("Flatten", ["pooled"], ["output0"]),
        ],
        "net",
        [oh.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["batch", 3, *size])],
        [oh.make_tensor_value_info("output0", onnx.TensorProto.FLOAT, ["batch", 3])],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    oh.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def test_ultralytics_writes_a_literal(tmp_path):
    path = onnx_file(
        tmp_path / "net.onnx",
        author="Ultralytics",
        task="classify",
        stride="1",
        imgsz="[64, 96]",
        names="{0: 'ant', 1: 'bee', 2: 'cat'}",
    )
    loaded = bnpatch.load(path)
    assert loaded.class_names == NAMES
    assert "names of the classes from names of the file's metadata" in loaded.notes
    known = loaded.preprocessing
    assert (known.input_size, known.mean, known.std) == ((3, 64, 96), (0, 0, 0), (1, 1, 1))
    assert (known.interpolation, known.crop_pct) == ("bilinear", 1.0)
    assert known.source == "the file's metadata, as ultralytics writes it"
    assert not any("224" in note for note in loaded.notes)
    assert bnpatch.load(path, preprocessing={"img_size": 32}).preprocessing.input_size == (3, 32, 32)


def test_a_graph_knows_its_size_better_than_its_metadata(tmp_path):
    path = onnx_file(tmp_path / "net.onnx", (48, 48), stride="1", imgsz="[64, 64]")
    assert bnpatch.load(path).preprocessing.input_size == (3, 48, 48)


def test_metadata_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('pathlib').Path('exploded').touch()"
    path = onnx_file(tmp_path / "net.onnx", names=code, id2label="(" * 5000, stride="9" * 5000)
    loaded = bnpatch.load(path)
    assert loaded.class_names is None
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "metadata",
    [
        {"imgsz": "[0, 'x']", "stride": "32"},
        {"bnpatch.preprocessing": "[1]"},
        {"bnpatch.preprocessing": "{"},
        {"bnpatch.class_names": "9" * 5000},
        {"bnpatch.class_names": "7"},
        {"bnpatch.class_names": '{"cat": 0}'},
        {"bnpatch.class_names": '"cats"'},
        {"bnpatch.class_names": '["cat", 1]'},
    ],
)
def test_damaged_metadata_is_refused_in_one_line(metadata, tmp_path):
    path = onnx_file(tmp_path / "net.onnx", **metadata)
    with pytest.raises(BnpatchError, match=r"net\.onnx|metadata"):
        bnpatch.load(path)
