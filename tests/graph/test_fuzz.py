"""Damaged graphs: whatever is wrong, the only error is BnpatchError."""

import contextlib
import io
import random
import time
from pathlib import Path

import onnx
import onnx.backend.test
import onnx_ir as ir
import pytest

from bnpatch.errors import BnpatchError
from bnpatch.graph.match import survey
from bnpatch.graph.read import load, save
from bnpatch.graph.rewrite import rewrite
from tests.graph.build import batch_norm, bn_model, parameters
from tests.graph.test_match import in_function, in_if

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
SECONDS = 2  # for each source of graphs


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


def use(file, data):
    file.write_bytes(data)
    model = load(file)
    found = survey(model)
    alphas = dict.fromkeys((site.name for site in found.sites if not site.needs_calibration), 0.1)
    rewrite(model, alphas)
    save(model, file.with_suffix(".out"))


def small():
    return [
        m.SerializeToString() for m in (bn_model(conv=True), in_if(batch_norm(), parameters()), in_function())
    ]


def light():
    return [(LIGHT / f"light_{name}.onnx").read_bytes() for name in ("resnet50", "shufflenet")]


def timm_export():
    import timm
    import torch

    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    program = torch.onnx.export(
        model, (torch.zeros(1, 3, 32, 32),), dynamo=True, optimize=False, verbose=False
    )
    file = io.BytesIO()
    onnx.save(ir.to_proto(program.model), file)
    return [file.getvalue()]


@pytest.mark.parametrize("sources", [small, light, timm_export])
def test_only_our_own_errors(sources, tmp_path):
    originals = sources()
    for data in originals:
        use(tmp_path / "m.onnx", data)  # undamaged, it works
    rng = random.Random(0)
    tried = fine = 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        damage = rng.choice([flip_bytes, cut, graft, structural, structural])
        data = damage(rng.choice(originals), rng)
        with contextlib.suppress(BnpatchError):
            use(tmp_path / "m.onnx", data)
            fine += 1
        tried += 1
    assert 0 < fine < tried  # the damage is neither always fatal nor never
