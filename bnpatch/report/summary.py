"""The result of a search in words, for users."""

from collections.abc import Mapping, Sequence

from bnpatch.evaluation.metrics import Comparison, Estimate, Metric
from bnpatch.search.result import TuneResult

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
    # The identity is a change too, maybe a gain, for a model that had alphas before the search.
    same = not any(c.change.value for c in result.comparisons)
    if same and (is_identity(result) or result.chosen is result.candidates[0]):
        return (
            "No significant gain: nothing that was tried does better beyond doubt. Keep the model as it is."
        )
    if str(result.verdict) == "gain":
        way = "rises" if change.value > 0 else "falls"
        values = f"from {metric.format(tuned.before.value)} to {metric.format(tuned.after.value)}"
        lost = [title(c.metric) for c in result.comparisons if c.verdict == "loss"]
        if (calibration := result.verdict.calibration) is not None and calibration.verdict == "loss":
            lost.append("calibration")
        but = f" It loses in {' and '.join(lost)}, though." if lost else ""
        return f"Patched, the model gains: its {title(metric)} {way} {values} {where}.{but}"
    if str(result.verdict) == "loss":
        return (
            f"Keep the model as it is: {result.chosen.name} did best in tuning, but makes its "
            f"{title(metric)} worse by {points(metric, abs(change.value), signed=False)} {where}."
        )
    if not abs(change.high - change.low) < float("inf"):
        return (
            f"Nobody knows whether the model gains: its {title(metric)} changes by "
            f"{points(metric, change.value)} {where}, too few for an interval. Judge by more of them."
        )
    by = f"{points(metric, change.value)}, {interval(metric, change)}"
    return (
        f"No significant gain in {title(metric)} ({by}) {where}: keep the model as it is, "
        "although the files hold the patch."
    )


def training_sentence(comparisons: Sequence[Comparison], metric: Metric) -> str:
    """Describe the effect of fine-tuning a checkpoint in one sentence that a user can act on."""
    tuned = next(c for c in comparisons if c.metric.name == metric.name)
    values = f"{title(metric)} {metric.format(tuned.before.value)} → {metric.format(tuned.after.value)}"
    by = f"{values}, {points(metric, tuned.change.value)}, {interval(metric, tuned.change)}"
    return {
        "gain": f"Fine-tuned, the model is better than the checkpoint: {by}.",
        "loss": f"Keep the checkpoint, the fine-tuned model is worse: {by}. Try a lower --lr or more epochs.",
    }.get(tuned.verdict, f"The fine-tuned model is not better than the checkpoint beyond doubt: {by}.")


def scored_on(result: TuneResult) -> str:
    """Describe the examples that gave the verdict."""
    count = f"{result.num_held_out:,} examples"
    if result.num_parts > 1:
        return f"{count}, each left out of the search that it judged (cross-fitting)"
    return f"{count} that the search did not see"


def title(metric: Metric) -> str:
    """The name of a metric in a sentence."""
    return _TITLES.get(metric.name, metric.name)


def points(metric: Metric, change: float, signed: bool = True) -> str:
    """Format a change of a metric, in percentage points for a rate."""
    text = metric.format(change, signed=True)
    return f"{text if signed else text.lstrip('+-')}{' points' if metric.is_rate else ''}"


def interval(metric: Metric, estimate: Estimate, signed: bool = True) -> str:
    """Format a 95% interval, which is unknown if there is one value."""
    if not abs(estimate.high - estimate.low) < float("inf"):
        return "interval unknown"
    return f"{metric.format(estimate.low, signed)} to {metric.format(estimate.high, signed)}"


def identities(result: TuneResult) -> Mapping[str, float]:
    """The alphas, by name of norm layer, with which the model computes the same as before any patch."""
    return result.candidates[0].weights.alphas


def is_identity(result: TuneResult) -> bool:
    """Do the weights that are kept change nothing?"""
    return result.weights.is_identity(identities(result))


def weight_label(result: TuneResult) -> str:
    """The name of the distance of a norm layer's alpha from its identity."""
    kinds = set(identities(result).values())
    if kinds == {1.0}:
        return "1 - alpha"
    return "alpha" if 1.0 not in kinds else "alpha (Group Norm: 1 - alpha)"


def weight_axis(result: TuneResult) -> str:
    """The label of an axis for that distance."""
    label = weight_label(result)
    meaning = {"alpha": "the weight of the example", "1 - alpha": "the weight of the running moments"}
    return f"{label}, {meaning[label]}" if label in meaning else label


def distances(result: TuneResult) -> dict[str, float]:
    """The distance of each norm layer from its identity: alpha for Batch Norm, 1 - alpha for Group Norm."""
    return {name: abs(result.weights.alphas[name] - origin) for name, origin in identities(result).items()}
