"""Errors name a remedy. Here each bad input is made, and what the remedy says is done: it has to succeed."""

import io
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.load import load

SIDE = 8


def case(problem, remedy):
    """Turn a function of the world, which returns what fails and what follows the remedy, into a test."""

    def as_test(make):
        def test(world):
            fails, follow = make(world)
            with pytest.raises(BnpatchError) as error:
                fails()
            assert re.search(problem, error.value.problem), error.value.problem
            assert re.search(remedy, error.value.remedy), error.value.remedy
            follow(error.value.remedy)

        test.__name__ = make.__name__
        return pytest.mark.filterwarnings("ignore::bnpatch.core.errors.BnpatchWarning")(test)

    return as_test


@dataclass
class World:
    """What a user has."""

    folder: object
    checkpoint: object

    def file(self, name, content=b""):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def saved(self, content, name="saved.pt"):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return self.file(name, buffer.getvalue())

    @property
    def state_dict(self):
        return torch.load(self.checkpoint, weights_only=True)["state_dict"]

    def images(self, *names, root="data"):
        for number, name in enumerate(names):
            buffer = io.BytesIO()
            Image.new("RGB", (SIDE, SIDE), (20 * number, 90, 120)).save(buffer, "PNG")
            self.file(f"{root}/{name}", buffer.getvalue())
        return self.folder / root


class Net(nn.Module):
    def __init__(self, norm=None, result=lambda logits: logits, channels=3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4) if norm is None else norm
        self.head = nn.Linear(4 * (SIDE - 2) ** 2, 3)
        self.result = result

    def forward(self, x):
        return self.result(self.head(self.norm(self.conv(x)).flatten(1)))


def net(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


def loaded(names=None, img_size=SIDE, **options):
    found = load(net(**options), preprocessing={"img_size": img_size})
    found.class_names = names
    return found


X = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
Y = np.arange(6) % 3


def opened(data, names=None, **options):
    examples = bnpatch.open_examples(data, loaded(names), **options)
    next(examples.batches(6))
    return examples


def onnx_file(w, proto, name="model.onnx"):
    return w.file(name, proto.SerializeToString())
