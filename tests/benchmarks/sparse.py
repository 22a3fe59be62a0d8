"""What a patch gains against the latency that it costs: ``--max-overhead`` on a mixture of shifts.

``python -m tests.benchmarks.sparse [--checkpoints DIR]``: Fashion-MNIST, two networks of timm, in torch and
on onnxruntime; tuned on 2,000 images, each shifted in another way or not at all, judged on 4,000 others.
Prints the tables of docs/results.md. Latencies are of one image at a time: nothing else should run meanwhile.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np

import bnpatch
from bnpatch.core.errors import BnpatchWarning
from bnpatch.search.latency_limit import knee
from tests.benchmarks import fashion_mnist
from tests.benchmarks.candidates import HELD_OUT, TUNING, VALUES, shifted, trained

LIMITS = (1.05, 1.15, 1.3)


def rows(name, model, x, y, storage):
    """The trade-off of a model, then what each limit leaves of the patch on held-out images."""
    for limit in LIMITS:
        result = bnpatch.tune_alpha(
            model,
            (x[:TUNING], y[:TUNING]),
            test_data=(x[TUNING:], y[TUNING:]),
            max_overhead=limit,
            storage=storage,  # searched once, measured for each limit
        )
        if limit == LIMITS[0]:
            best = knee(result.trade_off)
            for point in result.trade_off:
                ratio = point.latency
                gain = f"{100 * point.gain:+.1f} ± {196 * point.standard_error:.1f}"
                mark = " (knee)" if point is best else ""
                cells = f"{ratio.ratio:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
                print(f"| {name} | {point.num_norms}{mark} | {gain} | {cells} |", flush=True)
        accuracy = result.comparisons[0]
        kept = sum(alpha > 0 for alpha in result.weights.alphas.values())
        yield (
            f"| {name} | {limit:.2f}x | {kept} of {len(result.norm_layers)} | "
            f"{100 * accuracy.before.value:.1f} → {100 * accuracy.after.value:.1f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--checkpoints", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", BnpatchWarning)
    images, labels = (part[: TUNING + HELD_OUT] for part in fashion_mnist.read(args.data, "t10k"))
    x = shifted("mixed", images, np.random.default_rng(0))
    limits = []
    print("| model | patched norm layers | gain in accuracy (points) | time |")
    print("| --- | --- | --- | --- |")
    for name in ("test_resnet", "test_efficientnet"):
        model = bnpatch.load(trained(name, args.data, args.checkpoints), preprocessing=VALUES)
        with tempfile.TemporaryDirectory() as folder:
            bnpatch.export_onnx(model, path := Path(folder) / "model.onnx")
            exported = bnpatch.load(path, preprocessing=VALUES)
            limits += rows(f"{name}, torch", model, x, labels, f"sqlite:///{folder}/torch.db")
            limits += rows(f"{name}, onnxruntime", exported, x, labels, f"sqlite:///{folder}/onnx.db")
    print("\n| model | limit | patched norm layers | top-1 |\n| --- | --- | --- | --- |")
    print("\n".join(limits))


if __name__ == "__main__":
    main()
