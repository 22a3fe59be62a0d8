"""What the members of the family cost in training: time and memory of a step, forward and backward.

All layers alternate within one process, in another order each time: a drift of the machine hits all, and
so does the memory that a predecessor leaves behind, which is worth 3% on small maps. Times are of the
processor, which other programs disturb less than those of the clock; ratios are medians over rounds.
``python -m tests.benchmarks.training_cost [--threads 1] [--rounds 15]``.
"""

import argparse
import random
import statistics
import time

import torch
import torchvision
from torch import nn

from bnpatch.core.norm_spec import NormSpec
from bnpatch.nn.training_norm import convert_norms

SHAPES = ((32, 64, 56, 56), (32, 128, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7), (128, 32, 32, 32))
CHANNELS_PER_GROUP = 16


SPECS = {
    "Ghost 16": NormSpec.ghost(16),
    "Ghost 4": NormSpec.ghost(4),
    "Batch/Group 2": NormSpec.batch_group(CHANNELS_PER_GROUP, 2),
    "Batch/Group": NormSpec.batch_group(CHANNELS_PER_GROUP),
    "Renorm": NormSpec.batch_renorm(),
}


def group_norm(num_channels):
    return nn.GroupNorm(num_channels // CHANNELS_PER_GROUP, num_channels)


def layers(num_channels):
    converted = {name: convert_norms(nn.BatchNorm2d(num_channels), spec) for name, spec in SPECS.items()}
    named = {"Batch": nn.BatchNorm2d(num_channels), "Group": group_norm(num_channels), **converted}
    return {name: layer.train() for name, layer in named.items()}


def models():
    converted = {name: convert_norms(torchvision.models.resnet18(), spec) for name, spec in SPECS.items()}
    named = {
        "Batch": torchvision.models.resnet18(),
        "Group": torchvision.models.resnet18(norm_layer=group_norm),
    }
    return {name: model.train() for name, model in {**named, **converted}.items()}


def step(layer, x, dy):
    x = x.detach().requires_grad_()
    layer(x).backward(dy)


def saved_bytes(layer, x):
    """Bytes that the backward pass needs, each storage once, without the input and the parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in known)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| what | norm | step | of Batch Norm | of Group Norm | kept for backward, of the input |")
    print("| --- | --- | --- | --- | --- | --- |")
    for shape in SHAPES:
        compare(" x ".join(map(str, shape)), layers(shape[1]), torch.randn(shape), args.rounds)
    compare("resnet18, 32 of 64 x 64", models(), torch.randn(32, 3, 64, 64), max(5, args.rounds // 3))


def compare(what, named, x, rounds):
    times = {name: [] for name in named}
    dy = torch.randn_like(next(iter(named.values()))(x))
    rng = random.Random(0)
    for round_ in range(rounds + 2):
        for name in rng.sample(list(named), len(named)):
            started = time.process_time()
            step(named[name], x, dy)
            if round_ >= 2:
                times[name].append(time.process_time() - started)
    for name, layer in named.items():
        of = (
            statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for other in ("Batch", "Group")
        )
        kept = saved_bytes(layer, x) / (x.numel() * x.element_size())
        cells = [
            what,
            name,
            f"{1000 * statistics.median(times[name]):.1f} ms",
            *(f"{ratio:.2f}x" for ratio in of),
            f"{kept:.3f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
