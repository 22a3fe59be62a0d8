"""``bnpatch inspect``."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnpatch.core.errors import BnpatchError
from bnpatch.core.text import counted

from . import options as opt
from .advice import Advice, advise, print_advice
from .checkup import examine, print_report
from .console import put, say, some

if TYPE_CHECKING:
    from bnpatch.core.inventory import Inventory, NormLayer, SkippedNorm
    from bnpatch.core.patch import PatchWeights
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel

# The kinds of weights that are shown.
_SHOWN = ("alpha", "slope", "var_offset")


@opt.in_groups
def inspect(
    *,
    model: opt.Model,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to check the preprocessing with, and the range of each norm's output.",
            show_default=False,
        ),
    ] = None,
    train_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images per training step and device. Default: what the checkpoint says, or 32."
        ),
    ] = None,
    as_json: opt.Json = False,
    norm_layers: Annotated[bool, typer.Option("--sites", help="List every norm layer.")] = False,
    loading: opt.Loading,
    reading: opt.Reading,
) -> None:
    """Show what bnpatch would rewrite in a model, what it would skip, and what is wrong with it.

    With images, which need no labels, it also says whether they are preprocessed as in training, whether they
    are shifted, and whether a patch can be expected to help.

    Examples:
    bnpatch inspect model.pt

    bnpatch inspect timm:efficientnet_b0 --sites

    bnpatch inspect model.pt --data val/ --train-batch-size 128
    """
    from bnpatch.models.onnx_model import OnnxModel

    loaded = loading.open(model)
    facts = _look(loaded, model)
    if isinstance(loaded, OnnxModel):
        if data is not None or train_batch_size is not None:
            say("note           advice on training and output ranges need a torch model")
        advice = None
    else:
        advice = advise(loaded, data, train_batch_size, reading)
    report = examine(loaded, data, reading)
    if as_json:
        typer.echo(json.dumps(_as_json(loaded, facts, advice) | report.to_json()))
        return
    _print_facts(facts, norm_layers)
    print_report(report, train_batch_size or getattr(loaded, "train_batch_size", None))
    if advice is not None:
        print_advice(advice, norm_layers)


@dataclass(frozen=True)
class _Facts:
    """What there is to see without data."""

    found: "Inventory[NormLayer]"
    calls: "tuple[SkippedNorm, ...]"  # calls of functions that normalize, such as F.batch_norm
    weights: "PatchWeights"
    shapes: dict[str, tuple[int, ...]]
    outputs: int | None
    fused: tuple[str, ...]
    opset: int | None
    size: int | None  # size of the file in bytes

    @property
    def skipped_norms(self) -> "tuple[SkippedNorm, ...]":
        return (*self.found.skipped_norms, *self.calls)

    @property
    def single_value(self) -> list[str]:
        return [name for name, shape in self.shapes.items() if all(side == 1 for side in shape)]

    @property
    def kinds(self) -> Counter[str]:
        return Counter(s.kind for s in self.found.norm_layers) + Counter(
            left.kind for left in self.skipped_norms
        )

    def resolution(self, name: str) -> str:
        shape = self.shapes.get(name)
        return "unknown" if shape is None else " x ".join(map(str, shape)) or "one value"


def _look(loaded: "TorchModel | OnnxModel", model: str) -> _Facts:
    from bnpatch.models.onnx_model import OnnxModel

    try:
        shapes, outputs = loaded.norm_shapes(), loaded.num_outputs()
        fused = loaded.fused_convs()
        calls = () if isinstance(loaded, OnnxModel) else loaded.functional_norms()
    except BnpatchError as error:  # the inventory also works for a model that is no classifier
        say(f"note           {error.problem}")
        shapes, outputs, fused, calls = {}, None, (), ()
    file = Path(model)
    return _Facts(
        loaded.inventory(),
        calls,
        loaded.weights,
        shapes,
        outputs,
        fused=fused,
        opset=loaded.opset if isinstance(loaded, OnnxModel) else None,
        size=file.stat().st_size if file.is_file() else None,
    )


def _print_facts(facts: _Facts, list_norms: bool) -> None:
    from .render import table

    found, single = facts.found, facts.single_value
    say(f"outputs        {facts.outputs or 'unknown'}")
    if facts.size is not None:
        opset = f", opset {facts.opset}" if facts.opset is not None else ""
        say(f"file           {facts.size / 1e6:.1f} MB{opset}")
    say(f"norms          {', '.join(f'{n} {kind}' for kind, n in facts.kinds.items()) or 'none'}")
    say("")
    put(f"{counted(len(found.norm_layers) - len(single), 'norm layer')} to weigh examples at")
    if list_norms:
        kinds = [kind for kind in _SHOWN if kind == "alpha" or any(facts.weights.of(kind).values())]
        rows = [
            [s.name, s.kind, s.num_channels, facts.resolution(s.name)]
            + [f"{facts.weights.of(kind)[s.name]:g}" for kind in kinds]
            for s in found.norm_layers
        ]
        table(["norm layer", "kind", "channels", "map", *kinds], rows)
    elif found.norm_layers:
        groups = Counter((s.kind, facts.resolution(s.name)) for s in found.norm_layers)
        rows = [[kind, shape, count] for (kind, shape), count in groups.items()]
        table(["kind", "map", "norm layers"], rows)
    if single:
        names = some(single, len(single) if list_norms else 3)
        put(f"{len(single)} more see one value per channel and stay plain: {names}")
        put("(an example has no variance there: its weight would mostly shrink the signal)")
    if facts.fused:
        put(
            f"\n{len(facts.fused)} of the convolutions may have had a Batch Norm, fused into it or left as "
            f"scale and shift: {some(facts.fused)}"
        )
        put("tune-alpha --recover-fused makes norm layers of these")
    if facts.skipped_norms:
        put(f"\nskipped: {counted(len(facts.skipped_norms), 'norm')}")
        reasons = Counter((left.kind, left.reason) for left in facts.skipped_norms)
        table(["kind", "count", "why"], [[kind, count, reason] for (kind, reason), count in reasons.items()])


def _as_json(loaded: "TorchModel | OnnxModel", facts: _Facts, advice: Advice | None) -> dict[str, Any]:
    content = {
        "model": loaded.name,
        "architecture": str(loaded.arch) if loaded.arch else None,
        "notes": loaded.notes,
        "preprocessing": loaded.preprocessing.to_json(),
        "outputs": facts.outputs,
        "norms": dict(facts.kinds),
        "sites": [
            {
                "name": s.name,
                "kind": s.kind,
                "channels": s.num_channels,
                "resolution": facts.shapes.get(s.name),
                **{kind: facts.weights.of(kind)[s.name] for kind in _SHOWN},
            }
            for s in facts.found.norm_layers
        ],
        "single_value_sites": facts.single_value,
        "folded_candidates": facts.fused,
        "opset": facts.opset,
        "bytes": facts.size,
        "left_alone": [vars(left) for left in facts.skipped_norms],
    }
    return content if advice is None else content | advice.to_json()
