"""The report of a search: one HTML page that needs no other files."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.base import Model
from bnpatch.report import details, findings
from bnpatch.report.markup import Markup, join, table, tag
from bnpatch.report.summary import is_identity, scored_on, title, training_sentence, verdict_sentence
from bnpatch.search.result import TuneResult

#: Number of unreadable images that are named; the others are counted.
_NAMED = 5


def report_page(
    result: TuneResult,
    model: Model[Any],
    recipe: Path,
    patched: Path,
    pickled: bool = False,
    training: findings.Training | None = None,
) -> Markup:
    """Make the report as self-contained HTML, without scripts or external files.

    Args:
        result: the result of a search.
        model: the model that was tuned.
        recipe: path of the recipe.
        patched: path of the patched model.
        pickled: whether that is a pickled module, which loads only with ``--unsafe-load``.
        training: results of training the model before the search.
    """
    measured = result.trade_off
    sections: list[tuple[str, Markup | None]] = [
        *(() if training is None else _training(training, result)),
        ("Before and after", findings.before_and_after(result)),
        ("Notes", _notes(result, model)),
        ("The list of candidates", findings.search(result)),
        ("One weight for all", findings.curves(result)),
        ("The weights by depth", findings.depth(result, _shapes(model))),
        (
            "Gain against time",
            details.trade_off(measured, result.comparisons[0].metric) if measured else None,
        ),
        ("Classes", details.classes(result, model.class_names)),
        ("Skipped", details.skipped_norms(model.inventory().skipped_norms)),
        ("Apply it", _apply(result, model, recipe, patched, pickled)),
        ("Where this comes from", _provenance(result.recipe)),
    ]
    name = f"bnpatch: {model.name}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", name),
        tag("style", Markup(_style())),
    )
    header = tag(
        "header",
        tag("p", f"bnpatch {'tune-alpha' if training is None else 'fine-tune'}", class_="kicker"),
        tag("h1", model.name),
        tag("p", _subtitle(result), class_="muted"),
    )
    body = [
        tag("section", tag("h2", heading), content) for heading, content in sections if content is not None
    ]
    verdict, sentence = str(result.verdict), verdict_sentence(result)
    if training is not None:
        verdict = next(c for c in training.comparisons if c.metric.name == result.metric.name).verdict
        sentence = f"{training_sentence(training.comparisons, result.metric)} Example weighing: {sentence}"
    colour = verdict if verdict in ("gain", "loss") else ""
    main = tag("main", tag("p", sentence, class_=f"verdict {colour}".strip()), *body)
    return join([Markup("<!doctype html>\n"), tag("html", head, tag("body", header, main), lang="en"), "\n"])


def _training(training: findings.Training, result: TuneResult) -> list[tuple[str, Markup | None]]:
    return [
        ("Fine-tuned, against the checkpoint", findings.trained(training, scored_on(result))),
        ("What each technique contributes", findings.contributions(training)),
    ]


@cache
def _style() -> str:
    return files("bnpatch.report").joinpath("report.css").read_text(encoding="utf-8")


def _subtitle(result: TuneResult) -> str:
    seconds = f" · {result.seconds:,.0f} s" if result.seconds else ""
    return (
        f"{title(result.metric)} was tuned on {result.num_tuning:,} examples · "
        f"{len(result.norm_layers)} norm layers · {len(result.trials)} trials{seconds}"
    )


def _shapes(model: Model[Any]) -> Mapping[str, Sequence[int]]:
    """Spatial shapes by name of norm layer; empty where the model does not take a blank image."""
    try:
        return {name: shape for name, shape in model.norm_shapes().items() if shape}
    except BnpatchError:
        return {}


def _notes(result: TuneResult, model: Model[Any]) -> Markup | None:
    notes = [*result.notes, *model.notes]
    if result.interrupted:
        notes.insert(0, "The search was interrupted: this is the best of what it had found by then.")
    if skipped := result.skipped:
        shown = [f"{name} ({why})" for name, why in list(skipped.items())[:_NAMED]]
        more = f" and {len(skipped) - _NAMED} others" if len(skipped) > _NAMED else ""
        notes.append(f"Left out, because they can't be read: {', '.join(shown)}{more}.")
    return tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else None


def _apply(result: TuneResult, model: Model[Any], recipe: Path, patched: Path, pickled: bool) -> Markup:
    if is_identity(result):
        text = f"There is nothing to apply: {patched} computes what the model did before."
        return tag("p", text)
    data = (result.recipe.provenance.get("data") or {}).get("name") or "DATA"
    quoted = {
        name: shlex.quote(str(path))
        for name, path in (("recipe", recipe), ("patched", patched), ("data", data))
    }
    unsafe = " --unsafe-load" if pickled else ""
    evaluate = f"bnpatch evaluate {quoted['patched']} --data {quoted['data']}{unsafe}"
    in_torch = (
        "import bnpatch\n\n"
        "# model: the torch module that was tuned, as you build and load it\n"
        f"model = bnpatch.apply(model, {json.dumps(str(recipe))})  # in place"
    )
    if model.runs_onnx:
        name = shlex.quote(f"{model.name}.onnx")
        export = f"bnpatch export {name} --recipe {quoted['recipe']} -o {quoted['patched']}"
        in_python = (
            f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({json.dumps(str(patched))})"
        )
        parts = [
            ("Evaluate the patched model on other data", evaluate),
            ("Use it from Python", in_python),
            ("Write the patched ONNX file again", export),
        ]
    else:
        onnx = shlex.quote(str(patched.with_suffix(".onnx")))
        parts = [
            ("Evaluate the patched model on other data", evaluate),
            ("Use it from Python", in_torch),
            ("Export it as ONNX", f"bnpatch export {quoted['patched']} -o {onnx}{unsafe}"),
        ]
    return join(part for heading, code in parts for part in (tag("h3", heading), _code(code)))


def _provenance(recipe: Recipe) -> Markup:
    """A table of the seed, versions and fingerprints, and the command that repeats the search."""
    about: Mapping[str, Any] = recipe.provenance
    data = about.get("data") or {}
    norm_layers = json.dumps(
        {norm_layer.name: norm_layer.fingerprint for norm_layer in recipe.norm_layers}, sort_keys=True
    )
    facts = {
        "made": about.get("created"),
        "model": about.get("model"),
        "architecture": about.get("architecture"),
        "model fingerprint": hashlib.sha256(norm_layers.encode()).hexdigest()[:16],
        "preprocessing": _preprocessing(about.get("preprocessing")),
        "data": data.get("name"),
        "held-out data": data.get("test_name"),
        "data fingerprint": data.get("fingerprint"),
        "metric": about.get("metric"),
        "granularity": about.get("granularity"),
        "passes over the tuning examples": about.get("passes"),
        "seed": about.get("seed"),
        "versions": _words(about.get("versions")),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value is not None]
    command = about.get("command")
    return join(
        [
            join([tag("h3", "Do it again"), _code(f"bnpatch {str(command).removeprefix('bnpatch ')}")])
            if command
            else None,
            table("Of this result.", ["what", "value"], rows, class_="words"),
        ]
    )


def _preprocessing(stored: Mapping[str, Any] | None) -> str:
    if stored is None:
        return "none: inputs were given as they are"
    return f"{Preprocessing.from_json(stored, '')}, from {stored.get('source', 'unknown origin')}"


def _words(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items())


def _code(text: str) -> Markup:
    return tag("pre", tag("code", text))
