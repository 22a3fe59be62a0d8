"""The result of a search in words, for users: sentences, numbers, commands, and where it comes from."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnpatch.core.errors import BnpatchError
from bnpatch.core.recipe import Recipe
from bnpatch.core.text import counted
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.evaluation.metrics import TOP5, Comparison, Estimate, Metric, Outcome, worth_showing
from bnpatch.models.base import Model
from bnpatch.search.objective import LABEL_FREE
from bnpatch.search.result import TuneResult

#: What people must know of the scores of candidates, wherever these are listed.
OF_CANDIDATES = (
    "These examples chose the candidate, so they overstate how good it is: "
    "the held-out evaluation is the number to believe."
)

#: The verdict in a recipe that a search has written on the way.
UNFINISHED = "none: the search has not ended"

_TITLES = {
    "top5": "top-5 accuracy",
    "unlabeled": "unlabeled objective",
    "information": "information objective",
}


def verdict_sentence(result: TuneResult) -> str:
    """Describe the verdict in one sentence that a user can act on."""
    tuned = result.comparisons[0]
    metric, change = tuned.metric, tuned.change
    where = f"on {scored_on(result)}"
    if len(result.candidates) == 1:
        return "Keep the model as it is: the search ended before anything else was tried."
    # To patch nothing is a change too, maybe a gain, for a model that had alphas before the search.
    same = not any(c.change.value for c in result.comparisons)
    if result.chosen is result.candidates[0] and result.candidate_recipe is not None:
        return f"Keep the model as it is: {result.reason}."
    if same and (patches_nothing(result) or result.chosen is result.candidates[0]):
        return (
            "No significant gain: nothing that was tried does better beyond doubt. Keep the model as it is."
        )
    if is_refused(result) and tuned.outcome is not Outcome.LOSS:
        by = f"{points(metric, change.value)}, {interval(metric, change)}"
        return (
            f"Keep the model as it is: {result.chosen.name} changes its {title(metric)} ({by}) {where}, "
            f"but is {result.held_out.kept}."
        )
    if tuned.outcome is Outcome.GAIN:
        way = "rises" if change.value > 0 else "falls"
        values = f"from {metric.format(tuned.before.value)} to {metric.format(tuned.after.value)}"
        lost = [title(c.metric) for c in result.comparisons if c.outcome is Outcome.LOSS]
        if (calibration := result.held_out.calibration) is not None and calibration.outcome is Outcome.LOSS:
            lost.append("calibration")
        if metric.name in LABEL_FREE:
            return (
                f"Patched, the {title(metric)} improves: it {way} {values} {where}. "
                "Whether answers get better is unknown without labels."
            )
        but = f" It loses in {' and '.join(lost)}, though." if lost else ""
        return f"Patched, the model gains: its {title(metric)} {way} {values} {where}.{but}"
    if tuned.outcome is Outcome.LOSS:
        return (
            f"Keep the model as it is: {result.chosen.name} did best in tuning, but makes its "
            f"{title(metric)} worse by {points(metric, abs(change.value), signed=False)} {where}."
        )
    by = f"{points(metric, change.value)}, {interval(metric, change)}"
    if result.is_recommended:  # tuned for shifts that these examples don't have
        return (
            f"Patched, the model gains on shifted images, and its {title(metric)} changes by no more than "
            f"chance ({by}) {where}."
        )
    if not abs(change.high - change.low) < float("inf"):
        return (
            f"It is unknown whether the model gains: its {title(metric)} changes by "
            f"{points(metric, change.value)} {where}, too few for an interval. Judge by more of them."
        )
    return f"No significant gain in {title(metric)} ({by}) {where}: keep the model as it is."


def is_refused(result: TuneResult) -> bool:
    """Tell whether the chosen candidate does harm, to held-out examples or maybe to the images to keep."""
    kept = result.held_out.kept
    return result.comparisons[0].outcome is Outcome.LOSS or (kept is not None and not kept.is_within)


def recommendation(recipe: Recipe) -> str:
    """Describe what a recipe says of itself, in one sentence; "" where it says nothing."""
    about = recipe.provenance
    if about.get("recommended") is True:
        return "held-out examples support it"
    if about.get("recommended") is not False:
        return ""
    reason = str(about.get("reason") or "no candidate was better beyond doubt on held-out examples")
    return f"not recommended: {reason}"


def training_sentence(comparisons: Sequence[Comparison], metric: Metric) -> str:
    """Describe the effect of fine-tuning a checkpoint in one sentence that a user can act on."""
    tuned = next(c for c in comparisons if c.metric.name == metric.name)
    values = f"{title(metric)} {metric.format(tuned.before.value)} → {metric.format(tuned.after.value)}"
    by = f"{values}, {points(metric, tuned.change.value)}, {interval(metric, tuned.change)}"
    return {
        Outcome.GAIN: f"Fine-tuned, the model is better than the checkpoint: {by}.",
        Outcome.LOSS: f"Keep the checkpoint, the fine-tuned model is worse: {by}. "
        "Try a lower --lr or more epochs.",
        Outcome.NO_CHANGE: f"The fine-tuned model is not better than the checkpoint beyond doubt: {by}.",
    }[tuned.outcome]


def scored_on(result: TuneResult) -> str:
    """Describe the examples that gave the verdict."""
    count = examples_in_groups(result.num_held_out, result.held_out.num_groups)
    if result.num_parts > 1:
        return f"{count}, each left out of the search that it judged (cross-fitting)"
    return f"{count} that the search did not see"


def examples_in_groups(examples: int, groups: int | None) -> str:
    """Say how many examples there are, and in how many groups if they are not independent.

    >>> examples_in_groups(1000, 200)
    '1,000 examples in 200 groups'
    """
    return counted(examples, "example") + ("" if groups is None else f" in {counted(groups, 'group')}")


def title(metric: Metric) -> str:
    """Return the name of a metric in a sentence."""
    return _TITLES.get(metric.name, metric.name)


def class_name(names: Sequence[str] | None, index: int) -> str:
    """Return the name of a class, or its number where the names are unknown."""
    return names[index] if names and index < len(names) else str(index)


def shown(
    comparisons: Sequence[Comparison], model: Model[Any], tuned: Metric | None = None
) -> list[Comparison]:
    """Keep the comparisons that tell something: top-5 accuracy does not where the model has few classes.

    Args:
        comparisons: comparisons by any metrics.
        model: the model that was scored.
        tuned: the metric that the user asked for, which is always shown.
    """
    kept = shown_metrics([c.metric for c in comparisons], model)
    return [c for c in comparisons if c.metric in kept or c.metric == tuned]


def shown_metrics(metrics: Sequence[Metric], model: Model[Any]) -> list[Metric]:
    """Keep the metrics that tell something about the model, see :func:`shown`."""
    if TOP5 not in metrics:
        return list(metrics)
    try:
        return worth_showing(metrics, model.num_outputs())
    except BnpatchError:  # it takes no blank image
        return list(metrics)


def points(metric: Metric, change: float, signed: bool = True) -> str:
    """Format a change of a metric, in percentage points for a rate."""
    text = metric.format(change, signed=True)
    return f"{text if signed else text.lstrip('+-')}{' points' if metric.is_rate else ''}"


def interval(metric: Metric, estimate: Estimate, signed: bool = True) -> str:
    """Format a 95% interval, of a change if signed, else of a mean; it is unknown if there is one value."""
    if not abs(estimate.high - estimate.low) < float("inf"):
        return "interval unknown"
    low, high = (end if signed else metric.clip(end) for end in (estimate.low, estimate.high))
    return f"{metric.format(low, signed)} to {metric.format(high, signed)}"


def baseline_alphas(result: TuneResult) -> Mapping[str, float]:
    """Return, by name of norm layer, the alpha with which the model computes the same as before any patch."""
    return result.candidates[0].weights.alphas


def patches_nothing(result: TuneResult) -> bool:
    """Tell whether the weights that are kept change nothing."""
    return result.weights.is_baseline(baseline_alphas(result))


def weight_label(result: TuneResult) -> str:
    """Return the name of the distance of a norm layer's alpha from the alpha that changes nothing."""
    kinds = set(baseline_alphas(result).values())
    if kinds == {1.0}:
        return "1 - alpha"
    return "alpha" if 1.0 not in kinds else "alpha (Group Norm: 1 - alpha)"


