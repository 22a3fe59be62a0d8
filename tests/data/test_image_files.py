"""Which files of a folder are images: every one, once, and nothing else."""

import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile, features

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data import image_files
from bnpatch.data.image_files import class_folders, find_images


@pytest.fixture(autouse=True)
def alarm():
    """Whatever hangs is a failure: everything here takes moments."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number % 256).save(folder / name, format="PNG")
    return folder


def names_in(folder):
    found = find_images(folder).by_class
    return {str(path.relative_to(folder)) for paths in found.values() for path in paths}


def summary(data):
    list(data.batches(64))
    return {data.source.name(index): why for index, why in data.skipped.items()}


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
FOREIGN = {
    "a.heic": HEIC,
    "b.jxl": b"\xff\x0a\0\0",
    "c.dng": b"II*\0",
    "d.avif": b"\0\0\0\x18ftypavif",
    "e": HEIC,
    "f.jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
    "G.HEIF": HEIC,
    "h": b"\0\0\0\x0cJXL \r\n\x87\n",
}


def test_images_that_cannot_be_read_here_are_counted_and_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    image_files._register.cache_clear()
    write(tmp_path, "3/ok.png", "3/preview.nef")
    for name, content in FOREIGN.items():
        (tmp_path / "3" / name).write_bytes(content)
    problems = summary(bnpatch.open_examples(tmp_path, model))
    assert set(problems) == {f"3/{name}" for name in (*FOREIGN, "preview.nef")}
    assert "the preview only" in problems["3/c.dng"]
    assert problems["3/a.heic"] == "OSError: Pillow can't read it here (pip install pillow-heif)"
    with pytest.raises(BnpatchError, match="cannot read 3/"):
        list(bnpatch.open_examples(tmp_path, model, strict=True).batches(4))


def test_files_without_a_telling_name_are_known_by_their_content(tmp_path):
    write(tmp_path, "3/noname", "3/photo.2021", "3/b.png")
    for suffix in ("jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        Image.new("RGB", (8, 8)).save(tmp_path / "3" / f"as_{suffix}", format=suffix.upper())
    (tmp_path / "3" / "notes").write_text("BM is how a bitmap begins, P5 a graymap")
    (tmp_path / "3" / "labels.txt").write_bytes((tmp_path / "3" / "b.png").read_bytes())
    (tmp_path / "3" / "empty").write_text("")
    os.mkfifo(tmp_path / "3" / "pipe")
    expected = {"noname", "photo.2021", "b.png"}
    expected |= {f"as_{suffix}" for suffix in ("jpeg", "gif", "bmp", "tiff", "webp", "ppm")}
    assert names_in(tmp_path) == {f"3/{name}" for name in expected}


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_decoded(model, tmp_path):
    write(tmp_path, "3/a.png")
    Image.new("L", (32, 32), 100).save(tmp_path / "3" / "b.avif")
    Image.new("L", (32, 32), 100).save(tmp_path / "3" / "c", format="AVIF")
    data = bnpatch.open_examples(tmp_path, model)
    assert (len(data), summary(data)) == (3, {})


def test_a_package_that_reads_heic_is_used_where_it_is_installed(model, tmp_path, monkeypatch):
    class Heic(ImageFile.ImageFile):
        def _open(self):
            self._size, self._mode, self.tile = (8, 8), "L", []

        def load(self):
            self.im = Image.new("L", (8, 8), 9).im

    def register():
        Image.register_open("HEIC-TEST", Heic, lambda start: start[8:12] == b"heic")

    for table in (Image.OPEN, Image.ID):
        kept = table.copy()
        monkeypatch.setattr(Image, "OPEN" if table is Image.OPEN else "ID", kept)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    image_files._register.cache_clear()
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "a.heic").write_bytes(HEIC)
    data = bnpatch.open_examples(tmp_path, model)
    assert set(next(data.batches(1)).x.flatten().tolist()) == {9}
    image_files._register.cache_clear()


BY_TOOLS = (
    *("3/.ipynb_checkpoints/a-checkpoint.png", "__MACOSX/3/._a.png", "3/@eaDir/a.png/SYNO.jpg"),
    *(".cache/x.png", "3/._a.png", "lost+found/x.png", "3/__pycache__/y.png", "._b.png", "@eaDir/q.png"),
)


def test_what_tools_leave_is_skipped_and_counted(model, tmp_path):
    write(tmp_path, "3/a.png", "5/b.png", *BY_TOOLS)
    (tmp_path / "3" / "Thumbs.db").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / ".DS_Store").write_bytes(b"")
    with pytest.warns(BnpatchWarning, match=r"hidden or made by a tool: 11 \(.*, \.\.\.\), with 9 images"):
        data = bnpatch.open_examples(tmp_path, model)
    assert {data.source.name(i) for i in range(len(data))} == {"3/a.png", "5/b.png"}
    assert {"3/Thumbs.db", "__MACOSX", "3/.ipynb_checkpoints", "3/._a.png"} <= set(data.left_out)
    assert class_folders(tmp_path) == ["3", "5"]
    with pytest.warns(BnpatchWarning, match="9 images"):
        data = bnpatch.open_examples(tmp_path, model, labels="optional")
    assert len(data) == 2


def test_what_tools_leave_and_is_no_image_is_not_worth_a_warning(model, tmp_path):
    write(tmp_path, "3/a.png")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", ".gitkeep"):
        (tmp_path / "3" / name).write_text("")
    (tmp_path / ".git").mkdir()
    data = bnpatch.open_examples(tmp_path, model)  # a warning would be an error here
    assert len(data) == 1
    assert len(data.left_out) == 5


def test_results_of_an_earlier_run_among_the_images_are_no_images(model, tmp_path):
    write(tmp_path, "3/a.png", "5/b.png", "bnpatch-out/alpha-curve.png", "mine/alpha-curve.png")
    with pytest.warns(BnpatchWarning) as said:
        data = bnpatch.open_examples(tmp_path, model)
    assert sorted(data.targets) == [3, 5]
    told = sorted(str(warning.message).split("; ")[0] for warning in said)
    assert "1 folder without images ('mine'), not taken for classes" in told[0]
    assert "hidden or made by a tool: 2 (bnpatch-out, mine/alpha-curve.png), with 2 images" in told[1]


def test_a_root_in_a_hidden_folder_is_read(model, tmp_path):
    write(tmp_path / ".cache" / "val", "3/a.png")
    assert len(bnpatch.open_examples(tmp_path / ".cache" / "val", model)) == 1


def test_pipes_and_devices_are_counted_as_unreadable(model, tmp_path):
    write(tmp_path, "3/a.png")
    os.mkfifo(tmp_path / "3" / "pipe.png")
    (tmp_path / "3" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "3" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "3" / "self.png").symlink_to("self.png")
    problems = summary(bnpatch.open_examples(tmp_path, model))
    assert set(problems) == {f"3/{name}.png" for name in ("pipe", "zero", "gone", "self")}
    assert problems["3/pipe.png"] == problems["3/zero.png"] == "OSError: not a regular file"


def test_loops_of_links_are_not_followed(model, tmp_path):
    write(tmp_path / "val", "3/a.png", "5/b.png")
    write(tmp_path / "elsewhere", "c.png")
    (tmp_path / "val" / "3" / "up").symlink_to("..")
    (tmp_path / "val" / "5" / "here").symlink_to(".")
    (tmp_path / "val" / "5" / "far").symlink_to(tmp_path)  # above the root
    (tmp_path / "val" / "5" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "val")
    (tmp_path / "elsewhere" / "across").symlink_to(tmp_path / "val" / "3")
    (tmp_path / "val" / "self").symlink_to(".")
    with pytest.warns(BnpatchWarning, match="a link to what is there already: 6"):
        data = bnpatch.open_examples(tmp_path / "val", model)
    names = sorted(data.source.name(i) for i in range(len(data)))
    assert names == ["3/a.png", "5/b.png", "5/more/c.png"]
    assert class_folders(tmp_path / "val") == ["3", "5"]


def test_a_file_counts_once_however_many_links_lead_to_it(model, tmp_path):
    write(tmp_path / "val", "3/b.png")
    write(tmp_path / "store", "x.png", "blob")
    (tmp_path / "val" / "3" / "a.png").symlink_to("b.png")
    (tmp_path / "val" / "3" / "c.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "val" / "3" / "d.png").symlink_to(tmp_path / "store" / "x.png")
    (tmp_path / "val" / "3" / "e.png").symlink_to(tmp_path / "store" / "blob")
    with pytest.warns(BnpatchWarning, match=r"there already: 2 \(3/a\.png, 3/d\.png\), with 2 images"):
        data = bnpatch.open_examples(tmp_path / "val", model)
    assert [data.source.name(i) for i in range(len(data))] == ["3/b.png", "3/c.png", "3/e.png"]
    assert not summary(data)


def test_a_folder_in_place_wins_over_links_to_it(tmp_path):
    write(tmp_path, "z/a.png")
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "link").symlink_to(tmp_path / "z")
    (tmp_path / "a").symlink_to("z")
    assert names_in(tmp_path) == {"z/a.png"}
    assert class_folders(tmp_path) == ["b", "z"]


def test_class_folders_and_roots_may_be_links(model, tmp_path):
    write(tmp_path / "store", "cat/a.png", ".annex/b.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "3").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "val" / "5").symlink_to(tmp_path / "store" / ".annex")
    (tmp_path / "root").symlink_to("val")
    for root in (tmp_path / "val", tmp_path / "root"):
        data = bnpatch.open_examples(root, model)
        assert {data.source.name(i): int(data.targets[i]) for i in range(2)} == {"3/a.png": 3, "5/b.png": 5}
        assert class_folders(root) == ["3", "5"]


def test_a_very_deep_folder_is_read(tmp_path):
    here = tmp_path
    for _ in range(400):
        here = here / "a"
    here.mkdir(parents=True)
    Image.new("L", (2, 2)).save(here / "x.png")
    assert len(names_in(tmp_path)) == 1


@pytest.fixture
def locked(folder, tmp_path, monkeypatch):
    """A copy of the folder, in which the class folder 4 and a folder in 2 can't be listed."""
    shutil.copytree(folder, tmp_path / "val")
    (tmp_path / "val" / "2" / "deep").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) in {str(tmp_path / "val" / "4"), str(tmp_path / "val" / "2" / "deep")}:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return tmp_path / "val"


