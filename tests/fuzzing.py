"""Damaged files of every kind that bnpatch reads, by seed; whatever is wrong, the only error is BnpatchError.

``tests/test_fuzz.py`` opens some hundreds, ``python -m tests.benchmarks.fuzz`` as many as you like.
"""

import functools
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch import nn

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import NormRecipe, Recipe
from bnpatch.data.class_maps import read_class_map
from bnpatch.onnx import io as onnx_io
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import batch_norm, bn_model, in_function, in_if, parameters

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"

#: Changes the bytes of a file.
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: the name of the file.
        originals: returns contents that bnpatch reads without an error.
        damages: what to do to them; :data:`BYTES` treats them as bytes, others know their structure.
        use: opens the file, as commands do.
    """

    name: str
    originals: Callable[[], list[bytes]]
    damages: tuple[Damage, ...]
    use: Callable[[Path], object]

    def damaged(self, seed: int) -> bytes:
        """The content number ``seed``."""
        rng = random.Random(seed)
        damage = rng.choice(self.damages)
        return damage(rng.choice(self.originals()), rng)


# Damages that know nothing of the structure.


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


BYTES = (flip_bytes, cut, graft)


# Values of other types and sizes, in JSON and in checkpoints.

_LONG, _DEEP = "@long@", "@deep@"  # stand for what json.dumps can't write
PLAIN = (None, True, [], {}, "", "a\0b", -1, 0, 10**30, 0.5, -0.0, float("nan"), float("inf"), [[]], {"": {}})
TENSORS = (
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(2, 2).to_sparse_csr(),
    lambda: torch.empty(3, device="meta"),
    lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda: torch.zeros(3, dtype=torch.complex64),
    lambda: torch.zeros(3, dtype=torch.bool),
    lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
    lambda: torch.full((4,), float("nan")),
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 0, 3),
    lambda: np.zeros(3),
    lambda: np.float64(0.5),
    lambda: np.array([b"a", b"b"]),
    lambda: {1, 2},
    lambda: b"bytes",
    lambda: 10**5000,
    lambda: nn.Parameter(torch.zeros(4)),
)


def mutated(value, rng, others):
    """A copy of nested lists and dictionaries in which one to three places have another value."""
    for _ in range(rng.randint(1, 3)):
        value = _mutated(value, rng, others)
    return value


def _mutated(value, rng, others):
    if isinstance(value, (dict, list, tuple)) and len(value) and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, change = rng.choice(keys), rng.random()
        copy = dict(value) if isinstance(value, dict) else list(value)
        if change < 0.1:
            del copy[key]
        elif change < 0.2 and isinstance(copy, dict):
            copy[rng.choice(["", "a.b", "name", 1, *keys])] = copy.pop(key)
        else:
            copy[key] = _mutated(copy[key], rng, others)
        return type(value)(copy) if isinstance(value, tuple) else copy
    other = rng.choice(others)
    return other() if callable(other) else other


def json_values(data, rng):
    text = json.dumps(mutated(json.loads(data), rng, (*PLAIN, _LONG, _DEEP)), default=str)
    return text.replace(f'"{_LONG}"', "9" * 5000).replace(f'"{_DEEP}"', "[" * 9000 + "]" * 9000).encode()


# ONNX.


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
        "bnpatch.preprocessing": _loaded().preprocessing.to_json(),
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


# Torch.


def network():
    torch.manual_seed(0)
    norms = (nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), *norms, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    ).eval()


@functools.cache
def _classifier():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()


@functools.cache
def _loaded():
    return bnpatch.load(_classifier())


def _content():
    args = {"img_size": 32, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
    names = [str(index) for index in range(10)]
    state = dict(_classifier().state_dict())
    return {
        "arch": "test_resnet",
        "state_dict": state,
        "state_dict_ema": {"fc.weight": state["fc.weight"]},
        "args": args,
        "class_names": names,
        "epoch": 3,
        "bnpatch": {
            "preprocessing": _loaded().preprocessing.to_json(),
            "recipe": _loaded().recipe().to_json(),
            "output": None,
        },
    }


def _saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@functools.cache
def checkpoints():
    return [_saved(_content()), _saved(_classifier().state_dict())]


def checkpoint_values(data, rng):
    while True:
        content = mutated(_content(), rng, (*PLAIN, *TENSORS))
        try:
            return _saved(content)
        except (RuntimeError, NotImplementedError, TypeError):  # torch can't write this one
            continue


def pickled_bytes(data, rng):
    """Damage the pickle in the archive, not the archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(made, "w") as copy:
        for name in whole.namelist():
            content = whole.read(name)
            copy.writestr(name, rng.choice(BYTES)(content, rng) if name.endswith("data.pkl") else content)
    return made.getvalue()


@functools.cache
def safetensors():
    return [save({name: t.contiguous() for name, t in _classifier().state_dict().items()})]


