"""What no file may ask for: each limit with a small number, and what it says."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import bnpatch
from bnpatch.core import limits
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.data.class_maps import read_class_map
from bnpatch.data.decoding import _Room
from bnpatch.data.images import FileImages
from bnpatch.onnx import io
from tests.data.test_bit_depth import write_png
from tests.hostile import chain, classifying, doubling, filling, looping
from tests.onnx.build import batch_norm, constant


def write(path, proto):
    path.write_bytes(proto.SerializeToString())
    return path


def test_a_limit_is_read_from_the_environment(monkeypatch):
    limit = limits.Limit("BNPATCH_MAX_SHEEP", 5)
    limit.check(5, "there are 5 sheep")
    with pytest.raises(BnpatchError, match=r"6 sheep, and the limit is 5; .* BNPATCH_MAX_SHEEP to a"):
        limit.check(6, "there are 6 sheep")
    monkeypatch.setenv("BNPATCH_MAX_SHEEP", "7.5")
    limit.check(7, "there are 7 sheep")
    for text in ("many", "", "-1", "0", "nan"):
        monkeypatch.setenv("BNPATCH_MAX_SHEEP", text)
        with pytest.raises(BnpatchError, match=r"BNPATCH_MAX_SHEEP is '.*'; set a positive number"):
            limit.check(1, "there is 1 sheep")


def test_the_table_has_every_limit():
    known = {limit for limit in vars(limits).values() if isinstance(limit, limits.Limit)}
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    rows = [line.split("|")[1:3] for line in page.read_text().splitlines() if line.startswith("| `BNPATCH")]
    assert {(name.strip(" `"), float(default.replace(",", ""))) for name, default in rows} == {
        (limit.name, limit.default) for limit in known
    }


def test_arrays(tmp_path, checkpoint, monkeypatch):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.zeros((4000, 32, 32), np.uint8), y=np.zeros(4000, int))
    model = bnpatch.load(checkpoint)
    monkeypatch.setenv(limits.UNPACKED_MB.name, "1")
    with pytest.raises(BnpatchError, match=r"data\.npz: x\.npy unpacks to 4 MB more than the file"):
        bnpatch.open_examples(path, model)
    monkeypatch.setenv(limits.UNPACKED_MB.name, "5")
    assert len(bnpatch.open_examples(path, model)) == 4000


def test_images(tmp_path, monkeypatch):
    path, deep, gray = (tmp_path / f"{name}.png" for name in ("a", "deep", "gray"))
    Image.new("RGB", (100, 100)).save(path)
    write_png(deep, np.full((100, 100, 3), 1 << 15, np.uint16))
    Image.new("I;16", (100, 100)).save(gray)
    source = FileImages([path, deep, gray], "RGB", tmp_path)
    source.bit_depth = bnpatch.data.bit_depth.of_files([[deep]], "here")
    assert source.bit_depth.origin == "found"
    source.bit_depth = bnpatch.data.bit_depth.given(16)
    monkeypatch.setenv(limits.MEGAPIXELS.name, "0.019")  # gray of 16 bits counts twice
    assert source.read(0).size == source.read(1).size == (100, 100)
    with pytest.raises(OSError, match=r"more than 0\.019 \(the environment .* BNPATCH_MAX_MEGA"):
        source.read(2)
    monkeypatch.setenv(limits.MEGAPIXELS.name, "0.039")  # colors count four times, if both bytes are read
    assert source.read(1).size == source.read(2).size == (100, 100)
    source.bit_depth = bnpatch.data.bit_depth.given(12)
    with pytest.raises(OSError, match=r"more than 0\.039"):
        source.read(1)
    monkeypatch.setenv(limits.MEGAPIXELS.name, "0.005")
    with pytest.raises(OSError, match="megapixels, more than"):
        source.read(0)


def test_a_higher_limit_of_pixels_is_told_to_pillow(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # Pillow refuses what has twice as many
    source = FileImages([path], "RGB", tmp_path)
    with pytest.raises(OSError, match=r"exceeds limit .* BNPATCH_MAX_MEGAPIXELS sets it"):
        source.read(0)
    monkeypatch.setenv(limits.MEGAPIXELS.name, "1000")
    assert source.read(0).size == (100, 100)


def test_a_program_that_draws_is_no_image(tmp_path):
    path = tmp_path / "a.eps"
    Image.new("RGB", (10, 10)).save(path)
    with pytest.raises(OSError, match="PostScript"):
        FileImages([path], "RGB", tmp_path).read(0)


def test_threads_wait_for_room():
    room, now, most = _Room(100), [0], []
    lock = threading.Lock()

    def decode(pixels):
        with room.reserved():
            room.take(pixels)
            room.take(pixels)  # a second image of the same thread does not wait for the first
            with lock:
                now[0] += min(pixels, 100)
                most.append(now[0])
            time.sleep(0.001)
            with lock:
                now[0] -= min(pixels, 100)

    threads = [threading.Thread(target=decode, args=(n,)) for n in (60, 60, 30, 200, 60, 30, 30, 60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 8
    assert max(most) <= 100
    assert room.used == 0
    room.take(1000)  # outside of any block, nobody would give it back
    assert room.used == 0


def test_class_maps(tmp_path, monkeypatch):
    path = tmp_path / "classes.txt"
    path.write_text("a\nb\nc\n")
    monkeypatch.setenv(limits.CLASSES.name, "2")
    with pytest.raises(BnpatchError, match=r"3 classes or more, and the limit is 2; .* BNPATCH_MAX_CLASSES"):
        read_class_map(path)
    monkeypatch.setenv(limits.CLASSES.name, "3")
    assert read_class_map(path) == ("a", "b", "c")
    path.write_text(f"{'x' * 200_000},0\n{'y' * 200_000},1\n")  # longer than the csv module reads
    assert [name[0] for name in read_class_map(path)] == ["x", "y"]


def test_recipes(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    Recipe((), {"notes": "a" * 3_000_000}).save(path)
    monkeypatch.setenv(limits.TEXT_MB.name, "2")
    with pytest.raises(BnpatchError, match="has 3 MB, and the limit is 2"):
        Recipe.load(path)
    monkeypatch.setenv(limits.TEXT_MB.name, "4")
    assert len(Recipe.load(path).provenance["notes"]) == 3_000_000
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BnpatchError, match=r"cannot read .*not a regular file"):
        Recipe.load(tmp_path / "pipe.json")


@pytest.mark.parametrize("operator", ["BatchNormalization", "Relu"])
def test_functions_that_double(tmp_path, monkeypatch, operator):
    """Functions without norms are not inlined, but shape inference looks into each call."""
    with pytest.raises(BnpatchError, match=r"has 3,221,225,474 nodes.* functions .* BNPATCH_MAX_NODES"):
        io.load(write(tmp_path / "m.onnx", doubling(30, operator)))
    path = write(tmp_path / "m.onnx", doubling(3, operator))  # 1 + 2 + 4 + 8 calls of functions, 8 leaves
    monkeypatch.setenv(limits.NODES.name, "25")  # and three nodes that classify
    with pytest.raises(BnpatchError, match="has 26 nodes"):
        io.load(path)
    monkeypatch.setenv(limits.NODES.name, "26")
    assert io.load(path)


def test_a_function_that_calls_itself(tmp_path):
    proto = doubling(2, "Relu")
    proto.functions[0].node[0].op_type, proto.functions[0].node[0].domain = "f2", "f"
    with pytest.raises(BnpatchError, match=r"function f[0-9] calls itself"):
        io.load(write(tmp_path / "m.onnx", proto))


def test_nodes_of_a_graph(tmp_path, monkeypatch):
    path = write(tmp_path / "m.onnx", chain(100))
    monkeypatch.setenv(limits.NODES.name, "102")
    with pytest.raises(BnpatchError, match="has 103 nodes"):
        io.load(path)


@pytest.mark.parametrize(
    ("proto", "numbers"),
    [
        (classifying([batch_norm(output="h")], x=("n", 3, 10**6, 10**6)), "3,000,000,000,000"),
        (filling(40_000), "1,600,000,000"),
    ],
)
def test_values_that_fill_the_memory(tmp_path, proto, numbers):
    with pytest.raises(BnpatchError, match=f"a value of {numbers} numbers, .*BNPATCH_MAX_VALUES"):
        bnpatch.load(write(tmp_path / "m.onnx", proto))


def test_shape_inference_computes_nothing_large(tmp_path):
    """It would list a trillion numbers to learn the shape of what follows."""
    start = [constant("zero", np.array(0)), constant("one", np.array(1)), constant("most", np.array(1 << 40))]
    counting = [*start, helper.make_node("Range", ["zero", "most", "one"], ["c"])]
    concatenating = [constant("c0", np.array([1, 1]))]
    concatenating += [helper.make_node("Concat", [f"c{k}"] * 2, [f"c{k + 1}"], axis=0) for k in range(40)]
    concatenating.append(helper.make_node("Identity", ["c40"], ["c"]))
    end = [
        helper.make_node("Cast", ["c"], ["f0"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["f0"], ["m"], keepdims=0),
        helper.make_node("Add", ["n", "m"], ["h"]),
    ]
    for nodes in (counting, concatenating):
        proto = classifying([batch_norm(output="n"), *nodes, *end])
        with pytest.raises(BnpatchError, match=r"a value of [\d,]+ numbers"):
            io.load(write(tmp_path / "m.onnx", proto))


@pytest.mark.parametrize("where", ["initializer", "attribute"])
def test_sparse_tensors_are_not_lost(tmp_path, where):
    values, places = np.ones(1, np.float32), np.zeros(1, np.int64)
    tensor = helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(values, "s"), onnx.numpy_helper.from_array(places, "i"), [10**6, 10**6]
    )
    proto = classifying([batch_norm(output="h")])
    if where == "initializer":
        proto.graph.sparse_initializer.append(tensor)
    else:
        proto.graph.node.append(helper.make_node("Constant", [], ["s"], sparse_value=tensor))
    with pytest.raises(BnpatchError, match=r"m\.onnx has sparse tensors"):
        io.load(write(tmp_path / "m.onnx", proto))


def test_loops(tmp_path, monkeypatch):
    x = torch.zeros(2, 3, 8, 8)
    monkeypatch.setenv(limits.SECONDS.name, "0.1")
    for times in (1 << 62, None):
        model = bnpatch.load(write(tmp_path / "m.onnx", looping(times)))
        with pytest.raises(BnpatchError, match=r"a loop .* not ended after 0\.\d s, .* BNPATCH_MAX_SECONDS"):
            model.predict(x)
    monkeypatch.setenv(limits.SECONDS.name, "20")
    model = bnpatch.load(write(tmp_path / "m.onnx", looping(3)))
    assert model.predict(x).shape == (2, 10)


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_external_data_that_is_no_file(tmp_path, what):
    tensor = onnx.numpy_helper.from_array(np.ones((3, 10), np.float32), "w")
    proto = classifying([batch_norm(output="h")])
    onnx.external_data_helper.set_external_data(tensor, "weights")
    tensor.ClearField("raw_data")
    next(t for t in proto.graph.initializer if t.name == "w").CopyFrom(tensor)
    place = tmp_path / "weights"
    if what == "pipe":
        os.mkfifo(place)
    elif what == "device":
        place.symlink_to("/dev/zero")
    else:
        place.mkdir()
    with pytest.raises(BnpatchError, match=r"external data 'weights' .* cannot be used"):
        io.load(write(tmp_path / "m.onnx", proto))


def test_a_pipe_is_no_graph(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(BnpatchError, match=r"cannot read .*: not a regular file"):
        io.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", [TensorProto.UNDEFINED, TensorProto.STRING])
def test_an_input_that_is_no_image(tmp_path, kind):
    proto = classifying([batch_norm(output="h")])
    proto.graph.input[0].type.tensor_type.elem_type = kind
    with pytest.raises(BnpatchError):
        bnpatch.load(write(tmp_path / "m.onnx", proto))
