"""Patch and tune a pretrained ONNX file: is a line of text upright or upside down?

The file is the text-orientation classifier of the PyPI package rapidocr-onnxruntime:
``python -m tests.benchmarks.text_orientation ch_ppocr_mobile_v2.0_cls_infer.onnx``. The lines of text are
rendered here, with the fonts that Matplotlib brings, and are unlike the classifier's training data.
"""

import argparse
import random
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import bnpatch

WORDS = """
    normalization example running weight moment gain loss field sensor batch image model train shift fog
""".split()
SIZE = 192, 48


def line(index, fonts):
    """Bytes (48, 192, 3) of a noisy line of text, and 1 where it is upside down."""
    rng = random.Random(index)
    image = Image.new("RGB", SIZE, tuple(rng.randint(150, 255) for _ in range(3)))
    font = ImageFont.truetype(str(rng.choice(fonts)), rng.randint(18, 34))
    ink = tuple(rng.randint(0, 110) for _ in range(3))
    ImageDraw.Draw(image).text((4, rng.randint(0, 10)), " ".join(rng.sample(WORDS, 3)), font=font, fill=ink)
    flipped = rng.randint(0, 1)
    pixels = np.asarray(image.rotate(180) if flipped else image).astype(float)
    noise = np.random.default_rng(index).normal(0, rng.choice([5, 25, 45]), pixels.shape)
    return (pixels + noise).clip(0, 255), flipped


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lines", type=int, default=2000)
    args = parser.parse_args()
    fonts = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"))
    lines = [line(index, fonts) for index in range(args.lines)]
    x = np.stack([pixels for pixels, _ in lines]).transpose(0, 3, 1, 2) / 127.5 - 1
    model = bnpatch.load(args.model)
    result = bnpatch.tune_alpha(
        model, (x.astype(np.float32), [y for _, y in lines]), metric="cross-entropy", granularity="global"
    )
    print(result)
    for c in result.comparisons:
        change = f"{c.change.value:+.4f} [{c.change.low:+.4f}, {c.change.high:+.4f}]"
        print(f"{c.metric.name}: {c.before.value:.4f} -> {c.after.value:.4f}, change {change}, {c.verdict}")
    model.apply(result.recipe)
    with tempfile.TemporaryDirectory() as folder:
        done = bnpatch.export_onnx(model, Path(folder) / "patched.onnx")
    print(f"{len(done.patched)} norm layers, opset {done.opset}, largest deviation {done.max_deviation:.1e}")


if __name__ == "__main__":
    main()
