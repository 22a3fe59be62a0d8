"""Batches of a data set: decoded once, in order, without what can not be read."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from bnpatch.core.errors import BnpatchError
from bnpatch.data import decoding
from bnpatch.data.dataset import Examples


class Counting:
    """A source that counts its reads; some indices are broken."""

    thread_safe = True

    def __init__(self, size, broken=()):
        self.size, self.broken, self.reads = size, set(broken), []
        self.readers, self.seconds = set(), lambda index: 0

    def __len__(self):
        return self.size

    def read(self, index):
        self.reads.append(index)
        self.readers.add(threading.get_ident())
        time.sleep(self.seconds(index))
        if index in self.broken:
            raise OSError("broken")
        return Image.new("L", (4, 4), index % 256)

    def name(self, index):
        return f"image {index}"

    def content(self, index):
        return b""


def examples(size=10, broken=(), **kwargs):
    source = Counting(size, broken)
    kwargs.setdefault("num_workers", 0)
    return source, Examples(source, np.arange(size) % 3, lambda image: np.asarray(image)[None], **kwargs)


def values(batches):
    return [int(v) for batch in batches for v in batch.x[:, 0, 0, 0]]


def test_batches_in_order_decoded_once():
    source, data = examples()
    batches = list(data.batches(4))
    assert [len(b.indices) for b in batches] == [4, 4, 2]
    assert [b.x.shape for b in batches][:1] == [(4, 1, 4, 4)]
    assert batches[0].x.dtype == torch.uint8
    assert torch.equal(batches[1].targets, torch.tensor([1, 2, 0, 1]))
    assert values(data.batches(3, np.array([7, 2, 5]))) == [7, 2, 5]
    assert sorted(source.reads) == list(range(10))


def test_beyond_the_cache_examples_are_decoded_again():
    source, data = examples(cache_gb=16 * 4 / 1e9)  # four images of sixteen bytes
    first, second = values(data.batches(4)), values(data.batches(4))
    assert first == second == list(range(10))
    assert len(source.reads) == 10 + 6


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_unreadable_are_left_out_and_counted(num_workers):
    _, data = examples(broken=[0, 5], num_workers=num_workers)
    for _ in range(2):
        assert values(data.batches(4)) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert data.skipped == {0: "OSError: broken", 5: "OSError: broken"}


def test_threads_read_a_few_dozen_examples_ahead_and_in_order(monkeypatch):
    class Pool(ThreadPoolExecutor):
        def submit(self, *args):
            submitted.append(args)
            return super().submit(*args)

    submitted = []
    monkeypatch.setattr(decoding, "ThreadPoolExecutor", Pool)
    source, data = examples(1000, num_workers=2)
    source.seconds = lambda index: 0.001 * (index % 3)
    batches = data.batches(4)
    assert values([next(batches), next(batches)]) == list(range(8))
    assert len(submitted) == 8 + 2 * 32
    assert threading.get_ident() not in source.readers
    batches.close()


@pytest.mark.parametrize("thread_safe", [True, False])
def test_by_default_several_threads_read_only_what_is_safe_to_read(thread_safe, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    source, data = examples(300, num_workers=None)
    source.thread_safe = thread_safe
    list(data.batches(100))
    assert (threading.get_ident() in source.readers) == (not thread_safe)


def test_strict_stops_at_the_first():
    _, data = examples(broken=[5], strict=True)
    with pytest.raises(BnpatchError, match="cannot read image 5: OSError: broken; remove it"):
        list(data.batches(4))


def test_keep():
    _, data = examples()
    data.keep(np.array([8, 1]))
    assert values(data.batches(4)) == [8, 1]
    assert data.targets.tolist() == [2, 1]
    assert data.source.name(0) == "image 8"
    data.keep(np.array([1]))  # what was decoded belongs to other numbers now
    assert values(data.batches(4)) == [1]


def test_fingerprint_sees_names_and_targets():
    assert examples()[1].fingerprint() == examples()[1].fingerprint()
    assert examples(9)[1].fingerprint() != examples()[1].fingerprint()


def test_an_index_that_comes_twice_is_served_once():
    _, data = examples()
    assert values(data.batches(8, np.array([0, 0, 1, 2]))) == [0, 1, 2]
