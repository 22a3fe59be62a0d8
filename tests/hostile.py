"""Files that ask for far more of a machine than their size suggests, and what bnpatch does with each.

Each case writes one file. :func:`cost` opens it in a process of its own, and measures that process. The
processes are forked from one that has imported everything, because the imports take longer than most files.
``python -m tests.benchmarks.bounds`` prints the figures of all, ``tests/test_bounds.py`` sets limits to them.
"""

import io
import multiprocessing
import os
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image

import bnpatch
import bnpatch.models.load
from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.data.class_maps import read_class_map
from tests.data.test_bit_depth import write_png
from tests.onnx.build import batch_norm, constant, model, parameters

GIB = 1 << 30
_STAND_IN = 70_000  # elements of a tensor, a number that a pickle writes in four bytes
ARCH = "test_resnet"  # 1.6 MB, so that what is measured is the file's doing


@dataclass(frozen=True)
class Cost:
    """What one file took: how it ended, seconds of processor and of wall time, and the peak of memory in MB.

    The peak is of the whole process; ``base`` of it were there before the file was opened.
    """

    outcome: str
    cpu: float
    wall: float
    peak: float
    base: float


@dataclass(frozen=True)
class Case:
    """A file and its use. ``refused`` says whether bnpatch must refuse it, with its default limits."""

    make: Callable[[Path], Path]
    use: Callable[[Path], object]
    refused: bool


def cost(name: str, path: Path, most: int = 60) -> Cost:
    """Open the file of a case in a new process and measure it; it may take ``most`` seconds of processor."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, path, most, theirs))
    process.start()
    theirs.close()
    try:
        found: Cost = ours.recv()
    except EOFError:
        process.join()
        ended = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        outcome = f"no end in {most} s" if ended else f"exit {process.exitcode}"
        return Cost(outcome, *[float("nan")] * 4)
    process.join()
    return found


# Files.


def deflated(path: Path, members: dict[str, bytes], size: int, name: str) -> Path:
    """Write a zip archive with one more member of ``size`` zeros, compressed to a thousandth."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        with archive.open(name, "w", force_zip64=True) as stream:
            block = bytes(16 << 20)
            for start in range(0, size, len(block)):
                stream.write(block[: size - start])
    return path


