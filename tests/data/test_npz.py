""".npz files: MedMNIST's layout, and files that are not what they claim to be."""

import io
import os
import resource
import time
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning


def medmnist(path, images, labels, *parts):
    arrays = {}
    for start, part in enumerate(parts):
        arrays[f"{part}_images"] = images[start * 10 : start * 10 + 10]
        arrays[f"{part}_labels"] = labels[start * 10 : start * 10 + 10, None].astype(np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("parts", "split", "read"),
    [
        (("train", "val", "test"), "validation", "val"),
        (("train", "test"), "validation", "test"),
        (("train", "val", "test"), "test", "test"),
        (("train", "val", "test"), "train", "train"),
    ],
)
def test_medmnist(model, foggy, tmp_path, parts, split, read):
    path = medmnist(tmp_path / "med.npz", *foggy, *parts)
    is_chosen = split != "validation"
    told = pytest.warns(BnpatchWarning, match=f"several parts; read are {read}_images, --split")
    with nullcontext() if is_chosen else told:
        data = bnpatch.open_examples(path, model, split_name=split)
    start = 10 * parts.index(read)
    assert data.targets.shape == (10,)
    assert np.array_equal(data.targets, foggy[1][start : start + 10])
    assert np.array_equal(next(data.batches(10)).x[:, 0], foggy[0][start : start + 10])


def test_training_images_are_not_taken_for_others(model, foggy, tmp_path):
    path = medmnist(tmp_path / "med.npz", *foggy, "train")
    with pytest.raises(BnpatchError, match="has the arrays train_images, train_labels"):
        bnpatch.open_examples(path, model)


def test_a_column_of_classes_is_flattened_and_a_column_of_numbers_is_not(model, foggy):
    x, y = foggy[0][:6], foggy[1][:6, None]
    assert bnpatch.open_examples((x, y), model).targets.tolist() == foggy[1][:6].tolist()
    assert bnpatch.open_examples((x, y / 7), model, classes=False).targets.shape == (6, 1)


def header(descr, shape):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def damaged(path, kind, foggy):
    whole = io.BytesIO()
    np.savez_compressed(whole, x=foggy[0][:50], y=foggy[1][:50])
    content = bytearray(whole.getvalue())
    if kind == "truncated":
        del content[len(content) // 2 :]
    elif kind == "overwritten":
        content[200:260] = bytes(60)
    elif kind == "encrypted":  # the flag of every entry says so, in both places
        with zipfile.ZipFile(whole) as file:
            for info in file.infolist():
                content[info.header_offset + 6] |= 1
        start = 0
        while (start := content.find(b"PK\x01\x02", start)) >= 0:
            content[start + 8] |= 1
            start += 4
    elif kind == "no zip":
        content = bytearray(b"\x80\x04K\x01.")
    elif kind == "npy":
        one = io.BytesIO()
        np.save(one, foggy[0])
        content = bytearray(one.getvalue())
    elif kind == "empty":
        content = bytearray()
    elif kind == "objects":
        np.savez(path, x=np.array([foggy[0][0], None], dtype=object), y=np.zeros(2))
        return
    else:
        claims = {
            "petabytes": header("|u1", (10**12, 32, 32)),
            "negative": header("|u1", (-3, 32, 32)),
            "odd header": header("|u1", (3, 32, 32)).replace(b"(3,", b"(__"),
            "many": header("|u1", (2, 32, 32)),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.npy", claims[kind] + bytes(100))
            file.writestr("y.npy", header("<i8", (2,)) + bytes(16))
        return
    path.write_bytes(content)


KINDS = {
    "truncated": "damaged or not an .npz file",
    "overwritten": "damaged or not an .npz file",
    "encrypted": "encrypted",
    "no zip": "damaged or not an .npz file",
    "npy": "damaged or not an .npz file",
    "empty": "damaged or not an .npz file",
    "objects": "Python objects, not numbers",
    "petabytes": "claims 1,024,000,000,000,000 bytes",
    "negative": "claims",
    "odd header": "damaged or not an .npz file",
    "many": "claims 2,048 bytes, and has",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_named_at_once_and_without_memory(model, foggy, tmp_path, kind):
    damaged(tmp_path / "bad.npz", kind, foggy)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(BnpatchError, match=rf"bad\.npz.*{KINDS[kind]}|{KINDS[kind]}.*bad\.npz") as error:
        bnpatch.open_examples(tmp_path / "bad.npz", model)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5  # it takes milliseconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_a_size_that_the_list_of_the_archive_claims_too(model, tmp_path):
    """The header and the central directory agree on a terabyte, which no such file can hold."""
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", header("|u1", (10**6, 32, 32)) + bytes(100))
        file.writestr("y.npy", header("<i8", (2,)) + bytes(16))
    content = bytearray(path.read_bytes())
    start = content.find(b"PK\x01\x02")
    content[start + 24 : start + 28] = (2 * 10**9).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BnpatchError, match=r"bad\.npz is damaged .*claims 1,024,000,000 bytes"):
        bnpatch.open_examples(path, model)


def test_a_pipe_is_refused(model, tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(BnpatchError, match="not a regular file"):
        bnpatch.open_examples(tmp_path / "x.npz", model)


@pytest.mark.parametrize("x", [np.array(["a", "b"]), np.array([("a", 1)], dtype="U1,i4"), np.array(3)])
def test_arrays_that_are_no_images_are_refused(model, tmp_path, x):
    np.savez(tmp_path / "x.npz", x=x, y=np.zeros(2, int))
    with pytest.raises(BnpatchError, match="the images are of type"):
        bnpatch.open_examples(tmp_path / "x.npz", model)


def test_another_order_of_bytes_is_read(model, tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 1, 32, 32)).astype(">f4")
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(4).astype(">i2"))
    data = bnpatch.open_examples(tmp_path / "x.npz", model)
    assert np.array_equal(next(data.batches(4)).x.numpy(), x)
    assert data.targets.tolist() == [0, 1, 2, 3]