def weight_axis(result: TuneResult) -> str:
    """Return the label of an axis for that distance."""
    label = weight_label(result)
    meaning = {"alpha": "the weight of the example", "1 - alpha": "the weight of the running statistics"}
    return f"{label}, {meaning[label]}" if label in meaning else label


def distances(result: TuneResult) -> dict[str, float]:
    """Return by name of norm layer: alpha for Batch Norm, 1 - alpha for Group Norm; 0 changes nothing."""
    return {name: abs(result.weights.alphas[name] - alpha) for name, alpha in baseline_alphas(result).items()}


@dataclass(frozen=True)
class Written:
    """The files that someone who uses the result of a search needs.

    Attributes:
        recipe: path of the recipe.
        patched: path of the patched model.
        pickled: whether that is a pickled module, which loads only with ``--unsafe-load``.
    """

    recipe: Path
    patched: Path
    pickled: bool = False


def snippets(result: TuneResult, model: Model[Any], written: Written) -> list[tuple[str, str]]:
    """Return what to do with the patched model, and the command or code that does it.

    Args:
        result: the result of a search.
        model: the model that was tuned.
        written: the files of the result.
    """
    recipe, patched = written.recipe, written.patched
    data = (result.recipe.provenance.get("data") or {}).get("name") or "DATA"
    quoted = shlex.quote(str(patched))
    unsafe = " --unsafe-load" if written.pickled else ""
    evaluate = f"bnpatch evaluate {quoted} --data {shlex.quote(str(data))}{unsafe}"
    if model.runs_onnx:
        original = shlex.quote(f"{model.name}.onnx")
        export = f"bnpatch export {original} --recipe {shlex.quote(str(recipe))} -o {quoted}"
        code = f"import onnxruntime\n\nsession = onnxruntime.InferenceSession({json.dumps(str(patched))})"
        return [
            ("Evaluate the patched model on other data", evaluate),
            ("Use it from Python", code),
            ("Write the patched ONNX file again", export),
        ]
    code = (
        "import bnpatch\n\n"
        "# model: the torch module that was tuned, as you build and load it\n"
        f"model = bnpatch.apply(model, {json.dumps(str(recipe))})  # in place"
    )
    onnx = shlex.quote(str(patched.with_suffix(".onnx")))
    return [
        ("Evaluate the patched model on other data", evaluate),
        ("Use it from Python", code),
        ("Export it as ONNX", f"bnpatch export {quoted} -o {onnx}{unsafe}"),
    ]


