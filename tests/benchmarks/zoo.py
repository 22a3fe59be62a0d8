"""Every family of timm and torchvision that has Batch Norm or Group Norm: what is converted, and is it right?

The smallest member of each family, with random weights, on small inputs: are the norm layers those that a
count of
classes expects, is alpha = 0 the identity bit for bit, does alpha = 0.1 give something finite and different,
and, for every third family, does the exported ONNX file compute the same? Writes docs/zoo.md.

``python -m tests.benchmarks.zoo [--output docs/zoo.md] [--only resnet]``.
"""

import argparse
import collections
import contextlib
import re
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnpatch
from bnpatch.core.moments import Moments, pool
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.functional import example_moments
from bnpatch.nn.hooks import at_inputs
from bnpatch.nn.surgery import calibrated, uncalibrated
from tests.nn.norms import images, settle

MAX_PARAMETERS = 150e6
MAX_EXPORTED_PARAMETERS = 30e6
MAX_SECONDS = 120  # of one core's time

INTRODUCTION = """\
# The zoo

Written by `python -m tests.benchmarks.zoo` with {versions}: the
smallest member of every family (library, module, stem of the name, classes of norm) that has Batch Norm or
Group Norm, random weights, small inputs. Of each: the norm layers are those that an independent count of
classes expects (Group Norm with running statistics from the input at hand), the identity, alpha = 0 or for
Group Norm 1, is exact bit for bit, and an alpha that is 0.1 away from it is finite and different. Every third
of them, if it is a classifier of less than {millions:.0f} million parameters, was exported to ONNX at that
alpha and compared on onnxruntime.
"""


@dataclass(frozen=True)
class Family:
    """Architectures of one library, module, name stem and set of norm classes."""

    library: str
    module: str
    stem: str
    norms: tuple[str, ...]

    def __str__(self):
        return f"{self.library} {self.module}: {self.stem}"


@dataclass
class Result:
    family: Family
    name: str
    size: int
    expected: list[str] = field(default_factory=list)
    norm_layers: int = 0
    skipped_norms: collections.Counter = field(default_factory=collections.Counter)
    deviation: float | None = None
    problem: str = ""


def is_group_norm(module):
    return isinstance(module, nn.GroupNorm)


def is_batch_norm(module):
    """By the base class of all of them and by name, not by bnpatch's own table."""
    return isinstance(module, _BatchNorm) or type(module).__name__.startswith("FrozenBatchNorm")


def expected_sites(model):
    """Names of the norms that the table of norm layers says are converted."""

    def is_site(module):
        if is_batch_norm(module):
            return module.running_mean is not None
        return is_group_norm(module)

    return [name for name, module in model.named_modules() if is_site(module)]


def create(library, name):
    if library == "timm":
        return timm.create_model(name)
    settings = {"weights": None}
    if "detection" in (module := torchvision.models.get_model_builder(name).__module__):
        settings["weights_backbone"] = None
    if "segmentation" in module:
        settings.update(weights_backbone=None, num_classes=5)
    if name.endswith(("googlenet", "inception_v3")):
        settings["init_weights"] = False  # minutes of truncated normal numbers
    return torchvision.models.get_model(name, **settings)


def create_without_values(library, name):
    try:
        with torch.device("meta"):
            return create(library, name)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        return create(library, name)


def norm_classes(model):
    return tuple(sorted({type(m).__name__ for m in model.modules() if is_batch_norm(m) or is_group_norm(m)}))


def module_of(model):
    return type(model).__module__.removeprefix("timm.models.").removeprefix("torchvision.models.")


def families(only=""):
    """The smallest member of each family with a norm of running statistics or of groups, and its size."""
    found = collections.defaultdict(list)
    names = [("timm", n) for n in timm.list_models()]
    names += [("torchvision", n) for n in torchvision.models.list_models()]
    for library, name in names:
        if only not in name:
            continue
        model = create_without_values(library, name)
        if norms := norm_classes(model):
            family = Family(library, module_of(model), re.match(r"[a-z]+", name)[0], norms)
            found[family].append((sum(p.numel() for p in model.parameters()), name))
    return {family: min(found[family]) for family in sorted(found, key=str)}


def input_shapes(family, model):
    """Shapes (C, *spatial) to try, smallest first: many architectures refuse small images."""
    if family.library == "timm":
        own = model.pretrained_cfg["input_size"]
        fixed = model.pretrained_cfg.get("fixed_input_size")
        return [own] if fixed else [(3, side, side) for side in (64, 128)] + [own]
    if "video" in family.module:
        return [(3, 8, 64, 64), (3, 16, 224, 224)]
    return [(3, side, side) for side in (64, 128, 224)]


def entry(family, model):
    """What of a model takes a batch of images and returns tensors."""
    if "detection" in family.module:
        return model.backbone  # random heads detect nothing that could differ
    if "optical_flow" in family.module:
        return lambda x: model(x, x.flip(-1), num_flow_updates=1)
    return model


def tensors(y):
    """All tensors in what a model returns, flattened and joined."""
    if isinstance(y, Tensor):
        return y.flatten()
    return torch.cat([tensors(part) for part in (y.values() if isinstance(y, dict) else y)])


def first_input(family, model, shapes):
    """The first input that the model takes, and the output."""
    for shape in shapes[:-1]:
        x = images(2, *shape)
        with contextlib.suppress(RuntimeError, ValueError, AssertionError, IndexError):
            return x, tensors(entry(family, model)(x))
    x = images(2, *shapes[-1])
    return x, tensors(entry(family, model)(x))


