"""What example weighing costs in torch: whole models, patched at every norm layer, against plain evaluation.

Plain and patched runs alternate within one process, so that a drift of the machine hits both; the
numbers are ratios of medians. ``python -m tests.benchmarks.layer_latency [--threads 2]``.
"""

import argparse
import copy
import statistics
import time

import torch
import torchvision

import bnpatch

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "efficientnet_b0")


def textbook(self, x):
    """Eq. 3 written down as it stands, for comparison."""
    shape = (1, -1, 1, 1)
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    running_mean, running_var = self.running_mean.view(shape), self.running_var.view(shape)
    alpha = self.alpha
    mixed_mean = alpha * mean + (1 - alpha) * running_mean
    square = alpha * (var + mean**2) + (1 - alpha) * (running_var + running_mean**2)
    y = (x - mixed_mean) / torch.sqrt(square - mixed_mean**2 + self.eps)
    return y * self.weight.view(shape) + self.bias.view(shape)


def median_ratios(models, x, runs):
    times = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(x)
        for _ in range(runs):
            for name, model in models.items():
                started = time.perf_counter()
                model(x)
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians["plain"], {name: value / medians["plain"] for name, value in medians.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | batch | layout | plain | patched | textbook formula |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in MODELS:
        for batch, layout in (
            (1, torch.contiguous_format),
            (16, torch.contiguous_format),
            (16, torch.channels_last),
        ):
            plain = torchvision.models.get_model(name).eval().to(memory_format=layout)
            patched = bnpatch.patch(copy.deepcopy(plain), 0.05)
            naive = bnpatch.patch(copy.deepcopy(plain), 0.05)
            for norm_layer in bnpatch.inventory(naive).norm_layers:
                norm_layer.module.forward = textbook.__get__(norm_layer.module)
            x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
            seconds, ratios = median_ratios(
                {"plain": plain, "patched": patched, "textbook": naive}, x, args.runs
            )
            kind = "channels last" if layout is torch.channels_last else "contiguous"
            cells = [name, str(batch), kind, f"{1000 * seconds:.0f} ms"]
            print(
                "| " + " | ".join([*cells, *(f"{ratios[k]:.2f}x" for k in ("patched", "textbook"))]) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
