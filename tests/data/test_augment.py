import numpy as np
import pytest
import torch
from PIL import Image

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.data.corruptions import CLEAN_SHARE, augmented, parse_kinds
from bnpatch.data.dataset import Examples
from bnpatch.data.images import ArrayInputs
from bnpatch.evaluation.evaluate import evaluate

ALL = "contrast,brightness,noise,blur"


class Reading(ArrayInputs):
    """Counts what is read."""

    reads = 0

    def read(self, index):
        self.reads += 1
        return super().read(index)


def kinds_of(view, indices):
    """The name of each example's shift, or "clean"."""
    return [("clean", *view.kinds)[number] for number in view.shifts(indices)]


def examples(size=200, side=16, **kwargs):
    images = np.random.default_rng(0).integers(40, 200, (size, side, side), dtype=np.uint8)
    kwargs.setdefault("num_workers", 0)
    return Examples(Reading(images, "L"), np.arange(size) % 5, lambda i: np.asarray(i)[None], **kwargs)


def inputs(data, batch_size=64, order=None):
    """Inputs by index."""
    return {int(i): x for b in data.batches(batch_size, order) for i, x in zip(b.indices, b.x, strict=True)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


def test_an_example_is_the_same_in_every_batch_order_and_process():
    data = examples()
    first = inputs(augmented(data, ALL, seed=3))
    assert same(first, inputs(augmented(data, ALL, seed=3), batch_size=7))
    assert same(first, inputs(augmented(data, ALL, seed=3), 50, np.random.default_rng(1).permutation(200)))
    alone = inputs(augmented(examples(), ALL, seed=3), order=np.array([150, 3, 77]))
    assert all(torch.equal(alone[i], first[i]) for i in alone)
    assert not same(first, inputs(augmented(data, ALL, seed=4)))


def test_a_row_of_draws_does_not_depend_on_the_number_of_examples():
    few, many = (augmented(examples(size), ALL) for size in (20, 200))
    assert kinds_of(few, np.arange(20)) == kinds_of(many, np.arange(20))


def test_half_is_clean_and_the_kinds_share_the_rest():
    data = examples(4000, side=8)
    view = augmented(data, ALL)
    kinds = np.array(kinds_of(view, np.arange(4000)))
    shares = {kind: np.mean(kinds == kind) for kind in ("clean", *ALL.split(","))}
    assert shares["clean"] == pytest.approx(CLEAN_SHARE, abs=0.03)  # four standard errors
    for kind in ALL.split(","):
        assert shares[kind] == pytest.approx(CLEAN_SHARE / 4, abs=0.025)
    plain, shifted = inputs(data), inputs(view)
    for index, kind in enumerate(kinds):
        if kind == "clean":
            assert torch.equal(plain[index], shifted[index])


def of_kind(kind, strength=1.0, side=16):
    """Pairs of inputs (plain, shifted), as floats."""
    data = examples(side=side)
    view = augmented(data, kind, strength=strength)
    plain, shifted = inputs(data), inputs(view)
    chosen = [i for i, k in enumerate(kinds_of(view, np.arange(len(data)))) if k == kind]
    return [(plain[i].double(), shifted[i].double()) for i in chosen]


@pytest.mark.parametrize(("kind", "middle"), [("contrast", 127.5), ("brightness", 0.0)])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_factors_are_what_the_docstring_says(kind, middle, strength):
    factors = []
    for plain, shifted in of_kind(kind, strength):
        inside = (shifted > 0) & (shifted < 255)  # elsewhere bytes end
        x, y = plain[inside] - middle, shifted[inside] - middle
        factor = float((x * y).sum() / (x * x).sum())
        factors.append(factor)
        assert (y - factor * x).abs().max() < 1  # rounding
    assert 1 - 0.6 * strength - 0.01 < min(factors) < 1 - 0.5 * strength
    assert 1 + 0.3 * strength < max(factors) < 1 + 0.4 * strength + 0.01


def test_noise_has_no_mean_and_the_spread_that_the_docstring_says():
    noise = [(shifted - plain) / 255 for plain, shifted in of_kind("noise")]
    spreads = [float(n.std()) for n in noise]
    assert 0.085 < max(spreads) < 0.115  # 256 values know it within 5 percent
    assert min(spreads) < 0.015
    assert abs(float(torch.stack(noise).mean())) < 0.002
    assert not torch.equal(noise[0].sign(), noise[1].sign())


def test_blur_is_gaussian():
    """Of an image with one bright pixel, against the textbook's bell."""
    image = np.zeros((40, 1, 31, 31), np.uint8)
    image[:, :, 15, 15] = 255
    data = Examples(ArrayInputs(image, "L"), np.zeros(40), lambda i: np.asarray(i)[None], num_workers=0)
    view = augmented(data, "blur", strength=1.5)
    kinds = kinds_of(view, np.arange(40))
    at = np.arange(31) - 15
    widest = 0.0
    for index, x in inputs(view).items():
        if kinds[index] != "blur":
            continue
        sigma = 0.02 * 1.5 * 31 * view._draws[index, 2]
        bell = np.exp(-(at[:, None] ** 2 + at**2) / (2 * sigma**2))
        assert np.abs(x[0].numpy() - 255 * bell / bell.sum()).max() <= 0.51
        widest = max(widest, sigma)
    assert 0.8 < widest < 0.93


def test_blur_keeps_flat_images_flat_up_to_the_border():
    flat = np.full((20, 1, 9, 14), 77, np.uint8)
    data = Examples(ArrayInputs(flat, "L"), np.zeros(20), lambda i: np.asarray(i)[None], num_workers=0)
    assert all(bool((x == 77).all()) for x in inputs(augmented(data, "blur")).values())


def test_one_cache_serves_both():
    data = examples(broken := 50)
    view = augmented(data, ALL)
    for _ in range(2):
        inputs(view)
        inputs(data)
        inputs(augmented(data, ALL, seed=9))
    assert data.source.reads == broken
    assert view._cache is data._cache


def test_shifts_leave_the_cache_alone():
    data = examples()
    before = {i: x.clone() for i, x in inputs(data).items()}
    inputs(augmented(data, ALL))
    assert same(before, inputs(data))


def test_it_is_examples():
    data = examples()
    view = augmented(data, ALL)
    assert len(view) == len(data)
    assert view.source.name(3) == "example 3"
    assert np.array_equal(view.targets, data.targets)
    assert np.array_equal(view.strata, data.strata)
    assert view.labelled.all()
    prints = {
        data.fingerprint(),
        *(augmented(data, k, s).fingerprint() for k in (ALL, "noise") for s in (0, 1)),
    }
    assert len(prints) == 5
    assert view.fingerprint() == augmented(examples(), ALL).fingerprint()
    assert view.fingerprint() != augmented(data, ALL, strength=0.5).fingerprint()


def test_what_cannot_be_read_is_skipped_in_both():
    class Broken(Reading):
        def read(self, index):
            if index == 5:
                raise OSError("broken")
            return super().read(index)

    images = np.zeros((9, 8, 8), np.uint8)
    data = Examples(Broken(images, "L"), np.zeros(9), lambda i: np.asarray(i)[None], num_workers=0)
    view = augmented(data, ALL)
    assert 5 not in inputs(view)
    assert view.skipped == data.skipped == {5: "OSError: broken"}


def test_a_model_on_augmented_examples(checkpoint, clean):
    """It sees the clean half as it was, and the others shifted, which costs answers."""
    model = bnpatch.load(checkpoint)
    data = bnpatch.open_examples(clean, model)
    view = augmented(data, ALL)
    plain, shifted = (evaluate(model, e) for e in (data, view))
    is_clean = np.array(kinds_of(view, plain.indices)) == "clean"
    before, after = (scores.values["cross-entropy"] for scores in (plain, shifted))
    np.testing.assert_allclose(after[is_clean], before[is_clean], rtol=1e-3, atol=1e-4)  # rounding
    # Of the others 76% are scored otherwise: what is white can't be brighter.
    assert np.mean(after[~is_clean] != before[~is_clean]) > 0.5
    plain, shifted = (scores.values["accuracy"].mean() for scores in (plain, shifted))
    # Mild: ten seeds of the classifier lost 8 to 14 points of accuracy, and kept 72% to 78%.
    assert 0.5 < shifted < plain - 0.02


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ("", "nothing to augment with; choose from contrast,brightness,noise,blur"),
        ("contrast,fog", "no augmentation 'fog'; choose from contrast"),
        ("blur,blur", "blur,blur names a shift twice"),
    ],
)
def test_bad_kinds(kinds, message):
    with pytest.raises(BnpatchError, match=message):
        augmented(examples(), kinds)


def test_kinds():
    assert parse_kinds(" Contrast, blur,") == ("contrast", "blur")
    assert parse_kinds(["noise"]) == ("noise",)


def test_floats_and_odd_strengths_are_refused(checkpoint):
    model = bnpatch.load(checkpoint)
    floats = bnpatch.open_examples((np.zeros((4, 1, 32, 32), np.float32), np.arange(4)), model)
    with pytest.raises(BnpatchError, match="floats can't be augmented"):
        augmented(floats, ALL)
    for strength in (0.0, 1.6):
        with pytest.raises(BnpatchError, match="out of range"):
            augmented(examples(), ALL, strength=strength)
    mixed = examples()
    mixed.source.read = lambda index: torch.zeros(1, 8, 8) if index else Image.new("L", (8, 8))
    with pytest.raises(BnpatchError, match=r"inputs of torch\.float32 can't be augmented"):
        list(augmented(mixed, ALL).batches(4, np.array([1, 2])))