def test_folders_that_cannot_be_listed_are_counted_and_named(model, locked):
    model.class_names = None  # the order of the folders decides: without the 4 it would be another
    data = bnpatch.open_examples(locked, model, num_workers=0)
    problems = summary(data)
    assert set(problems) == {"4", "2/deep"}
    assert all("a folder that can't be listed" in why and "denied" in why for why in problems.values())
    for index in range(len(data)):
        assert data.targets[index] == int(data.source.name(index).split("/")[0])
    with pytest.raises(BnpatchError, match=r"cannot read .*: a folder that can't be listed"):
        bnpatch.open_examples(locked, model, strict=True)


def test_a_root_that_cannot_be_listed_is_an_error(model, locked):
    with pytest.raises(BnpatchError, match=r"cannot read the folder .*/4: .*denied"):
        bnpatch.open_examples(locked / "4", model)


@pytest.mark.parametrize(
    ("parts", "meant"),
    [(("train", "val"), "val"), (("train", "test"), "test"), (("valid", "test", "train"), "valid")],
)
def test_the_parent_of_train_and_val_is_refused_with_the_folder_to_give(model, tmp_path, parts, meant):
    write(tmp_path, *(f"{part}/{digit}/a.png" for part in parts for digit in range(10)))
    for labels in ("required", "optional"):
        with pytest.raises(BnpatchError, match=rf"parts of a data set, not classes; give .*/{meant}$"):
            bnpatch.open_examples(tmp_path, model, labels=labels)
    assert len(bnpatch.open_examples(tmp_path / meant, model)) == 10


def test_classes_that_are_called_train_and_test_may_be(tmp_path):
    import timm

    two = bnpatch.load(timm.create_model("test_resnet", num_classes=2))
    write(tmp_path / "val", "test/a.png", "train/b.png")
    with pytest.raises(BnpatchError, match="parts of a data set"):
        bnpatch.open_examples(tmp_path / "val", two)
    (tmp_path / "map.txt").write_text("test\ntrain\n")
    data = bnpatch.open_examples(tmp_path / "val", two, class_map=tmp_path / "map.txt")
    assert np.array_equal(data.targets, [0, 1])


def test_parts_without_labels_are_read(model, tmp_path):
    write(tmp_path, "train/a.png", "val/b.png")
    with pytest.warns(BnpatchWarning, match="count as unlabelled"):
        assert len(bnpatch.open_examples(tmp_path, model, labels="optional")) == 2