def origin(recipe: Recipe) -> list[tuple[str, str]]:
    """List names and values of what a result depends on: model, data, settings, seed and versions."""
    about: Mapping[str, Any] = recipe.provenance
    data = about.get("data") or {}
    norm_layers = json.dumps({layer.name: layer.fingerprint for layer in recipe.norm_layers}, sort_keys=True)
    stored = about.get("preprocessing")
    facts = {
        "made": about.get("created"),
        "model": about.get("model"),
        "architecture": about.get("architecture"),
        "model fingerprint": hashlib.sha256(norm_layers.encode()).hexdigest()[:16],
        "preprocessing": "none: inputs were given as they are"
        if stored is None
        else f"{Preprocessing.from_json(stored, '')}, from {stored.get('source', 'unknown origin')}",
        "data": data.get("name"),
        "held-out data": data.get("test_name"),
        "data fingerprint": data.get("fingerprint"),
        "groups": _groups(data),
        "metric": about.get("metric"),
        "granularity": about.get("granularity"),
        "passes over the tuning examples": about.get("passes"),
        "seed": about.get("seed"),
        "versions": ", ".join(f"{name} {value}" for name, value in (about.get("versions") or {}).items()),
    }
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _groups(data: Mapping[str, Any]) -> str | None:
    """Say how many groups the examples are of; None if all are independent."""
    counts = [
        f"{data[key]:,} {use}"
        for key, use in (("tuning_groups", "to tune on"), ("held_out_groups", "to judge by"))
        if key in data
    ]
    return ", ".join(counts) or None
