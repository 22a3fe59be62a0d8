import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data import decoding
from bnpatch.data.dataset import Examples, folds, split
from bnpatch.data.images import FileImages, as_mode


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


def test_split_is_stratified_seeded_and_complete():
    targets = np.repeat([0, 1, 2], [100, 20, 4])
    tuning, held_out = split(targets, 0.25, seed=0)
    assert np.bincount(targets[held_out]).tolist() == [25, 5, 1]
    assert sorted([*tuning, *held_out]) == list(range(124))
    assert np.array_equal(split(targets, 0.25, seed=0)[1], held_out)
    assert not np.array_equal(split(targets, 0.25, seed=1)[1], held_out)
    singles = split(np.arange(100), 0.3, seed=0)[1]
    assert len(singles) == 30


def test_the_unlabelled_are_held_out_only_where_all_are():
    strata = np.array([-1] * 50 + [0] * 30 + [1] * 20)
    tuning, held_out = split(strata, 0.5, seed=0)
    assert np.bincount(strata[held_out]).tolist() == [15, 10]
    assert sorted([*tuning, *held_out]) == list(range(100))
    tuning, held_out = split(np.full(40, -1), 0.25, seed=0)
    assert (len(tuning), len(held_out)) == (30, 10)
    assert not np.array_equal(held_out, split(np.full(40, -1), 0.25, seed=1)[1])


@pytest.mark.parametrize("k", [2, 3, 7])
def test_folds_are_disjoint_complete_and_stratified(k):
    strata = np.random.default_rng(0).permutation(np.repeat([-1, 0, 1, 2], [10, 70, 35, 8]))
    parts = folds(strata, k, seed=0)
    assert sorted(np.concatenate(parts)) == np.flatnonzero(strata >= 0).tolist()
    counts = np.array([np.bincount(strata[part], minlength=3) for part in parts])
    assert (np.ptp(counts, axis=0) <= 1).all()
    assert np.ptp([len(part) for part in parts]) <= 1
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(np.array_equal(a, b) for a, b in zip(parts, folds(strata, k, seed=0), strict=True))
    assert not np.array_equal(parts[0], folds(strata, k, seed=1)[0])


def test_folds_of_the_unlabelled():
    assert sorted(np.concatenate(folds(np.full(11, -1), 4, seed=0))) == list(range(11))


@pytest.mark.parametrize("k", [1, 6])
def test_more_folds_than_examples_are_refused(k):
    with pytest.raises(BnpatchError, match=f"5 examples can't be held out in {k} folds"):
        folds(np.zeros(5, int), k, seed=0)


def gradient(mode):
    ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "16-bit":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "palette":
        return Image.fromarray(ramp).convert("P")
    return Image.fromarray(ramp).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "16-bit", "palette", "1", "YCbCr"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_mode_of_image_is_converted(mode, wanted, tmp_path):
    image = gradient(mode)
    suffix = {"CMYK": "tif", "YCbCr": "jpg"}.get(mode, "png")
    image.save(tmp_path / f"image.{suffix}")
    read = FileImages([tmp_path / f"image.{suffix}"], wanted, tmp_path).read(0)
    assert read.mode == wanted
    got, expected = (np.asarray(i.convert("L")).astype(int) for i in (read, gradient("L")))
    if mode != "1":
        assert np.abs(got - expected).max() <= 12  # JPEG and the round trip through CMYK lose a little
    assert got.min() < 20
    assert got.max() > 235


def test_16_bit_values_in_32_bit_images_are_scaled():
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert np.asarray(as_mode(image, "L")).tolist() == [[0, 255]]


def test_rotated_images_stand_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.jpg", exif=exif)
    assert FileImages([tmp_path / "image.jpg"], "RGB", tmp_path).read(0).size == (4, 8)


BROKEN = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "truncated.png": None,
    "enormous.png": "enormous",
}


