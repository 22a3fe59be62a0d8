"""What a slope costs, and a slope with an offset, against a constant alpha at the same norm layers.

    python -m tests.benchmarks.slope_costs [--rounds 30] [--models resnet50,mobilenet_v2] [--batches 1,16]

Models with random weights, 224 x 224 images, every norm layer at alpha = 0.1, one thread. The unpatched
model, the constant alpha, the slope and both take turns in each round, in random order. A turn is a run that
warms the caches and two that count, by the fastest. The time is that of the processor, which other programs
on the machine hardly disturb. A cell has the median of the ratios within a round, and the ratio of the
fastest runs.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

from bnpatch import export_onnx, load
from bnpatch.core.patch import PatchWeights
from bnpatch.models.export import patched_graph
from bnpatch.onnx.runtime import open_session

ALPHA, SLOPE, OFFSET = 0.1, 0.5, 1.0


def settings(model):
    names = list(model.alphas())
    alphas = dict.fromkeys(names, ALPHA)
    zeros, slopes, offsets = (dict.fromkeys(names, value) for value in (0.0, SLOPE, OFFSET))
    return [
        PatchWeights(zeros, slopes=zeros, var_offsets=zeros),
        PatchWeights(alphas, slopes=zeros, var_offsets=zeros),
        PatchWeights(alphas, slopes=slopes, var_offsets=zeros),
        PatchWeights(alphas, slopes=slopes, var_offsets=offsets),
    ]


def torch_turns(model, x):
    """One function per setting; it sets the weights, and returns what to time."""

    def turn(weights):
        model.set_weights(weights)
        return partial(model.predict, x)

    return [partial(turn, weights) for weights in settings(model)]


def onnx_turns(model, x):
    runs = []
    for weights in settings(model):
        model.set_weights(weights)
        session = open_session(patched_graph(model)[0], model.device, 1)
        runs.append(partial(session.run, None, {model.signature.input: x.numpy()}))
    return [partial(lambda run: run, run) for run in runs]


def seconds(turns, rounds, rng):
    """Fastest run of each turn in each round, of shape (rounds, turns)."""
    times = np.empty((rounds, len(turns)))
    for row in times:
        for index in rng.permutation(len(turns)):
            run = turns[index]()
            run()
            runs = []
            for _ in range(2):
                start = time.process_time()
                run()
                runs.append(time.process_time() - start)
            row[index] = min(runs)
    return times


def report(title, turns, rounds, rng):
    times = seconds(turns, rounds, rng)
    fastest = times.min(0)

    def ratio(index, base):
        median = np.median(times[:, index] / times[:, base])
        return f"{median:.3f}x / {fastest[index] / fastest[base]:.3f}x"

    cells = [f"{1000 * fastest[0]:.1f} ms", ratio(1, 0), ratio(2, 0), ratio(2, 1), ratio(3, 1)]
    print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--models", default="resnet50,mobilenet_v2")
    parser.add_argument("--batches", default="1,16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    columns = ["model", "engine", "batch", "unpatched", "alpha", "slope", "slope against alpha"]
    print("| " + " | ".join([*columns, "slope and offset against alpha"]) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models.split(","):
        model = load(getattr(torchvision.models, name)())
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "model.onnx")
            exported = load(Path(folder) / "model.onnx")
        for batch in map(int, args.batches.split(",")):
            x = torch.randn(batch, 3, 224, 224)
            rounds = args.rounds if batch == 1 else max(3, args.rounds // 10)
            with model.evaluating():
                report(f"{name} | torch | {batch}", torch_turns(model, x), rounds, rng)
            report(f"{name} | onnxruntime | {batch}", onnx_turns(exported, x), rounds, rng)


if __name__ == "__main__":
    main()
