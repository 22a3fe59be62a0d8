"""``bnpatch inspect``."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt


@opt.in_groups
def inspect(
    *,
    model: opt.Model,
    as_json: opt.Json = False,
    sites: Annotated[bool, typer.Option("--sites", help="List every site.")] = False,
    loading: opt.Loading,
) -> None:
    """Show what bnpatch would rewrite in a model, what it would leave alone, and why.

    Examples:
    bnpatch inspect model.pt

    bnpatch inspect timm:efficientnet_b0 --sites
    """
    from bnpatch.errors import BnpatchError
    from bnpatch.onnx_model import OnnxModel

    from .render import table

    loaded = loading.open(model)
    found, alphas = loaded.survey(), loaded.alphas()
    try:
        shapes, outputs = loaded.site_shapes(), loaded.num_outputs()
        folded = loaded.folded()
        calls = () if isinstance(loaded, OnnxModel) else loaded.functional_norms()
    except BnpatchError as error:  # a list of its norms needs no classifier, and no right image size
        opt.say(f"note           {error.problem}")
        shapes, outputs, folded, calls = {}, None, (), ()
    left_alone = (*found.left_alone, *calls)

    def resolution(name: str) -> str:
        shape = shapes.get(name)
        return "unknown" if shape is None else " x ".join(map(str, shape)) or "one value"

    file = Path(model)
    size = file.stat().st_size if file.is_file() else None
    if as_json:
        content = {
            "model": loaded.name,
            "architecture": str(loaded.arch) if loaded.arch else None,
            "notes": loaded.notes,
            "preprocessing": loaded.preprocessing.to_json(),
            "outputs": outputs,
            "sites": [
                {
                    "name": s.name,
                    "kind": s.kind,
                    "channels": s.num_channels,
                    "resolution": shapes.get(s.name),
                    "alpha": alphas[s.name],
                }
                for s in found.sites
            ],
            "folded_candidates": folded,
            "opset": loaded.opset if isinstance(loaded, OnnxModel) else None,
            "bytes": size,
            "left_alone": [vars(left) for left in left_alone],
        }
        typer.echo(json.dumps(content))
        return
    opt.say(f"outputs        {outputs or 'unknown'}")
    if size is not None:
        opset = f", opset {loaded.opset}" if isinstance(loaded, OnnxModel) else ""
        opt.say(f"file           {size / 1e6:.1f} MB{opset}")
    opt.say("")
    single = [name for name, shape in shapes.items() if all(side == 1 for side in shape)]
    typer.echo(f"{len(found.sites) - len(single)} sites to weigh examples at")
    if sites:
        rows = [
            [s.name, s.kind, s.num_channels, resolution(s.name), f"{alphas[s.name]:g}"] for s in found.sites
        ]
        table(["site", "kind", "channels", "map", "alpha"], rows)
    elif found.sites:
        groups = Counter((s.kind, resolution(s.name)) for s in found.sites)
        table(["kind", "map", "sites"], [[kind, shape, count] for (kind, shape), count in groups.items()])
    if single:
        names = ", ".join(single[:3]) + (", ..." if len(single) > 3 else "")
        typer.echo(f"{len(single)} more see one value per channel and stay plain: {names}")
    if folded:
        names = ", ".join(folded[:3]) + (", ..." if len(folded) > 3 else "")
        typer.echo(f"\n{len(folded)} convolutions may have had a Batch Norm folded into them: {names}")
    if left_alone:
        typer.echo(f"\n{len(left_alone)} norms are left alone")
        reasons = Counter((left.kind, left.reason) for left in left_alone)
        table(["kind", "count", "why"], [[kind, count, reason] for (kind, reason), count in reasons.items()])