def break_images(folder):
    """Write one broken image of each kind into the class folder 0."""
    whole = next(folder.glob("0/*.png")).read_bytes()
    for name, content in BROKEN.items():
        if content == "enormous":
            header = bytearray(whole)
            header[16:24] = (60000).to_bytes(4, "big") * 2  # width and height: a decompression bomb
            import zlib

            header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
            content = bytes(header)
        (folder / "0" / name).write_bytes(whole[: len(whole) // 2] if content is None else content)


@pytest.fixture
def model(checkpoint):
    return bnpatch.load(checkpoint)


@pytest.fixture
def images(folder, tmp_path):
    """A copy of the folder of images, to spoil."""
    return shutil.copytree(folder, tmp_path / "val")


def test_a_folder(model, folder, foggy):
    data = bnpatch.open_examples(folder, model)
    assert len(data) == 120
    order = {data.source.name(i): i for i in range(120)}
    index = order[f"{foggy[1][7]}/0007.png"]
    assert data.targets[index] == foggy[1][7]
    (batch,) = data.batches(1, np.array([index]))
    assert np.array_equal(batch.x[0, 0].numpy(), foggy[0][7])


def test_broken_images_of_all_kinds_are_counted(model, images):
    break_images(images)
    data = bnpatch.open_examples(images, model, num_workers=0)
    assert sum(len(b.indices) for b in data.batches(64)) == 120
    assert {data.source.name(i).split("/")[1] for i in data.skipped} == set(BROKEN)
    with pytest.raises(BnpatchError, match="cannot read 0/"):
        list(bnpatch.open_examples(images, model, strict=True).batches(64))


def test_images_of_mixed_sizes_and_modes(model, images):
    Image.new("RGB", (300, 20)).save(images / "0" / "wide.png")
    Image.new("CMYK", (20, 300)).save(images / "0" / "tall.jpg")
    gradient("16-bit").save(images / "0" / "deep.png")
    data = bnpatch.open_examples(images, model)
    assert sum(len(b.indices) for b in data.batches(64)) == 123
    assert not data.skipped


def test_an_npz_file(model, foggy, tmp_path):
    for shape in ((-1, 32, 32), (-1, 32, 32, 1), (-1, 1, 32, 32)):
        np.savez(tmp_path / "val.npz", x=foggy[0].reshape(shape), y=foggy[1])
        (batch,) = bnpatch.open_examples(tmp_path / "val.npz", model).batches(4, np.arange(4))
        assert np.array_equal(batch.x[:, 0].numpy(), foggy[0][:4])


def test_float_arrays_are_inputs_as_they_are(model, foggy):
    x = foggy[0][:, None].astype(np.float32) / 127.5 - 1
    as_floats = next(bnpatch.open_examples((x, foggy[1]), model).batches(8))
    as_bytes = next(bnpatch.open_examples((foggy[0], foggy[1]), model).batches(8))
    torch.testing.assert_close(model.predict(as_floats.x), model.predict(as_bytes.x), rtol=1e-4, atol=1e-4)


def test_a_torch_data_set(model, foggy):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return Image.fromarray(foggy[0][index]), int(foggy[1][index])

    data = bnpatch.open_examples(Pairs(), model)
    assert data.targets.tolist() == foggy[1][:20].tolist()
    assert sum(len(b.indices) for b in data.batches(8)) == 20


def test_a_named_data_set(model, foggy, tmp_path):
    """torch/fashion_mnist from the files that torchvision expects, made here."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.ascontiguousarray(foggy[0][:30, :28, :28])
    for part in ("train", "t10k"):
        header = b"".join(n.to_bytes(4, "big") for n in (2051, 30, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (2049, 30))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + foggy[1][:30].astype(np.uint8).tobytes())
    data = bnpatch.open_examples("torch/fashion_mnist", model, data_root=str(tmp_path))
    assert data.targets.tolist() == foggy[1][:30].tolist()
    assert next(data.batches(4)).x.shape == (4, 1, 32, 32)


def test_limit_is_stratified(model, foggy):
    data = bnpatch.open_examples(foggy, model, limit=100)
    counts = np.bincount(data.targets, minlength=10)
    assert counts.sum() == 100
    assert counts.min() >= 8


def test_a_grayscale_image_for_an_rgb_model(folder):
    import timm

    rgb = bnpatch.load(timm.create_model("test_resnet", num_classes=10))
    assert next(bnpatch.open_examples(folder, rgb).batches(2)).x.shape == (2, 3, 160, 160)


def bad(tmp_path, kind):
    path = tmp_path / kind
    if kind == "empty folder":
        path.mkdir()
    elif kind == "images without classes":
        path.mkdir()
        Image.new("L", (4, 4)).save(path / "a.png")
    elif kind == "too many classes":
        for name in "abcdefghijkl":
            (path / name).mkdir(parents=True)
            Image.new("L", (4, 4)).save(path / name / "a.png")
    elif kind == "file.txt":
        path.write_text("")
    elif kind == "broken.npz":
        path.write_bytes(b"PK nothing")
    elif kind == "other.npz":
        np.savez(path, a=np.zeros(3))
    elif kind == "lengths.npz":
        np.savez(path, x=np.zeros((3, 8, 8), np.uint8), y=np.zeros(2, int))
    elif kind == "classes.npz":
        np.savez(path, x=np.zeros((3, 8, 8), np.uint8), y=np.array([0, 1, 10]))
    elif kind == "none.npz":
        np.savez(path, x=np.zeros((0, 8, 8), np.uint8), y=np.zeros(0, int))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing there", "there is no .*nothing there; give a folder"),
        ("empty folder", "has no images; it needs a folder of images per class"),
        ("images without classes", "are in no class folders; make one folder per class"),
        ("too many classes", "has 12 class folders, the model has 10 outputs; .*--class-map"),
        ("file.txt", "is not a data set"),
        ("broken.npz", "damaged|cannot read"),
        ("other.npz", "has the arrays a; name the images x and the classes y"),
        ("lengths.npz", "3 images and targets of shape"),
        ("classes.npz", "the data has class 10, model has the outputs 0 to 9"),
        ("none.npz", "has no examples"),
        ("torch/cifar10", "cannot open the data set torch/cifar10"),
    ],
)
def test_bad_data_is_refused_in_one_line(model, tmp_path, kind, message):
    data = kind if "/" in kind else bad(tmp_path, kind)
    with pytest.raises(BnpatchError, match=message) as error:
        bnpatch.open_examples(data, model, data_root=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_class_map(model, images, tmp_path):
    names = [f"digit{d}" for d in range(10)]
    for digit, name in enumerate(names):
        (images / str(digit)).rename(images / name)
    (tmp_path / "map.txt").write_text("\n".join(reversed(names)))
    data = bnpatch.open_examples(images, model, class_map=tmp_path / "map.txt")
    first = data.source.name(0).split("/")[0]
    assert data.targets[0] == 9 - int(first.removeprefix("digit"))
    with pytest.raises(BnpatchError, match=r"none of the class folders .* say which is which with"):
        bnpatch.open_examples(images, model)


def test_classes_are_the_folders_below_the_root_at_any_depth(tmp_path):
    import timm

    for path in ("cat/indoor", "cat/outdoor", "dog/indoor"):
        (tmp_path / path).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / path / "a.png")
    data = bnpatch.open_examples(tmp_path, bnpatch.load(timm.create_model("test_resnet", num_classes=2)))
    assert {data.source.name(i): int(data.targets[i]) for i in range(3)} == {
        "cat/indoor/a.png": 0,
        "cat/outdoor/a.png": 0,
        "dog/indoor/a.png": 1,
    }


def test_every_format_that_can_be_read_is_seen_and_stray_images_are_told(model, images):
    for suffix in ("bmp", "webp", "tif", "jpeg"):
        Image.new("L", (8, 8)).save(images / "0" / f"a.{suffix}")
    Image.new("L", (8, 8)).save(images / "stray.png")
    with pytest.warns(BnpatchWarning, match="1 images of .* are in no class folder: left out"):
        assert len(bnpatch.open_examples(images, model)) == 124


def test_targets_that_a_data_set_changes_are_taken_as_changed(model, foggy):
    class Pairs(torch.utils.data.Dataset):
        targets = (0,) * 10
        target_transform = staticmethod(lambda target: target + 1)

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return Image.fromarray(foggy[0][index]), self.target_transform(self.targets[index])

    assert set(bnpatch.open_examples(Pairs(), model).targets) == {1}


def test_streams_and_odd_arrays_are_refused(model):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(BnpatchError, match="is a stream"):
        bnpatch.open_examples(Stream(), model)
    with pytest.raises(BnpatchError, match=r"images are of type torch\.int64"):
        bnpatch.open_examples((np.zeros((2, 32, 32), int), [0, 1]), model)


def test_an_index_that_comes_twice_is_served_once():
    _, data = examples()
    assert values(data.batches(8, np.array([0, 0, 1, 2]))) == [0, 1, 2]


def test_readable_are_those_that_can_be_read_and_none_is_an_error(model, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val")
    break_images(tmp_path / "val")
    examples = bnpatch.open_examples(tmp_path / "val", model, num_workers=0)
    everything = np.arange(len(examples))
    kept = examples.readable(everything)
    assert len(kept) == len(examples) - len(BROKEN)
    assert set(everything) - set(kept) == set(examples.skipped)
    with pytest.raises(BnpatchError, match="none of the images can be read"):
        examples.readable(np.array(sorted(examples.skipped)))