def safetensors_header(data, rng):
    size = int.from_bytes(data[:8], "little")
    header = rng.choice([json_values, *BYTES])(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


@functools.cache
def recipes():
    moments = Moments(np.linspace(0, 1, 4), np.linspace(1, 2, 4))
    layers = (
        NormRecipe("bn1", "BatchNorm2d", 0.02, "aa", 0.3, moments, slope=0.5),
        NormRecipe("gn", "GroupNorm", 1.0, "bb", running=moments),
    )
    return [json.dumps(Recipe(layers, {"seed": 1, "verdict": "gain"}).to_json()).encode()]


@functools.cache
def hub_configs():
    cfg = {
        "input_size": [1, 32, 32],
        "mean": [0.5],
        "std": [0.5],
        "crop_pct": 1.0,
        "interpolation": "bicubic",
    }
    names = {"num_classes": 10, "label_names": list("0123456789"), "label_descriptions": {"0": "zero"}}
    return [json.dumps({"architecture": "test_resnet", **names, "pretrained_cfg": cfg}).encode()]


def load_hub_folder(file):
    weights = file.with_name("model.safetensors")
    if not weights.exists():
        weights.write_bytes(safetensors()[0])
    return bnpatch.load(file.parent)


# Data.


@functools.cache
def _images(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (20, 32, 32), np.uint8), np.arange(20) % 10


@functools.cache
def arrays():
    made = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, x=_images()[0], y=_images()[1])
        made.append(buffer.getvalue())
    return made


def array_bytes(data, rng):
    """Damage an array in the archive, not the archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(made, "w") as copy:
        wrong = rng.choice(whole.namelist())
        for name in whole.namelist():
            content = whole.read(name)
            head, rest = content[:128], content[128:]
            if name == wrong:
                head, rest = rng.choice([(rng.choice(BYTES)(head, rng), rest), (head, flip_bytes(rest, rng))])
            copy.writestr(name, head + rest)
    return made.getvalue()


@functools.cache
def _reader():
    return bnpatch.load(_classifier(), preprocessing={"img_size": 32})


def read_examples(path):
    data = bnpatch.open_examples(path, _reader(), num_workers=0)
    return [batch.x.sum() for batch in data.batches(8)]


@functools.cache
def pictures():
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    about = Image.Exif()
    about[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 1 << 16, (24, 20), np.uint16))
    ways = [
        (color, {"format": "JPEG", "exif": about}),
        (color, {"format": "PNG"}),
        (color.quantize(16), {"format": "PNG", "transparency": 3}),
        (deep, {"format": "PNG"}),
        (deep, {"format": "TIFF", "compression": "tiff_lzw"}),
        (color.convert("CMYK"), {"format": "TIFF"}),
        (color, {"format": "GIF", "save_all": True, "append_images": [color.rotate(90)]}),
        (color, {"format": "WEBP"}),
        (color, {"format": "BMP"}),
        (color, {"format": "PPM"}),
        (color, {"format": "TGA"}),
        (color, {"format": "ICO"}),
        (color, {"format": "JPEG2000"}),
        (color.convert("L"), {"format": "PCX"}),
        (color, {"format": "DDS"}),
    ]
    made = []
    for image, how in ways:
        buffer = io.BytesIO()
        image.save(buffer, **how)
        made.append(buffer.getvalue())
    return made


def read_picture(path):
    """As one image of a folder, whose bit depth is looked for too."""
    for label in range(10):
        (path.parent / "val" / str(label)).mkdir(parents=True, exist_ok=True)
    path.replace(path.parent / "val" / "3" / path.name)
    return bnpatch.open_examples(path.parent / "val", _reader(), num_workers=0).readable(np.arange(1))


@functools.cache
def class_maps():
    names = [f"class {letter}" for letter in "abcdefghijkl"]
    return [
        "\n".join(names).encode(),
        "\n".join(f"{name}\t{index}" for index, name in enumerate(names)).encode(),
        "\n".join(f'"{name}",{index}' for index, name in enumerate(names)).encode("utf-16"),
        "\n".join(f"{index} {name}" for index, name in enumerate(names)).encode(),
    ]


@functools.cache
def json_class_maps():
    names = [f"class {letter}" for letter in "abcdefghijkl"]
    synsets = {str(index): [f"n{index:08}", name] for index, name in enumerate(names)}
    numbers = {name: index for index, name in enumerate(names)}
    return [json.dumps(value).encode() for value in (names, synsets, numbers)]


def repeated(data, rng):
    """Some bytes many times."""
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 40)] * rng.choice([2, 1000, 20_000])
    return data[:start] + part + data[start:]


KINDS = {
    "ONNX, small": Kind("m.onnx", small_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, light": Kind("m.onnx", light_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, exported": Kind("m.onnx", exported_graphs, (*BYTES, structural, structural, renamed), patch_graph),
    "ONNX, as a model": Kind("m.onnx", exported_graphs, (structural, metadata), bnpatch.load),
    "checkpoint": Kind("m.pt", checkpoints, (*BYTES, pickled_bytes, checkpoint_values), bnpatch.load),
    "safetensors": Kind("m.safetensors", safetensors, (*BYTES, safetensors_header), bnpatch.load),
    "configuration": Kind("config.json", hub_configs, (*BYTES, json_values, json_values), load_hub_folder),
    "recipe": Kind("recipe.json", recipes, (*BYTES, json_values, json_values), Recipe.load),
    ".npz": Kind("data.npz", arrays, (*BYTES, array_bytes), read_examples),
    "image": Kind("image.png", pictures, BYTES, read_picture),
    "class map": Kind("classes.txt", class_maps, (*BYTES, repeated), read_class_map),
    "class map, JSON": Kind("classes.json", json_class_maps, (*BYTES, repeated, json_values), read_class_map),
}