def checkpoint(size: int) -> Callable[[Path], Path]:
    """A checkpoint of one tensor of ``size`` zero bytes."""

    def make(folder: Path) -> Path:
        buffer = io.BytesIO()
        torch.save({"fc.weight": torch.zeros(_STAND_IN)}, buffer)
        with zipfile.ZipFile(buffer) as plain:
            members = {name: plain.read(name) for name in plain.namelist() if "/data/" not in name}
            name = next(name for name in plain.namelist() if "/data/" in name)
        written, wanted = (b"J" + struct.pack("<i", number) for number in (_STAND_IN, size // 4))
        members = {n: content.replace(written, wanted) for n, content in members.items()}
        return deflated(folder / "model.pt", members, size, name)

    return make


def npz(size: int) -> Callable[[Path], Path]:
    """Images of ``size`` bytes, all black."""

    def make(folder: Path) -> Path:
        side = 224
        count = size // (3 * side * side)
        path = folder / "data.npz"
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            head, {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
        )
        targets = io.BytesIO()
        np.save(targets, np.zeros(count, np.uint8))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("y.npy", targets.getvalue())
            with archive.open("x.npy", "w", force_zip64=True) as stream:
                stream.write(head.getvalue())
                for _ in range(count):
                    stream.write(bytes(3 * side * side))
        return path

    return make


def images(suffix: str, mode: str = "RGB", side: int = 12_000, count: int = 3, exif: int = 1):
    """Images of ``side`` pixels square; the first is written, the others are hard links to it."""

    def make(folder: Path) -> Path:
        for label in range(10):
            (folder / "val" / str(label)).mkdir(parents=True)
        path = folder / "val" / "0" / f"0{suffix}"
        about = Image.Exif()
        about[0x0112] = exif
        Image.new(mode, (side, side)).save(path, exif=about)
        for index in range(1, count):
            os.link(path, folder / "val" / "0" / f"{index}{suffix}")
        return folder / "val"

    return make


def deep_png(side: int, count: int = 2) -> Callable[[Path], Path]:
    """PNG files of 16 bits in each of three channels."""

    def make(folder: Path) -> Path:
        for label in range(10):
            (folder / "val" / str(label)).mkdir(parents=True)
        path = folder / "val" / "0" / "0.png"
        write_png(path, np.broadcast_to(np.uint16(256), (side, side, 3)))
        for index in range(1, count):
            os.link(path, folder / "val" / "0" / f"{index}.png")
        return folder / "val"

    return make


def graph(proto: onnx.ModelProto) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return make


def classifying(nodes, arrays=None, *, x=("n", 3, 8, 8), **options) -> onnx.ModelProto:
    """A model from images x to logits y (n, 10)."""
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 10))]
    tail = [
        helper.make_node("GlobalAveragePool", ["h"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    weights = {"w": np.ones((3, 10), np.float32), **parameters(3), **(arrays or {})}
    return model([*nodes, *tail], weights, x=x, outputs=outputs, **options)


def doubling(depth: int, operator: str) -> onnx.ModelProto:
    """A function that calls another twice, which calls another twice, and so on."""
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    norm = ["weight", "bias", "running_mean", "running_var"]
    names = [f"bn.{name}" for name in norm]
    leaf = helper.make_node(operator, ["a", *(norm if operator == "BatchNormalization" else [])], ["b"])
    functions = [helper.make_function("f", "f0", ["a", *norm], ["b"], [leaf], imports)]
    for level in range(1, depth + 1):
        calls = [
            helper.make_node(f"f{level - 1}", [start, *norm], [end], domain="f")
            for start, end in (("a", "m"), ("m", "b"))
        ]
        functions.append(helper.make_function("f", f"f{level}", ["a", *norm], ["b"], calls, imports))
    call = helper.make_node(f"f{depth}", ["x", *names], ["h"], domain="f")
    proto = classifying([call], functions=functions)
    del proto.opset_import[2:]
    return proto


def looping(times: int | None) -> onnx.ModelProto:
    """A loop of so many rounds, or without a limit."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["old"], ["new"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("go", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("old", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("new", TensorProto.FLOAT, None),
        ],
    )
    start = [constant("times", np.int64(times))] if times is not None else []
    loop = helper.make_node("Loop", ["times" if start else "", "yes", "n"], ["h"], body=body)
    norm = batch_norm(output="n")
    return classifying([*start, constant("yes", np.array(True)), norm, loop])


def chain(count: int) -> onnx.ModelProto:
    """So many norms and ReLUs, one after the other."""
    nodes = []
    for index in range(count // 2):
        source = "x" if not index else f"r{index - 1}"
        end = "h" if index == count // 2 - 1 else f"r{index}"
        norm = batch_norm((source, *batch_norm().input[1:]), f"b{index}")
        norm.name = f"n{index}"
        nodes += [norm, helper.make_node("Relu", [f"b{index}"], [end])]
    return classifying(nodes)


def filling(side: int) -> onnx.ModelProto:
    """A constant of ``side`` squared numbers, of which the file has only the shape."""
    nodes = [
        batch_norm(output="n"),
        constant("shape", np.array([side, side])),
        helper.make_node("ConstantOfShape", ["shape"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
        helper.make_node("Add", ["n", "m"], ["h"]),
    ]
    return classifying(nodes)


def resizing(factor: float) -> onnx.ModelProto:
    """Images that are enlarged by a factor inside the graph."""
    nodes = [
        helper.make_node("Resize", ["x", "", "scales"], ["r"], mode="nearest"),
        batch_norm(("r", *batch_norm().input[1:]), "h"),
    ]
    return classifying(nodes, {"scales": np.array([1, 1, factor, factor], np.float32)})


def lines(count: int, line: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "classes.txt"
        path.write_text("".join(line.format(index) for index in range(count)))
        return path

    return make


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_text(content)
        return path

    return make


def recipe(count: int) -> Callable[[Path], Path]:
    layer = '{{"name": "n{0}", "kind": "BatchNorm2d", "alpha": 0.1, "fingerprint": ""}}'
    sites = ", ".join(layer.format(index) for index in range(count))
    return text("recipe.json", f'{{"format": 1, "provenance": {{}}, "sites": [{sites}]}}')


# Uses.


def load(path: Path) -> object:
    return bnpatch.load(path)


def predict(path: Path) -> object:
    loaded = bnpatch.load(path)
    found = loaded.inventory()
    assert found
    return loaded.predict(torch.zeros(1, *loaded.preprocessing.input_size))


def read_all(path: Path) -> object:
    """Decode all examples as ``evaluate`` does, in two threads."""
    net = bnpatch.load(timm.create_model(ARCH, num_classes=10))
    data = bnpatch.open_examples(path, net, num_workers=2)
    for _ in data.batches(64):
        pass
    return data.skipped


def read_classes(path: Path) -> object:
    return read_class_map(path)


def read_recipe(path: Path) -> object:
    return Recipe.load(path)


CASES = {
    "checkpoint of 3 GiB deflated": Case(checkpoint(3 * GIB), load, True),
    "checkpoint of 470 MiB deflated, of no architecture": Case(checkpoint(470 << 20), load, True),
    ".npz of 3 GiB deflated": Case(npz(3 * GIB), read_all, True),
    ".npz of 464 MiB deflated": Case(npz(464 << 20), read_all, False),
    "3 JPEG of 144 megapixels": Case(images(".jpg"), read_all, False),
    "3 JPEG of 144 megapixels, to be turned by EXIF": Case(images(".jpg", exif=6), read_all, False),
    "3 PNG of 144 megapixels": Case(images(".png"), read_all, False),
    "3 PNG of 144 megapixels, RGBA": Case(images(".png", "RGBA"), read_all, False),
    "2 PNG of 44 megapixels, 16 bits": Case(deep_png(6650), read_all, False),
    "PNG of 81 megapixels, 16 bits": Case(deep_png(9000, count=1), read_all, True),
    "2 PNG of 88 megapixels, 16 bits gray": Case(images(".png", "I;16", side=9400, count=2), read_all, False),
    "PNG of 144 megapixels, 16 bits gray": Case(images(".png", "I;16", count=1), read_all, True),
    "JPEG of 400 megapixels": Case(images(".jpg", side=20_000, count=1), read_all, True),
    "functions doubling, depth 9": Case(graph(doubling(9, "BatchNormalization")), predict, False),
    "functions doubling, depth 30": Case(graph(doubling(30, "BatchNormalization")), predict, True),
    "functions doubling, depth 30, no norm": Case(graph(doubling(30, "Relu")), predict, True),
    "Loop of 2^62": Case(graph(looping(1 << 62)), predict, True),
    "Loop without end": Case(graph(looping(None)), predict, True),
    "input of 1e6 x 1e6": Case(
        graph(classifying([batch_norm(output="h")], x=("n", 3, 10**6, 10**6))), predict, True
    ),
    "constant of 4e4 x 4e4": Case(graph(filling(40_000)), predict, True),
    "resized by 2000": Case(graph(resizing(2000)), predict, True),
    "10,000 nodes": Case(graph(chain(9_996)), predict, False),
    "100,000 nodes": Case(graph(chain(100_000)), predict, True),
    "class map of 5 million lines": Case(lines(5_000_000, "{}\n"), read_classes, True),
    "class map of 15 million short lines": Case(lines(15_000_000, "a\n"), read_classes, True),
    "class map of 200,000 lines": Case(lines(200_000, "class {}\n"), read_classes, False),
    "class map of 10 million objects": Case(
        text("c.json", "[" + "{}," * 10_000_000 + "1]"), read_classes, True
    ),
    "class map of one long line": Case(lines(2_000_000, "{},"), read_classes, False),
    "recipe of 100,000 norm layers": Case(recipe(100_000), read_recipe, False),
    "recipe of 30 million arrays": Case(text("r.json", "[" + "[]," * 30_000_000 + "1]"), read_recipe, True),
}


def _memory() -> float:
    """Return the peak of this process's memory so far, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    raise OSError("no VmHWM")


def _measure(name: str, path: Path, most: int, result: Connection) -> None:
    """Open the file in this process, and send what it cost."""
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    base, cpu, wall = _memory(), time.process_time(), time.monotonic()
    try:
        found = CASES[name].use(path)
        outcome = f"skipped {next(iter(found.values()))}" if isinstance(found, dict) and found else "done"
    except BnpatchError as error:
        outcome = f"refused: {error}"
    result.send(Cost(outcome, time.process_time() - cpu, time.monotonic() - wall, _memory(), base))
