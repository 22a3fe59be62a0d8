"""Damages of bytes and of values, whatever the file is."""

import json
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

#: Changes the bytes of a file.
Damage = Callable[[bytes, random.Random], bytes]


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


def repeated(data, rng):
    """Some bytes many times."""
    start = rng.randrange(len(data))
    part = data[start : start + rng.randint(1, 40)] * rng.choice([2, 1000, 20_000])
    return data[:start] + part + data[start:]
