"""Images of 16 and 32 bits whose values have fewer."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError, BnpatchWarning
from bnpatch.data.bit_depth import BitDepth, of_files
from bnpatch.data.images import FileImages, as_mode
from bnpatch.evaluation.evaluate import evaluate
from bnpatch.evaluation.metrics import ACCURACY
from bnpatch_cli.options import Reading


def write_png(path, values):
    """Write 16-bit colors, (H, W, 3 or 4), which Pillow doesn't write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def write_tiff(path, values, order):
    """Write 16-bit colors, (H, W, 3), in an order of bytes, "<" or ">"."""
    height, width, channels = values.shape
    content = values.astype(f"{order}u2").tobytes()
    tags = [(256, width), (257, height), (258, None), (259, 1), (262, 2), (273, None), (277, channels)]
    tags += [(278, height), (279, len(content))]
    depths = 8 + 2 + 12 * len(tags) + 4
    places = {258: depths, 273: depths + 2 * channels}
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, channels if tag == 258 else 1, places.get(tag, value))
        if tag != 258
        else struct.pack(f"{order}HHII", tag, 3, channels, depths)
        for tag, value in tags
    )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(
        head + entries + struct.pack(f"{order}I", 0) + struct.pack(f"{order}3H", 16, 16, 16) + content
    )


@pytest.mark.parametrize("stored", [np.uint16, np.int32])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_images_score_the_same_however_many_bits_they_are_stored_in(model, digits, tmp_path, bits, stored):
    (images, labels), suffix = (a[:100] for a in digits[1]), "tif" if stored is np.int32 else "png"
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        deep = Image.fromarray((image.astype(stored) << (bits - 8)) | (1 << (bits - 8)) - 1)
        deep.save(tmp_path / str(label) / f"{index}.{suffix}")
    if bits == 16:
        data = bnpatch.open_examples(tmp_path, model)
    else:
        with pytest.warns(BnpatchWarning, match=rf"taken for {bits} bits, --bit-depth N .* says otherwise"):
            data = bnpatch.open_examples(tmp_path, model)
    expected = evaluate(model, bnpatch.open_examples((images, labels), model)).mean(ACCURACY)
    assert expected > 0.5  # black images score 0.1
    assert evaluate(model, data).mean(ACCURACY) == expected
    index = next(i for i in range(100) if data.source.name(i).endswith(f"/7.{suffix}"))
    assert np.array_equal(next(data.batches(1, np.array([index]))).x[0, 0], images[7])


@pytest.mark.parametrize("kind", ["png", "alpha", "<", ">"])
def test_colors_of_12_bits(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 4096, (8, 9, 3)).astype(np.uint16)
    path = tmp_path / f"image.{'tif' if kind in '<>' else 'png'}"
    if kind in "<>":
        write_tiff(path, values, kind)
    else:
        opaque = np.full((8, 9, 1), 65535, np.uint16)
        write_png(path, np.concatenate([values, opaque], axis=2) if kind == "alpha" else values)
    with pytest.warns(BnpatchWarning, match="taken for 12 bits"):
        depth = of_files([[path]], "here")
    assert depth.bits == 12
    read = FileImages([path], "RGB", tmp_path, depth).read(0)
    assert np.array_equal(np.asarray(read), values >> 4)
    as_16 = FileImages([path], "RGB", tmp_path).read(0)
    assert np.array_equal(np.asarray(as_16), values >> 8)


def test_the_range_is_that_of_the_data_set_not_of_an_image(model, tmp_path):
    for name, value in (("dark", 200), ("bright", 4095)):
        for index in range(30):
            (tmp_path / "3").mkdir(exist_ok=True)
            image = Image.fromarray(np.full((32, 32), value, np.uint16))
            image.save(tmp_path / "3" / f"{name}{index}.png")
    with pytest.warns(BnpatchWarning, match="up to 4095"):
        data = bnpatch.open_examples(tmp_path, model)
    x = next(data.batches(60)).x
    assert sorted(set(x.flatten().tolist())) == [200 >> 4, 255]


