"""Patch and tune a pretrained ONNX file: is a line of text upright or upside down?

The file is the text-orientation classifier of the PyPI package rapidocr-onnxruntime:
``python -m tests.benchmarks.text_orientation ch_ppocr_mobile_v2.0_cls_infer.onnx``. The lines of text are
rendered here, with the fonts that Matplotlib brings, and are unlike the classifier's training data. At last
the convolutions of the patched file and of the original are quantized to 8 bits, and judged by further lines.
:mod:`tests.benchmarks.results` leaves that out.
"""

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image, ImageDraw, ImageFont

import bnpatch
from tests.benchmarks.candidates import judged

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


def opened(numbers, fonts):
    """Inputs (N, 3, 48, 192) of the lines with these numbers, and their classes."""
    lines = [line(number, fonts) for number in numbers]
    x = np.stack([pixels for pixels, _ in lines]).transpose(0, 3, 1, 2) / 127.5 - 1
    return x.astype(np.float32), np.array([flipped for _, flipped in lines])


class _Lines(CalibrationDataReader):
    def __init__(self, name, x):
        self.batches = iter([{name: part} for part in np.split(x, len(x) // 50)])

    def get_next(self):
        return next(self.batches, None)


def quantized(path, x):
    """Quantize the convolutions of a file; the ranges are those of the lines x. Returns the new file."""
    prepared, done = (path.with_suffix(f".{kind}.onnx") for kind in ("prepared", "int8"))
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    (name,) = (given.name for given in onnxruntime.InferenceSession(path).get_inputs())
    # The file has opset 11; the other format, QDQ, has scales per channel from opset 13 on.
    options = {"op_types_to_quantize": ["Conv"], "per_channel": True, "weight_type": QuantType.QInt8}
    options["quant_format"] = QuantFormat.QOperator
    quantize_static(prepared, done, _Lines(name, x), **options)
    return done


def outputs(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: part})[0] for part in np.array_split(x, len(x) // 50)])


def compare(files, x, y):
    """Print accuracy and cross-entropy of each file, and how many answers 8 bits leave as they are."""
    print("| file | accuracy | accuracy, 8 bits | cross-entropy | 8 bits | the same answer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, (whole, small) in files.items():
        found = [outputs(path, x) for path in (whole, small)]
        right = [f"{(p.argmax(1) == y).mean():.2%}" for p in found]
        entropy = [f"{-np.log(p[np.arange(len(y)), y].clip(1e-12)).mean():.4f}" for p in found]
        same = f"{(found[0].argmax(1) == found[1].argmax(1)).mean():.1%}"
        print("| " + " | ".join([kind, *right, *entropy, same]) + " |")


def parts():
    yield {"lines": 2000}


def measure(setup, lines):
    """What one alpha gains on held-out lines, and how many norm layers the exported file has patched."""
    model = bnpatch.load(setup.text)
    data = opened(range(lines), found_fonts())
    result = bnpatch.tune_alpha(model, data, metric="cross-entropy", granularity="global")
    model.apply(result.recipe)
    with tempfile.TemporaryDirectory() as folder:
        done = bnpatch.export_onnx(model, Path(folder) / "patched.onnx")
    entropy = next(c for c in result.comparisons if c.metric.name == "cross-entropy").change
    change = [entropy.value, entropy.low, entropy.high]
    about = {"alpha": result.alpha, "entropy_change": change, "norm_layers": len(done.patched)}
    return [{**judged(result), **about}]


def found_fonts():
    return sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lines", type=int, default=2000)
    args = parser.parse_args()
    fonts = found_fonts()
    x, y = opened(range(args.lines), fonts)
    model = bnpatch.load(args.model)
    result = bnpatch.tune_alpha(model, (x, y), metric="cross-entropy", granularity="global")
    print(result)
    for c in result.comparisons:
        change = f"{c.change.value:+.4f} [{c.change.low:+.4f}, {c.change.high:+.4f}]"
        print(f"{c.metric.name}: {c.before.value:.4f} -> {c.after.value:.4f}, change {change}, {c.verdict}")
    with tempfile.TemporaryDirectory() as folder:
        files = {"original": Path(folder) / "original.onnx", "patched": Path(folder) / "patched.onnx"}
        shutil.copy(args.model, files["original"])
        model.apply(result.candidate_recipe or result.recipe)
        done = bnpatch.export_onnx(model, files["patched"])
        print(
            f"{len(done.patched)} norm layers, opset {done.opset}, largest deviation {done.max_deviation:.1e}"
        )
        judged = opened(range(args.lines, 2 * args.lines), fonts)
        compare({kind: (path, quantized(path, x[:200])) for kind, path in files.items()}, *judged)


if __name__ == "__main__":
    main()
