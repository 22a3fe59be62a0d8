"""Damaged graphs: whatever is wrong, the only error is BnpatchError."""

import contextlib
import random
from pathlib import Path

import onnx
import onnx.backend.test
import pytest

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.io import load, save
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import batch_norm, bn_model, parameters
from tests.onnx.test_match import in_function, in_if

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
# How many damaged graphs of each source; twenty times as many are slow.
COUNTS = {"small": 200, "light": 22, "exported": 20}


def flip_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(200) :]


def graft(data, rng):
    start, other = rng.randrange(len(data)), rng.randrange(len(data))
    return data[:start] + data[other : other + 100] + data[start:]


def structural(data, rng):
    """Change the meaning instead of the bytes."""
    proto = onnx.ModelProto()
    proto.ParseFromString(data)
    nodes = proto.graph.node
    for _ in range(rng.randint(1, 3)):
        node = rng.choice(nodes)
        change = rng.randrange(8)
        if change == 0 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                ["", "nowhere", *rng.choice(nodes).output]
            )
        elif change == 1 and node.input:
            node.input.pop()
        elif change == 2 and node.attribute:
            node.attribute[0].type = rng.randrange(15)
        elif change == 3:
            node.op_type = rng.choice(
                ["BatchNormalization", "InstanceNormalization", "GroupNormalization", "If"]
            )
        elif change == 4:
            proto.opset_import[0].version = rng.randrange(-1, 40)
        elif change == 5 and proto.graph.initializer:
            tensor = rng.choice(proto.graph.initializer)
            tensor.dims[:] = [rng.choice([-1, 0, 3, 1 << 40])] * rng.randint(0, 3)
        elif change == 6 and proto.graph.initializer:
            rng.choice(proto.graph.initializer).data_type = rng.randrange(30)
        elif change == 7:
            node.attribute.add(name="epsilon", type=rng.choice([0, 1, 2, 5]))
    return proto.SerializeToString()


def renamed(data, rng):
    """Nodes may have any names, and several the same."""
    proto = onnx.ModelProto.FromString(data)
    nodes = proto.graph.node
    for _ in range(rng.randint(1, 8)):
        rng.choice(nodes).name = rng.choice(["", "/", rng.choice(nodes).name])
    return proto.SerializeToString()


def use(file, data):
    file.write_bytes(data)
    model = load(file)
    found = inventory(model)
    alphas = dict.fromkeys(
        (norm_layer.name for norm_layer in found.norm_layers if not norm_layer.needs_calibration), 0.1
    )
    rewrite(model, PatchWeights(alphas))
    save(model, file.with_suffix(".out"))


def small(request):
    return [
        m.SerializeToString() for m in (bn_model(conv=True), in_if(batch_norm(), parameters()), in_function())
    ]


def light(request):
    return [(LIGHT / f"light_{name}.onnx").read_bytes() for name in ("resnet50", "shufflenet")]


def exported(request):
    return [request.getfixturevalue("exported").read_bytes()]


def damaged(originals, seed):
    rng = random.Random(seed)
    damage = rng.choice([flip_bytes, cut, graft, structural, structural, renamed])
    return damage(rng.choice(originals), rng)


@pytest.mark.parametrize(
    "times", [1, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "twenty times as many"]
)
@pytest.mark.parametrize("source", [small, light, exported])
def test_only_our_own_errors(source, times, tmp_path, request):
    originals = source(request)
    for data in originals:
        use(tmp_path / "m.onnx", data)  # undamaged, it works
    count = times * COUNTS[source.__name__]
    fine = 0
    for seed in range(count):
        with contextlib.suppress(BnpatchError):
            use(tmp_path / "m.onnx", damaged(originals, seed))
            fine += 1
    assert 0 < fine < count  # names alone are not fatal, and most of the rest is
