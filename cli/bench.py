"""``bnpatch bench``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import options as opt

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
    from bnpatch import BnpatchError
    from bnpatch.models.latency import measure

    from .render import table

    if recipe is not None and alpha is not None:
        raise BnpatchError("--recipe and --alpha both say what to patch with", "leave one out")
    chosen = opt.recipe_of(recipe)
    loaded = loading.open(model, chosen)
    is_patched = not loaded.weights.is_baseline(loaded.baseline_alphas())
    if chosen is not None:
        if is_patched:
            raise BnpatchError(
                f"{model} is patched already", "leave out --recipe, or give the model as it was"
            )
        loaded.apply(chosen)
        what = "the recipe"
    elif alpha is None and is_patched:
        what = "the model's own weights"
    else:
        loaded.set_alphas(_USUAL_ALPHA if alpha is None else alpha)
        what = f"alpha = {_USUAL_ALPHA}, for want of a recipe" if alpha is None else f"alpha = {alpha:g}"
    alphas = loaded.alphas()
    num_patched = sum(alphas[name] != alpha for name, alpha in loaded.baseline_alphas().items())
    opt.say(f"patch          {num_patched} of {len(alphas)} norm layers: {what}")
    original, patched = measure(loaded, [{}, alphas], batch_size=batch_size, seconds=seconds, threads=threads)
    if num_patched and patched.is_noisy:
        opt.say("note           the interval is wide: measure longer (--seconds), or on a quieter machine")
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
    rows = [
        [
            name,
            f"{1000 * latency.seconds:.2f} ms",
            f"{latency.images_per_second:.1f}",
            f"{latency.ratio:.2f}x",
            f"[{latency.low:.2f}x, {latency.high:.2f}x]" if latency is not original else "",
        ]
        for name, latency in (("as it is", original), ("patched", patched))
    ]
    table([f"batch of {batch_size}", "time", "images/s", "ratio", "95% interval"], rows)
