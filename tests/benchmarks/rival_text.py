"""Rivals on the text recognizer of the package rapidocr-onnxruntime, an ONNX file, by its own metric.

    python -m tests.benchmarks.rival_text ch_PP-OCRv4_rec_infer.onnx --out text.jsonl
    python -m tests.benchmarks.rival_text --table text.jsonl

A line counts as right if it is read exactly. The lines are rendered here, with the fonts that Matplotlib
brings, and are unlike the recognizer's training data. Most of its Batch Norm is fused into convolutions, from
which lines without corruption recover it. The rivals need torch, and run on the copy that bnpatch makes to
have gradients; averages of answers and mirrored views make no sense for lines of text, and are left out.
"""

import argparse
import json
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.core.patch import PatchWeights
from bnpatch.data.standard_corruptions import corrupt
from bnpatch.models.base import Model
from bnpatch.models.running_stats import re_estimate_statistics
from tests.benchmarks import rival_methods as methods
from tests.benchmarks import rival_tables
from tests.benchmarks.rival_data import CLEAN, MIXTURE
from tests.benchmarks.text_orientation import WORDS

SIZE, SEVERITY, CALIBRATION = (192, 48), 2, 64
KINDS = ("gaussian_noise", "fog", "contrast", "jpeg_compression")
VALUES = {"img_size": (48, 192), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}


def line(index: int, fonts: Sequence[Path]) -> tuple[np.ndarray, str]:
    """Return bytes (48, 192, 3) of a line of text, and the text."""
    rng = random.Random(index)
    text = f"{rng.choice(WORDS)} {rng.randint(10, 999)}"
    image = Image.new("RGB", SIZE, tuple(rng.randint(170, 255) for _ in range(3)))
    ink = tuple(rng.randint(0, 90) for _ in range(3))
    font = ImageFont.truetype(str(rng.choice(fonts)), rng.randint(18, 22))
    ImageDraw.Draw(image).text((6, rng.randint(8, 16)), text, font=font, fill=ink)
    return np.asarray(image), text


def exactly(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where a line is read exactly: outputs (N, T, K), targets (N, L) of characters, then zeros."""
    right = []
    for best, target in zip(outputs.argmax(2).tolist(), targets.tolist(), strict=True):
        read = [c for before, c in zip([0, *best], best, strict=False) if c and c != before]
        right.append(read == [c for c in target if c])
    return torch.tensor(right, dtype=torch.float32)


def lines(count: int, characters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 48, 192, 3) and their characters (N, 24); 0 is none."""
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf"))
    found = [line(index, [f for f in fonts if "Display" not in f.name]) for index in range(count)]
    targets = np.zeros((count, 24), np.int64)
    for row, (_, text) in zip(targets, found, strict=True):
        row[: len(text)] = [1 + characters.index(c) for c in text]
    return np.stack([image for image, _ in found]), targets


def corrupted(images: np.ndarray, condition: str) -> np.ndarray:
    """Return the images of a condition; the mixture has one of the kinds, or none, at random."""
    draws = np.random.default_rng(0).integers(0, 1 + len(KINDS), len(images))
    kinds = [(CLEAN, *KINDS)[n] if condition == MIXTURE else condition for n in draws]
    return np.stack(
        [
            x if kind == CLEAN else corrupt(x.transpose(2, 0, 1), kind, SEVERITY, (0, n)).transpose(1, 2, 0)
            for n, (x, kind) in enumerate(zip(images, kinds, strict=True))
        ]
    )


def rate(model: Model, x: Tensor, y: Tensor) -> float:
    """Return which part of the lines a model reads exactly in its present state."""
    with torch.inference_mode(), model.evaluating():
        parts = zip(x.split(8), y.split(8), strict=True)
        return float(torch.cat([exactly(model.predict(a), b) for a, b in parts]).mean())


def scores(path: Path, condition: str, images: np.ndarray, targets: np.ndarray, count: int) -> dict[str, Any]:
    """Return the rate of each method on the lines after the first ``count``, which tune."""
    model = bnpatch.load(path, preprocessing=VALUES, device="cpu")
    bnpatch.recover_fused(model, images[:CALIBRATION], limit=CALIBRATION)
    baseline, found = model.state, {}
    seen = corrupted(images, condition)
    x, y = (torch.from_numpy(part[count:].copy()) for part in (seen.transpose(0, 3, 1, 2), targets))
    found["source"] = rate(model, x, y)
    copy = model.with_gradients(x[:2])
    assert copy is not None
    for name, rule in (
        ("alpha-BN, 0.1", methods.alpha_bn(0.1)),
        ("soft shrinkage, 4", methods.soft_shrinkage(4.0)),
    ):
        with methods.normalizing(copy, rule):
            found[name] = rate(copy, x, y)
    states = []
    result = bnpatch.tune_alpha(
        model,
        (seen[:count], targets[:count]),
        test_data=(seen[count:], targets[count:]),
        metric=bnpatch.Metric("exact line", exactly, is_rate=True),
        on_trial=lambda trial, is_best: states.append(trial.state),
    )
    for candidate in result.candidates:
        with model.in_state(states[-1].with_weights(candidate.weights)):
            found[candidate.name] = rate(model, x, y)
    found["chosen"] = found[result.chosen.name]
    statistics = re_estimate_statistics(
        model, bnpatch.open_examples((seen[:count], targets[:count]), model, classes=False)
    )
    with model.in_state(
        baseline.with_re_estimated(statistics).with_weights(
            PatchWeights(lambdas=dict.fromkeys(statistics, 1.0))
        )
    ):
        found["AdaBN"] = rate(model, x, y)
    about = {"is chosen": result.chosen.name, "is recommended": result.is_recommended}
    return {**found, **about, "passes": result.passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, help="print the table of these results")
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--conditions", nargs="+", default=(CLEAN, MIXTURE, *KINDS))
    parser.add_argument("--out", type=Path, default=Path("text.jsonl"))
    args = parser.parse_args()
    if args.table:
        print(rival_tables.of_lines(args.table))
        return
    warnings.simplefilter("ignore", BnpatchWarning)
    import onnx

    metadata = {p.key: p.value for p in onnx.load(args.model).metadata_props}
    characters = [*metadata["character"].splitlines(), " "]
    images, targets = lines(args.tuning + args.held_out, characters)
    for condition in args.conditions:
        started = time.monotonic()
        found = scores(args.model, condition, images, targets, args.tuning)
        counts = {"tuning": args.tuning, "held_out": args.held_out}
        seconds = round(time.monotonic() - started)
        record = {"condition": condition, **counts, **found, "seconds": seconds}
        print(record, flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
