"""``bnpatch bench``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnpatch.core.errors import BnpatchError

from . import options as opt
from . import recipes
from .console import say

if TYPE_CHECKING:
    from bnpatch.core.recipe import Recipe
    from bnpatch.models.latency import Latency
    from bnpatch.models.onnx_model import OnnxModel
    from bnpatch.models.torch_model import TorchModel

#: The alpha that is measured; any alpha above 0 costs the same.
_USUAL_ALPHA = 0.01


@opt.in_groups
def bench(
    *,
    model: opt.Model,
    recipe: Annotated[Path | None, typer.Option(help="Patch with this recipe.")] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="Patch all norm layers with this weight instead.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure for.")] = 10.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on the CPU. Default: torch's or onnxruntime's own.")
    ] = None,
    as_json: opt.Json = False,
    loading: opt.Loading,
) -> None:
    """Measure how long a model takes as it is and patched, side by side.

    Both take turns, and the ratio is that of neighbouring turns, so that other programs on the machine
    disturb it little. An ONNX file is patched as export would write it. Without a recipe all norm layers are
    patched, which costs the most.

    Examples:
    bnpatch bench model.pt

    bnpatch bench model.onnx --recipe bnpatch-out/recipe.json -b 8 --threads 1
    """
    from bnpatch.models.latency import measure

    from .render import table

    if recipe is not None and alpha is not None:
        raise BnpatchError("--recipe and --alpha both say what to patch with", "leave one out")
    chosen = recipes.read(recipe)
    loaded = loading.open(model, chosen)
    what = _patch(loaded, chosen, alpha, model)
    alphas = loaded.alphas()
    num_patched = sum(alphas[name] != baseline for name, baseline in loaded.baseline_alphas().items())
    say(f"patch          {num_patched} of {len(alphas)} norm layers: {what}")
    original, patched = measure(loaded, [{}, alphas], batch_size=batch_size, seconds=seconds, threads=threads)
    if num_patched and patched.is_noisy:
        say("note           the interval is wide: measure longer (--seconds), or on a quieter machine")
    if as_json:
        content = {
            "model": loaded.name,
            "device": str(loaded.device),
            "threads": threads,
            "sites": len(alphas),
            "patched_sites": num_patched,
            "original": asdict(original),
            "patched": asdict(patched),
        }
        typer.echo(json.dumps(content))
        return
    interval = f"[{patched.low:.2f}x, {patched.high:.2f}x]"
    rows = [_row("as it is", original, ""), _row("patched", patched, interval)]
    table([f"batch of {batch_size}", "time", "images/s", "ratio", "95% interval"], rows)


def _patch(
    loaded: "TorchModel | OnnxModel", recipe: "Recipe | None", alpha: float | None, called: str
) -> str:
    """Patch the model as asked, and say with what."""
    if recipe is not None:
        recipes.check_unpatched(loaded, called)
        loaded.apply(recipe)
        return "the recipe"
    if alpha is not None:
        loaded.set_alphas(alpha)
        return f"alpha = {alpha:g}"
    if not loaded.weights.is_baseline(loaded.baseline_alphas()):
        return "the model's own weights"
    loaded.set_alphas(_USUAL_ALPHA)
    return f"alpha = {_USUAL_ALPHA}, for want of a recipe"


def _row(name: str, latency: "Latency", interval: str) -> list[str]:
    time, rate = f"{1000 * latency.seconds:.2f} ms", f"{latency.images_per_second:.1f}"
    return [name, time, rate, f"{latency.ratio:.2f}x", interval]