def calibrated_on(family, model, x):
    """Give Group Norm running statistics, those of one input; names of the layers that it reaches."""
    inputs = {}
    with at_inputs(uncalibrated(model), inputs.setdefault):
        entry(family, model)(x)
    pooled = {name: pool(example_moments(value), axes=0) for name, value in inputs.items()}
    calibrated(model, {name: Moments(m.mean[0], m.var[0]) for name, m in pooled.items()})
    return set(pooled)


def moved(model, distance):
    """Alphas at a distance from the identity."""
    return {
        norm_layer.name: abs(norm_layer.baseline_alpha - distance)
        for norm_layer in bnpatch.inventory(model).norm_layers
    }


@torch.inference_mode()
def check_conversion(family, model, result):
    x, before = first_input(family, model, input_shapes(family, model))
    reached = calibrated_on(family, model, x)
    found = bnpatch.inventory(model)
    result.norm_layers = len(found.norm_layers)
    result.skipped_norms = collections.Counter((left.kind, left.reason) for left in found.skipped_norms)
    modules = dict(model.named_modules())
    surveyed = {norm_layer.name for norm_layer in found.norm_layers}
    expected = {n for n in result.expected if n in reached or not is_group_norm(modules[n])}
    if surveyed != expected:
        result.problem = f"norm layers differ: {', '.join(sorted(surveyed ^ expected)[:3])}"
    if not found.norm_layers:
        return
    bnpatch.patch(model, moved(model, 0.0))
    if not torch.equal(tensors(entry(family, model)(x)), before):
        result.problem = "not the identity where it should be"
    bnpatch.patch(model, moved(model, 0.1))
    after = tensors(entry(family, model)(x))
    if not torch.isfinite(after).all():
        result.problem = "not finite away from the identity"
    elif torch.equal(after, before):
        result.problem = "no different away from the identity"


def check_export(family, model, result):
    with torch.inference_mode():
        x, _ = first_input(family, model, input_shapes(family, model))
        calibrated_on(family, model, x)
    bnpatch.patch(model, moved(model, 0.1))
    half = Preprocessing(tuple(x.shape[1:]), (0.5,), (0.5,))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = bnpatch.export_onnx(
                TorchModel(model, name="m", preprocessing=half), Path(folder) / "m.onnx", x
            )
            result.deviation = done.max_deviation
        except bnpatch.BnpatchError as error:
            result.problem = str(error)


@contextlib.contextmanager
def time_limit(seconds):
    """Of the processor, so that a busy machine changes no result."""

    def stop(*_):
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def attempt(check, result):
    """Run a check of a new model; whatever that raises is a problem of this model alone."""
    try:
        with time_limit(MAX_SECONDS):
            model = settle(create(result.family.library, result.name))
            result.expected = expected_sites(model)
            check(result.family, model, result)
    except Exception as error:
        result.problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def sweep(only):
    """Check every conversion. Yields all results so far, time and again; the last one is new."""
    results = []
    for family, (size, name) in families(only).items():
        results.append(result := Result(family, name, size))
        if size > MAX_PARAMETERS:
            result.problem = f"{size / 1e6:.0f} million parameters, too large for this sweep"
        else:
            attempt(check_conversion, result)
        yield results


def exports(results):
    """Check an export of every third. Yields each new result."""
    for result in results[::3]:
        is_classifier = not re.search("detection|segmentation|optical_flow|video", result.family.module)
        if (
            result.norm_layers
            and not result.problem
            and is_classifier
            and result.size < MAX_EXPORTED_PARAMETERS
        ):
            attempt(check_export, result)
            yield result


def row(result):
    left = "; ".join(f"{count} {kind} ({reason})" for (kind, reason), count in result.skipped_norms.items())
    deviation = "" if result.deviation is None else f"{result.deviation:.1g}"
    problem = result.problem.replace("|", "/")
    return f"| {result.family} | {result.name} | {result.norm_layers} | {left} | {deviation} | {problem} |"


def page(results):
    """The results as Markdown, totals on top."""
    exported = [r.deviation for r in results if r.deviation is not None]
    skipped_norms = sum(sum(r.skipped_norms.values()) for r in results)
    worst = f"; largest deviation {max(exported):.1g} of the largest output" if exported else ""
    versions = f"timm {timm.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}"
    lines = [
        INTRODUCTION.format(versions=versions, millions=MAX_EXPORTED_PARAMETERS / 1e6),
        f"- {len(results)} families, {sum(not r.problem for r in results)} without a problem",
        f"- {sum(r.norm_layers for r in results)} norm layers in "
        f"{sum(r.norm_layers > 0 for r in results)} architectures",
        f"- {skipped_norms} norms skipped, each with a reason",
        f"- {len(exported)} exported to ONNX{worst}",
        "",
        "| family | architecture | norm layers | skipped, and why | ONNX deviation | problem |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += map(row, results)
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--only", default="", help="architectures with this in their name")
    args = parser.parse_args()
    results = []
    for results in sweep(args.only):
        print(row(results[-1]), flush=True)
        args.output.write_text(page(results))  # an interrupted sweep leaves what it has
    for result in exports(results):
        print(row(result), flush=True)
        args.output.write_text(page(results))


if __name__ == "__main__":
    main()
