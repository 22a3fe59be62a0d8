"""``bnpatch export``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

import bnpatch
from bnpatch.core.errors import BnpatchError

from . import options as opt
from . import recipes
from .console import put


@opt.in_groups
def export(
    *,
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    recipe: Annotated[Path | None, typer.Option(help="Patch with this recipe first.")] = None,
    alpha_input: Annotated[
        Literal["global", "per-site"] | None,
        typer.Option(
            help="Leave alpha, and slope and offset if there are any, adjustable: one input for all norm "
            "layers, or one for each."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Compare on real images of this data set, too.")] = None,
    as_json: opt.Json = False,
    loading: opt.Loading,
) -> None:
    """Write a patched model as a standard ONNX file, and check that it computes the same.

    Norm layers at alpha = 0 stay as they were. The file is compared with the model on batches of several
    sizes; if it deviates by more than rounding, no file is left and the exit code is 1.

    Examples:
    bnpatch export model.pt --recipe bnpatch-out/recipe.json -o patched.onnx

    bnpatch export model.onnx --recipe bnpatch-out/recipe.json -o patched.onnx --alpha-input global
    """
    if output.suffix.lower() != ".onnx":
        raise BnpatchError(f"{output} does not end in .onnx", "name a file that does")
    if Path(model).exists() and output.exists() and output.samefile(model):
        raise BnpatchError(f"{output} is the model itself", "choose another --output")
    chosen = recipes.read(recipe)
    loaded = loading.open(model, chosen)
    if chosen is not None:
        recipes.apply(chosen, loaded)
    images = None
    if data is not None:
        images = next(bnpatch.open_examples(data, loaded, limit=32, labels="optional").batches(32)).x
    done = bnpatch.export_onnx(loaded, output, alpha_inputs=alpha_input, images=images)
    if as_json:
        typer.echo(json.dumps({**vars(done), "path": str(done.path)}))
        return
    batches = ", ".join(map(str, done.batches))
    sizes = " and ".join(" x ".join(map(str, size)) for size in done.sizes)
    norm_layers = f"{len(done.patched)} of {len(loaded.inventory().norm_layers)} norm layers weigh examples"
    put(f"wrote {done.path}: {norm_layers}, opset {done.opset}")
    if not done.patched:
        put("nothing is patched: " + ("every alpha is 0" if chosen else "--recipe says what to patch with"))
    put(
        f"deviates from the model by at most {done.max_deviation:.1e} of the largest output, "
        f"{done.mean_deviation:.1e} on average (batches of {batches}; {sizes})"
    )
