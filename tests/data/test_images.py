"""Images of any mode become gray or color images of 8 bits."""

import numpy as np
import pytest
import timm
import torchvision
from PIL import Image

from bnpatch.data.images import FileImages, as_mode
from tests.data.pictures import gradient


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


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_are_read_as_torchvision_and_timm_read_them(tmp_path, suffix):
    """Whatever EXIF says of their orientation."""
    image, about = gradient("RGB").resize((8, 4)), Image.Exif()
    about[0x0112] = 6
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / f"0.{suffix}", exif=about)
    read = np.asarray(FileImages([tmp_path / "a" / f"0.{suffix}"], "RGB", tmp_path).read(0))
    assert read.shape == (4, 8, 3)
    assert np.array_equal(read, torchvision.datasets.ImageFolder(tmp_path)[0][0])
    assert np.array_equal(read, timm.data.create_dataset("", tmp_path)[0][0])
