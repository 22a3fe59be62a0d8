"""ONNX files, and damages of graphs."""

import functools
import io
import json
from pathlib import Path

import onnx
import onnx.backend.test
import torch
from torch import nn

from bnpatch.core.patch import PatchWeights
from bnpatch.onnx import io as onnx_io
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.fuzzing.checkpoints import loaded
from tests.fuzzing.damage import BYTES, json_values
from tests.onnx.build import batch_norm, bn_model, in_function, in_if, parameters

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"


def structural(data, rng):
    """Change the meaning instead of the bytes."""
    proto = onnx.ModelProto.FromString(data)
    nodes = proto.graph.node
    for _ in range(rng.randint(1, 3)):
        node = rng.choice(nodes)
        change = rng.randrange(10)
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
                ["BatchNormalization", "InstanceNormalization", "GroupNormalization", "If", "Loop"]
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
        elif change == 8:
            value = rng.choice([*proto.graph.input, *proto.graph.output])
            for dim in value.type.tensor_type.shape.dim:
                if rng.random() < 0.5:
                    dim.dim_value = rng.choice([-1, 0, 1, 3, 10**6, 1 << 62])
        elif change == 9:
            rng.choice(proto.graph.input).type.tensor_type.elem_type = rng.randrange(25)
    return proto.SerializeToString()


def renamed(data, rng):
    """Nodes may have any names, and several the same."""
    proto = onnx.ModelProto.FromString(data)
    nodes = proto.graph.node
    for _ in range(rng.randint(1, 8)):
        rng.choice(nodes).name = rng.choice(["", "/", rng.choice(nodes).name])
    return proto.SerializeToString()


def metadata(data, rng):
    """What bnpatch, or another program, did not write so."""
    proto = onnx.ModelProto.FromString(data)
    values = {
        "bnpatch.preprocessing": loaded().preprocessing.to_json(),
        "bnpatch.class_names": list("0123456789"),
        "names": {str(index): f"class {index}" for index in range(10)},
        "imgsz": [8, 8],
        "stride": 32,
    }
    for key in rng.sample(list(values), rng.randint(1, len(values))):
        entry = proto.metadata_props.add()
        entry.key, text = key, json.dumps(values[key])
        entry.value = rng.choice([json_values, *BYTES])(text.encode(), rng).decode("utf-8", "replace")
    return proto.SerializeToString()


def patch_graph(file):
    model = onnx_io.load(file)
    found = inventory(model)
    alphas = dict.fromkeys(
        (norm_layer.name for norm_layer in found.norm_layers if not norm_layer.needs_calibration), 0.1
    )
    rewrite(model, PatchWeights(alphas))
    onnx_io.save(model, file.with_suffix(".out"))


@functools.cache
def small_graphs():
    return [
        m.SerializeToString() for m in (bn_model(conv=True), in_if(batch_norm(), parameters()), in_function())
    ]


@functools.cache
def light_graphs():
    return [(LIGHT / f"light_{name}.onnx").read_bytes() for name in ("resnet50", "shufflenet")]


@functools.cache
def exported_graphs():
    buffer = io.BytesIO()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.zeros(2, 1, 8, 8),)
    program = torch.onnx.export(
        network(), example, dynamo=True, dynamic_shapes=batch, verbose=False, optimize=False
    )
    program.save(buffer)
    return [buffer.getvalue()]


def network():
    torch.manual_seed(0)
    norms = (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).eval()
