import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.data.corruptions import augmented, corrupted, parse_kinds
from bnpatch.data.dataset import Examples
from bnpatch.data.images import ArrayInputs
from bnpatch.data.standard_corruptions import STANDARD, corrupt, parse_standard_kinds
from tests.data.test_augment import kinds_of

pytest.importorskip("imagecorruptions")

ALL = tuple(STANDARD)

# Glass blur is compiled when it is first used, which takes seconds.
EACH = [pytest.param(kind, marks=pytest.mark.slow if kind == "glass_blur" else ()) for kind in ALL]


def image(channels=3, height=40, width=36):
    """A smooth image with an edge, which all kinds change."""
    y, x = np.mgrid[:height, :width]
    gray = 60 + 60 * (x > width // 2) + 40 * np.sin(y / 3)
    return np.stack([gray + 10 * channel for channel in range(channels)]).astype(np.uint8)


def examples(count=12, side=36, channels=1):
    mode = {1: "L", 3: "RGB"}[channels]
    images = np.stack([np.roll(image(channels, side, side), n, axis=2) for n in range(count)])
    return Examples(
        ArrayInputs(images.squeeze(), mode),
        np.zeros(count),
        lambda item: np.atleast_3d(np.asarray(item)).transpose(2, 0, 1),
        num_workers=0,
    )


def inputs(data, batch_size=64, order=None):
    return {int(i): x for b in data.batches(batch_size, order) for i, x in zip(b.indices, b.x, strict=True)}


def test_the_kinds_are_those_of_the_package():
    from imagecorruptions import get_corruption_names

    assert tuple(get_corruption_names("common")) == ALL
    for group in ("noise", "blur", "weather", "digital"):
        assert [kind for kind in ALL if STANDARD[kind] == group] == get_corruption_names(group)


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 40, 36), (1, 40, 36), (1, 20, 9), (3, 33, 70)])
def test_every_kind_serves_color_gray_and_small_images(kind, channels, height, width):
    x = image(channels, height, width)
    before = x.copy()
    y = corrupt(x, kind, 3, (0, 5))
    assert y.shape == x.shape
    assert y.dtype == np.uint8
    assert y.flags.writeable
    assert np.array_equal(x, before)
    assert not np.array_equal(x, y)
    assert np.array_equal(y, corrupt(x, kind, 3, (0, 5)))


RANDOM = sorted(
    {*ALL} - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
)


@pytest.mark.parametrize("kind", [each for each in EACH if each.values[0] in RANDOM])
def test_what_is_random_depends_on_the_key_and_the_seed(kind):
    x = image()
    one = corrupt(x, kind, 3, (0, 5))
    assert not np.array_equal(one, corrupt(x, kind, 3, (0, 6)))
    assert not np.array_equal(one, corrupt(x, kind, 3, (1, 5)))


@pytest.mark.parametrize("kind", EACH)
def test_the_generator_of_the_caller_is_left_alone(kind):
    np.random.seed(3)
    expected = np.random.RandomState(3).random_sample(4)
    corrupt(image(), kind, 1, (0, 0))
    assert np.array_equal(np.random.random_sample(4), expected)


def test_threads_do_not_disturb_each_other(monkeypatch):
    """A corruption that lets other threads run between its two draws."""

    def slow(x, **options):
        first = np.random.randint(0, 256, x.shape, np.uint8)
        time.sleep(0.005)
        return first + np.random.randint(0, 256, x.shape, np.uint8)

    monkeypatch.setattr("imagecorruptions.corrupt", slow)
    expected = [corrupt(image(), "fog", 1, (0, n)) for n in range(20)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: corrupt(image(), "fog", 1, (0, n)), range(20)))
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_noise_of_gray_images_is_as_strong_as_that_of_color_images():
    """An average over three channels would be weaker by the root of three."""
    flat = np.full((3, 64, 64), 128, np.uint8)
    color, gray = (corrupt(x, "gaussian_noise", 1, (0, 0)).astype(float) for x in (flat, flat[:1]))
    assert color.std() == pytest.approx(0.08 * 255, rel=0.05)  # five standard errors of 4,096 values
    assert gray.std() == pytest.approx(0.08 * 255, rel=0.06)


def test_a_small_image_is_a_cut_out_of_its_mirrored_continuation():
    small = image(3, 16, 32)
    whole = np.concatenate([small[:, 7::-1], small, small[:, :7:-1]], axis=1)
    kind = "defocus_blur"  # not random, and local
    assert np.array_equal(corrupt(small, kind, 1, (0, 0)), corrupt(whole, kind, 1, (0, 0))[:, 8:24])


