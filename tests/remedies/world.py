"""Errors name a remedy. Here each bad input is made, and what the remedy says is done: it has to succeed."""

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.models.load import load

SIDE = 8


def case(problem, remedy):
    """Turn a function of the world, which returns what fails and what follows the remedy, into a test."""

    def as_test(make):
        def test(world):
            fails, follow = make(world)
            followed(fails, problem, remedy, follow)

        test.__name__ = make.__name__
        return pytest.mark.filterwarnings("ignore::bnpatch.core.errors.BnpatchWarning")(test)

    return as_test


def followed(fails, problem, remedy, follow):
    """See what fails, with both halves of its message, and follow the remedy."""
    with pytest.raises(BnpatchError) as error:
        fails()
    assert re.search(problem, error.value.problem), error.value.problem
    assert re.search(remedy, error.value.remedy), error.value.remedy
    follow(error.value.remedy)


def cases(table, slow=()):
    """Parametrize a test by the names of a table; of these, some take seconds."""
    marked = [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in table]
    return pytest.mark.parametrize("name", marked)


def warned(warns, message, follow):
    """See a warning, do what it says, and see that it does not come again."""
    with pytest.warns(BnpatchWarning) as found:
        warns()
    assert any(re.search(message, str(each.message)) for each in found), [str(f.message) for f in found]
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always", BnpatchWarning)
        follow()
    assert not any(re.search(message, str(each.message)) for each in again), message


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


def logits_alone(logits):
    return logits


class Net(nn.Module):
    def __init__(self, norm=None, result=logits_alone, channels=3):
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
MANY = (X.repeat(10, 1, 1, 1), np.tile(Y, 10))


def opened(data, names=None, **options):
    examples = bnpatch.open_examples(data, loaded(names), **options)
    next(examples.batches(6))
    return examples


def onnx_file(w, proto, name="model.onnx"):
    return w.file(name, proto.SerializeToString())