def test_a_given_depth_overrules_and_says_nothing(model, tmp_path):
    (tmp_path / "3").mkdir()
    Image.fromarray(np.full((32, 32), 1000, np.uint16)).save(tmp_path / "3" / "a.png")
    data = bnpatch.open_examples(tmp_path, model, bit_depth=12)
    assert set(next(data.batches(1)).x.flatten().tolist()) == {1000 >> 4}
    assert Reading(bit_depth=12).settings(model)["bit_depth"] == 12  # --bit-depth
    assert data.fingerprint() != bnpatch.open_examples(tmp_path, model, bit_depth=16).fingerprint()
    clipped = bnpatch.open_examples(tmp_path, model, bit_depth=8)
    assert set(next(clipped.batches(1)).x.flatten().tolist()) == {255}
    for bits in (7, 33):
        with pytest.raises(BnpatchError, match=f"images of {bits} bits"):
            bnpatch.open_examples(tmp_path, model, bit_depth=bits)


def test_an_image_that_the_sample_did_not_foresee_is_counted(model, tmp_path):
    (tmp_path / "3").mkdir()
    for index in range(100):
        Image.fromarray(np.full((32, 32), 4000, np.uint16)).save(tmp_path / "3" / f"{index:02}.png")
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(tmp_path / "3" / "98.png")
    with pytest.warns(BnpatchWarning, match="12 bits"):
        data = bnpatch.open_examples(tmp_path, model)
    assert len(next(data.batches(100)).x) == 99
    assert list(data.skipped.values()) == ["ValueError: values up to 60000, beyond 12 bits (--bit-depth)"]


def test_a_rare_deep_image_is_not_silently_black(model, tmp_path):
    (tmp_path / "3").mkdir()
    for index in range(100):
        Image.new("L", (32, 32), 100).save(tmp_path / "3" / f"{index:02}.png")
    Image.fromarray(np.full((32, 32), 4000, np.uint16)).save(tmp_path / "3" / "98.png")
    write_png(tmp_path / "3" / "97.png", np.full((32, 32, 3), 4000, np.uint16))
    data = bnpatch.open_examples(tmp_path, model)
    assert len(next(data.batches(100)).x) == 98
    assert set(data.skipped.values()) == {
        "ValueError: values up to 4000 only, almost black as 16 bits (--bit-depth)"
    }


def test_negative_values_are_refused():
    image = Image.fromarray(np.array([[-5, 70]], dtype=np.int32))
    for depth in (BitDepth(), BitDepth(12, "given"), BitDepth(12, "found")):
        with pytest.raises(ValueError, match="negative values"):
            as_mode(image, "L", depth)


def test_a_torch_data_set_of_12_bits(model, digits):
    images, labels = digits[1]

    class Pairs:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return Image.fromarray(images[index].astype(np.uint16) << 4), int(labels[index])

    with pytest.warns(BnpatchWarning, match="taken for 12 bits"):
        data = bnpatch.open_examples(Pairs(), model)
    assert np.array_equal(next(data.batches(20)).x[:, 0], images[:20])
    data = bnpatch.open_examples(Pairs(), model, bit_depth=16)
    assert np.array_equal(next(data.batches(20)).x[:, 0], images[:20] >> 4)


def test_deep_colors_are_not_turned_either(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (4, 8, 3)).astype(np.uint16)
    write_png(tmp_path / "a.png", values)
    exif = Image.new("L", (1, 1)).getexif()
    exif[0x0112] = 6
    content = (tmp_path / "a.png").read_bytes()
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    source = FileImages([tmp_path / "a.png"], "RGB", tmp_path, BitDepth(12, "given"))
    assert np.array_equal(np.asarray(source.read(0)), values >> 4)
    with pytest.warns(BnpatchWarning, match="1 image, such as a.png, must be turned"):
        source.warn_of_orientation()
