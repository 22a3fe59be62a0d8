"""Checkpoints, recipes and configurations, and damages of what they hold."""

import functools
import io
import json
import zipfile

import numpy as np
import timm
import torch
from safetensors.torch import save

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.recipe import NormRecipe, Recipe
from tests.fuzzing.damage import BYTES, PLAIN, TENSORS, json_values, mutated


@functools.cache
def classifier():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()


@functools.cache
def loaded():
    return bnpatch.load(classifier())


def _content():
    args = {"img_size": 32, "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
    names = [str(index) for index in range(10)]
    state = dict(classifier().state_dict())
    return {
        "arch": "test_resnet",
        "state_dict": state,
        "state_dict_ema": {"fc.weight": state["fc.weight"]},
        "args": args,
        "class_names": names,
        "epoch": 3,
        "bnpatch": {
            "preprocessing": loaded().preprocessing.to_json(),
            "recipe": loaded().recipe().to_json(),
            "output": None,
        },
    }


def _saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@functools.cache
def checkpoints():
    return [_saved(_content()), _saved(classifier().state_dict())]


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
    return [save({name: t.contiguous() for name, t in classifier().state_dict().items()})]


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
