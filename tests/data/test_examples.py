"""Data sets as users have them: folders, arrays, files, torch data sets."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from tests.data.pictures import BROKEN, break_images, gradient


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
        ("nothing there", "there is no '.*nothing there'; give a folder"),
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
    with pytest.warns(BnpatchWarning, match="left out of .*, because in no class folder: 1 image"):
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
