"""What patching a part of the norm layers costs, and how well ``norm_costs`` predicts it.

``python -m tests.benchmarks.norm_costs [--seconds 20]``: models with random weights, batch 1, one thread.
The ratios are of processor time, which other programs on the machine hardly disturb.

For each model and engine: patches of all norm layers, of the last and of the first quarter, and of sets at
random, half of them of neighbours. The prediction of a set's overhead is that of the full patch times
the sum of its sites' shares. Besides, the fixed cost of a norm layer that would fit these sets best.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torchvision

from bnpatch import export_onnx, load
from bnpatch.models.latency import measure, norm_costs

MODELS = {
    "test_resnet": lambda: timm.create_model("test_resnet"),
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "resnet50": torchvision.models.resnet50,
}


def sets_of(names):
    """All, the last quarter, the first quarter, and eight at random."""
    n, rng = len(names), np.random.default_rng(0)
    sets = [names, names[-(n // 4) :], names[: n // 4]]
    for _ in range(4):
        sets.append(list(rng.choice(names, rng.integers(n // 8 + 1, n), replace=False)))
        size = rng.integers(n // 8 + 1, 2 * n // 3)
        start = rng.integers(0, n - size)
        sets.append(names[start : start + size])
    return sets


def report(title, model, elements, seconds):
    sets = sets_of(list(elements))
    settings = [dict.fromkeys(names, 0.01) for names in sets]
    latencies = measure(model, settings, seconds=seconds, threads=1, clock=time.process_time)
    overhead = np.array([latency.ratio - 1 for latency in latencies])
    costs = norm_costs(model)
    predicted = overhead[0] * np.array([sum(costs[name] for name in names) for names in sets])
    # Sets but the first, from which the prediction is scaled.
    left = ((overhead - predicted)[1:] ** 2).sum() / ((overhead[1:] - overhead[1:].mean()) ** 2).sum()
    read = np.array([[sum(elements[name] for name in names), len(names)] for names in sets], float)
    per_element, per_site = np.linalg.lstsq(read, overhead, rcond=None)[0]
    original = 1000 * latencies[0].seconds / latencies[0].ratio
    cells = [f"{x.ratio:.2f}x [{x.low:.2f}, {x.high:.2f}]" for x in latencies[:3]]
    cells += [f"{1 - left:.2f}", f"{per_site / per_element / 1000:.0f}k"]
    print(f"| {title} | {original:.1f} ms | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--models", default=",".join(MODELS))
    args = parser.parse_args()
    print("| model | original | all norm layers | last quarter | first quarter | R2 | best fixed cost |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models.split(","):
        model = load(MODELS[name]())
        shapes = model.norm_shapes()
        elements = {s.name: s.num_channels * math.prod(shapes[s.name]) for s in model.inventory().norm_layers}
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "model.onnx")
            report(f"{name}, torch", model, elements, args.seconds)
            report(f"{name}, onnxruntime", load(Path(folder) / "model.onnx"), elements, args.seconds)


if __name__ == "__main__":
    main()
