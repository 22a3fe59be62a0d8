"""What a fully patched model costs on onnxruntime's CPU provider, by arrangement of the operators.

    python -m tests.benchmarks.onnx_forms [--rounds 30] [--threads 2] [--models resnet50,...]

Every candidate replaces all norm layers of the same exported model. The sessions of one model run in turns,
original first, and a candidate's number is the median over the rounds of its time divided by the
original's in the same round: a machine that slows down for a while slows both. The second number is
the ratio of the fastest runs, which a busy machine disturbs least. docs/onnx-latency.md has the table.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxscript.optimizer
import torch

from bnpatch.core.moments import Moments, mix
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.expressions import Tape, Value
from bnpatch.onnx.formulas import append_norm
from bnpatch.onnx.io import save
from bnpatch.onnx.match import OnnxNormLayer, inventory
from bnpatch.onnx.rewrite import Append, rewrite
from bnpatch.onnx.statistics import example_moments

ALPHA = 0.1
MODELS = {"test_resnet": 160, "mobilenet_v2": 224, "resnet50": 224}


def textbook(tape: Tape, norm_layer: OnnxNormLayer, running, example_weight) -> ir.Value:
    """Variance in two passes, then subtract, divide, multiply, add, each over the whole tensor."""
    x = Value(tape, norm_layer.input, norm_layer.dtype)
    weight, bias, mean, var = columns(
        norm_layer, norm_layer.weight, norm_layer.bias, running.mean, running.var
    )
    center = x.mean((2, 3))
    example = Moments(center, ((x - center) * (x - center)).mean((2, 3)))
    moments = mix(example_weight.alpha, example, Moments(mean, var))
    return ((x - moments.mean) * (1.0 / (moments.var + norm_layer.eps).sqrt()) * weight + bias).value


def sum_square(u: Value, norm_layer: OnnxNormLayer) -> Moments:
    total = tape_op(u, "ReduceSumSquare", keepdims=1)
    mean = u.mean((2, 3))
    return Moments(
        mean, (total * (1 / (norm_layer.dims[2] * norm_layer.dims[3])) - mean * mean).clamp_min_0()
    )


def reduce_mean(u: Value, norm_layer: OnnxNormLayer) -> Moments:
    """Outside the blocked layout."""
    mean = u.mean((2, 3))
    return Moments(mean, ((u * u).mean((2, 3)) - mean * mean).clamp_min_0())


def blocked_moments(u: Value, norm_layer: OnnxNormLayer) -> Moments:
    return example_moments(u, rank=4, blocked=True)


def mul_add(u: Value, scale: Value, shift: Value, norm_layer: OnnxNormLayer) -> Value:
    return u * scale + shift


def batch_norm_view(u: Value, scale: Value, shift: Value, norm_layer: OnnxNormLayer) -> Value:
    """One BatchNormalization on a (1, N * C, H, W) view; eps = 1 and mean = var = 0 leave the affine map."""
    flat_scale, flat_shift = scale.reshape((-1,)), shift.reshape((-1,))
    zero = (flat_scale * 0).value
    operands = (u.reshape((1, -1, 0, 0)).value, flat_scale.value, flat_shift.value, zero, zero)
    y = Value(u.tape, u.tape.op("BatchNormalization", *operands, epsilon=1.0), u.dtype)
    return y.reshape((-1, norm_layer.num_channels, 0, 0))


def resized_planes(u: Value, scale: Value, shift: Value, norm_layer: OnnxNormLayer) -> Value:
    """Same-shape Mul and Add, which stay in the blocked layout, with planes made by Resize."""
    sizes = u.tape.constant(np.array([1, 1, *norm_layer.dims[2:]]), ir.DataType.FLOAT)
    mode = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    a, b = (Value(u.tape, u.tape.op("Resize", v.value, None, sizes, **mode), u.dtype) for v in (scale, shift))
    return u * a + b


def on_normalized(statistics_of: Callable, apply: Callable) -> Append:
    """The normalized form, with other operators for the statistics or for the affine map."""

    def append(tape: Tape, norm_layer: OnnxNormLayer, running, example_weight) -> ir.Value:
        u = normalized(tape, norm_layer)
        total = running.var + norm_layer.eps
        weight, bias, var, eps = columns(
            norm_layer, norm_layer.weight, norm_layer.bias, running.var / total, norm_layer.eps / total
        )
        moments = mix(example_weight.alpha, statistics_of(u, norm_layer), Moments(0.0, var))
        scale = weight / (moments.var + eps).sqrt()
        return apply(u, scale, bias - moments.mean * scale, norm_layer).value

    return append


def normalized(tape: Tape, norm_layer: OnnxNormLayer) -> Value:
    scales, zeros = (tape.constant(np.full(norm_layer.num_channels, v), norm_layer.dtype) for v in (1.0, 0.0))
    mean, var = norm_layer.node.inputs[3:5]
    return Value(
        tape,
        tape.op("BatchNormalization", norm_layer.input, scales, zeros, mean, var, epsilon=norm_layer.eps),
        norm_layer.dtype,
    )


def tape_op(u: Value, op_type: str, **attributes) -> Value:
    axes = u.tape.constant(np.array((2, 3)), ir.DataType.INT64)
    return Value(u.tape, u.tape.op(op_type, u.value, axes, **attributes), u.dtype)


def columns(norm_layer: OnnxNormLayer, *vectors):
    return [np.broadcast_to(v, norm_layer.num_channels).reshape(-1, 1, 1) for v in vectors]


CANDIDATES: dict[str, Append] = {
    "textbook": textbook,
    "direct": partial(append_norm, form="direct"),
    "normalized": partial(append_norm, form="normalized"),
    "fused": partial(append_norm, form="fused"),
    "ReduceSumSquare": on_normalized(sum_square, mul_add),
    "ReduceMean": on_normalized(reduce_mean, mul_add),
    "BatchNorm view": on_normalized(blocked_moments, batch_norm_view),
    "blocked planes": on_normalized(blocked_moments, resized_planes),
}


def export(name: str, size: int) -> ir.Model:
    """The model with its BatchNormalization kept, random moments, and no leftovers of the exporter."""
    import timm
    import torchvision

    torch.manual_seed(0)
    model = timm.create_model(name) if name.startswith("test_") else getattr(torchvision.models, name)()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    example = (torch.zeros(2, 3, size, size),)
    shapes = ({0: "batch"},)
    program = torch.onnx.export(
        model.eval(), example, dynamo=True, optimize=False, dynamic_shapes=shapes, verbose=False
    )
    onnxscript.optimizer.fold_constants(program.model)
    onnxscript.optimizer.remove_unused_nodes(program.model)
    return program.model


def session(model: ir.Model, folder: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    file = save(model, folder / "model.onnx")
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def seconds(run: ort.InferenceSession, x: np.ndarray) -> float:
    start = time.perf_counter()
    run.run(None, {run.get_inputs()[0].name: x})
    return time.perf_counter() - start


def measure(name: str, rounds: int, threads: int) -> None:
    size = MODELS[name]
    original = export(name, size)
    with tempfile.TemporaryDirectory() as folder:
        names, sessions = ["original"], [session(original, Path(folder), threads)]
        all_sites = [norm_layer.name for norm_layer in inventory(original).norm_layers]
        choices = [(label, append, all_sites) for label, append in CANDIDATES.items()]
        choices.append(("last quarter", append_norm, all_sites[-len(all_sites) // 4 :]))
        for label, append, norm_layers in choices:
            model = original.clone()
            rewrite(model, PatchWeights(dict.fromkeys(norm_layers, ALPHA)), append=append)
            names.append(label)
            sessions.append(session(model, Path(folder), threads))
    for batch in (1, 8):
        x = np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)
        for run in sessions:
            seconds(run, x)  # warm-up
        times = [[seconds(run, x) for run in sessions] for _ in range(rounds if batch == 1 else rounds // 2)]
        by_session = list(zip(*times, strict=True))
        ratios = [
            statistics.median(t / o for t, o in zip(c, by_session[0], strict=True)) for c in by_session[1:]
        ]
        fastest = [min(c) / min(by_session[0]) for c in by_session[1:]]
        base = f"{statistics.median(by_session[0]) * 1e3:.1f} / {min(by_session[0]) * 1e3:.1f} ms"
        cells = (f"{r:.2f} / {f:.2f}" for r, f in zip(ratios, fastest, strict=True))
        print(f"| {name} | {batch} | {base} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    labels = ["model", "batch", "original", *CANDIDATES, "last quarter"]
    print("| " + " | ".join(labels) + " |\n" + "|---" * len(labels) + "|")
    for name in arguments.models.split(","):
        measure(name, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
