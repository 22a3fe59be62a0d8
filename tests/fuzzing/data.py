"""Images, arrays and class maps, and damages of arrays."""

import functools
import io
import json
import zipfile

import numpy as np
from PIL import Image

import bnpatch
from tests.fuzzing.checkpoints import classifier
from tests.fuzzing.damage import BYTES, flip_bytes


@functools.cache
def _images(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (20, 32, 32), np.uint8), np.arange(20) % 10


@functools.cache
def arrays():
    made = []
    for write in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        write(buffer, x=_images()[0], y=_images()[1])
        made.append(buffer.getvalue())
    return made


def array_bytes(data, rng):
    """Damage an array in the archive, not the archive."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(made, "w") as copy:
        wrong = rng.choice(whole.namelist())
        for name in whole.namelist():
            content = whole.read(name)
            head, rest = content[:128], content[128:]
            if name == wrong:
                head, rest = rng.choice([(rng.choice(BYTES)(head, rng), rest), (head, flip_bytes(rest, rng))])
            copy.writestr(name, head + rest)
    return made.getvalue()


@functools.cache
def _reader():
    return bnpatch.load(classifier(), preprocessing={"img_size": 32})


def read_examples(path):
    data = bnpatch.open_examples(path, _reader(), num_workers=0)
    return [batch.x.sum() for batch in data.batches(8)]


@functools.cache
def pictures():
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    about = Image.Exif()
    about[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 1 << 16, (24, 20), np.uint16))
    ways = [
        (color, {"format": "JPEG", "exif": about}),
        (color, {"format": "PNG"}),
        (color.quantize(16), {"format": "PNG", "transparency": 3}),
        (deep, {"format": "PNG"}),
        (deep, {"format": "TIFF", "compression": "tiff_lzw"}),
        (color.convert("CMYK"), {"format": "TIFF"}),
        (color, {"format": "GIF", "save_all": True, "append_images": [color.rotate(90)]}),
        (color, {"format": "WEBP"}),
        (color, {"format": "BMP"}),
        (color, {"format": "PPM"}),
        (color, {"format": "TGA"}),
        (color, {"format": "ICO"}),
        (color, {"format": "JPEG2000"}),
        (color.convert("L"), {"format": "PCX"}),
        (color, {"format": "DDS"}),
    ]
    made = []
    for image, how in ways:
        buffer = io.BytesIO()
        image.save(buffer, **how)
        made.append(buffer.getvalue())
    return made


def read_picture(path):
    """As one image of a folder, whose bit depth is looked for too."""
    for label in range(10):
        (path.parent / "val" / str(label)).mkdir(parents=True, exist_ok=True)
    path.replace(path.parent / "val" / "3" / path.name)
    return bnpatch.open_examples(path.parent / "val", _reader(), num_workers=0).readable(np.arange(1))


@functools.cache
def class_maps():
    names = [f"class {letter}" for letter in "abcdefghijkl"]
    return [
        "\n".join(names).encode(),
        "\n".join(f"{name}\t{index}" for index, name in enumerate(names)).encode(),
        "\n".join(f'"{name}",{index}' for index, name in enumerate(names)).encode("utf-16"),
        "\n".join(f"{index} {name}" for index, name in enumerate(names)).encode(),
    ]


@functools.cache
def json_class_maps():
    names = [f"class {letter}" for letter in "abcdefghijkl"]
    synsets = {str(index): [f"n{index:08}", name] for index, name in enumerate(names)}
    numbers = {name: index for index, name in enumerate(names)}
    return [json.dumps(value).encode() for value in (names, synsets, numbers)]