def test_two_channels_are_refused():
    with pytest.raises(BnpatchError, match="2 channels can't be corrupted"):
        corrupt(image(2), "fog", 1, (0, 0))


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(BnpatchError, match=r"imagecorruptions-imaug.*pip install 'bnpatch\[robustness\]'"):
        corrupted(examples(), "fog", 1)
    with pytest.raises(BnpatchError, match="imagecorruptions-imaug"):
        parse_kinds("contrast,fog")
    assert parse_kinds("contrast,blur") == ("contrast", "blur")  # bnpatch's own need no package


@pytest.mark.parametrize("channels", [1, 3])
def test_a_corrupted_view_is_the_same_in_every_batch_and_order(channels):
    data = examples(channels=channels)
    view = corrupted(data, "shot_noise", 2, seed=4)
    first = inputs(view)
    assert all(
        np.array_equal(first[n], corrupt(inputs(data)[n].numpy(), "shot_noise", 2, (4, n))) for n in first
    )
    again = inputs(corrupted(examples(channels=channels), "shot_noise", 2, seed=4), 5, np.arange(12)[::-1])
    assert all(np.array_equal(first[n], again[n]) for n in first)
    prints = {
        corrupted(data, k, s, seed=d).fingerprint() for k in ("fog", "snow") for s in (1, 2) for d in (0, 1)
    }
    assert len(prints | {data.fingerprint()}) == 9


def test_a_corrupted_image_is_made_once_if_memory_allows_it(monkeypatch):
    made = []

    def counted(x, kind, severity, key):
        made.append(key[1])
        return 255 - x

    monkeypatch.setattr("bnpatch.data.corruptions.corrupt", counted)
    data = examples()
    inputs(data)
    view = corrupted(data, "fog", 1)
    assert all(
        np.array_equal(a, b) for a, b in zip(inputs(view).values(), inputs(view).values(), strict=True)
    )
    assert made == list(range(12))
    assert np.array_equal(inputs(view)[3], 255 - inputs(data)[3])  # the clean cache is left alone
    none = examples()
    none._cache.budget = 0
    view = corrupted(none, "fog", 1)
    inputs(view), inputs(view)
    assert len(made) == 36


def test_augmentation_takes_the_standard_kinds_with_random_severities():
    data = examples(60, channels=3)
    view = augmented(data, "brightness,pixelate,fog", seed=1)
    plain, shifted = inputs(data), inputs(view)
    kinds = kinds_of(view, np.arange(60))
    assert set(kinds) == {"clean", "brightness", "pixelate", "fog"}
    severities = []
    for n, kind in enumerate(kinds):
        if kind in ("pixelate", "fog"):
            ways = [corrupt(plain[n].numpy(), kind, s, (1, n)) for s in range(1, 6)]
            fitting = [s for s, way in enumerate(ways, 1) if np.array_equal(way, shifted[n])]
            assert len(fitting) == 1
            severities += fitting
        elif kind == "clean":
            assert np.array_equal(plain[n], shifted[n])
    assert set(severities) == {1, 2, 3, 4, 5}
    again = inputs(augmented(examples(60, channels=3), "brightness,pixelate,fog", seed=1), 7)
    assert all(np.array_equal(shifted[n], again[n]) for n in shifted)


def test_contrast_and_brightness_are_bnpatchs_own_in_augmentation():
    """A factor about mid-gray, not about the mean of the image."""
    data = examples(40)
    view = augmented(data, "contrast")
    plain, shifted = inputs(data), inputs(view)
    chosen = [n for n, kind in enumerate(kinds_of(view, np.arange(40))) if kind == "contrast"]
    assert chosen
    for n in chosen:
        inside = (shifted[n] > 0) & (shifted[n] < 255)  # elsewhere bytes end
        x, y = (each[n][inside].numpy() - 127.5 for each in (plain, shifted))
        factor = (x * y).sum() / (x * x).sum()
        assert np.abs(y - factor * x).max() < 1.1  # rounding


def test_floats_are_refused(checkpoint):
    floats = (np.zeros((4, 1, 32, 32), np.float32), np.arange(4))
    data = bnpatch.open_examples(floats, bnpatch.load(checkpoint))
    with pytest.raises(BnpatchError, match="floats can't be corrupted"):
        corrupted(data, "fog", 1)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("", "no corruption is named"),
        ("fog,rain", "no corruption 'rain'; choose from gaussian_noise"),
        ("fog,fog", "twice"),
    ],
)
def test_bad_kinds(kinds, message):
    with pytest.raises(BnpatchError, match=message):
        parse_standard_kinds(kinds)


def test_kinds():
    assert parse_standard_kinds(None) == ALL
    assert parse_standard_kinds(" Fog, snow,") == ("fog", "snow")
