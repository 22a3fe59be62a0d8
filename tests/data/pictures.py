"""Images of every mode, and files that can't be read."""

import zlib

import numpy as np
from PIL import Image

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
            header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
            content = bytes(header)
        (folder / "0" / name).write_bytes(whole[: len(whole) // 2] if content is None else content)


def gradient(mode):
    """An image (8, 8) from black to white."""
    ramp = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "16-bit":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "palette":
        return Image.fromarray(ramp).convert("P")
    return Image.fromarray(ramp).convert(mode)
