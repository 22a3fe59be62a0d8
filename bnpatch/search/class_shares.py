"""Check whether a gain without labels holds by other class frequencies than those that were presumed.

Self-labelling and information maximisation score weights as if classes occurred equally often. If they don't,
weights that make predictions of the frequent classes rarer pass for a gain, and cost right answers. So a gain
must hold by the frequencies that the patched model predicts, too. Under a shift that the patch undoes, these
are nearer to the truth than those of the unpatched model; where there is nothing to undo, both models predict
nearly the same, and nothing is gained by predicting the frequent classes less often.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnpatch.core.patch import PatchState
from bnpatch.data.dataset import Examples, Indices
from bnpatch.evaluation.metrics import Metric, Outcome
from bnpatch.models.base import Model
from bnpatch.search.held_out import PairedScores, conclude, gather
from bnpatch.search.label_free import estimated_prior
from bnpatch.search.task import Task

#: Label-free metrics that presume how often classes occur.
_PRESUMING = ("unlabeled", "information")


def by_predicted_shares(
    task: Task, examples: Examples, paired: PairedScores, before: PatchState, after: PatchState
) -> tuple[PairedScores, str]:
    """Score held-out examples again by predicted class frequencies, where they show a gain by presumed ones.

    Args:
        task: what was searched.
        examples: the examples that the scores are of.
        paired: scores of its held-out examples without and with the patch.
        before: the state of the model without the patch.
        after: its state with the patch.

    Returns:
        The scores and "", or the scores by predicted frequencies and a note for the user, if these show
        no gain. A class prior that the user gives is taken for the truth, and so are labels.
    """
    spec, model = task.spec, task.model
    metric = spec.metric
    if metric.name not in _PRESUMING or spec.prior is not None or metric.name not in paired.before:
        return paired, ""
    if not _gains(paired, metric):
        return paired, ""
    model.set_state(after)
    shares = estimated_prior(_predictions(model, examples, task.held_out, spec.batch_size))
    predicted = replace(spec, prior=shares.tolist())
    objective = predicted.objective(model, task.seen, task.tuning)
    judging, _ = predicted.held_out_objective(objective, examples, task.held_out)
    stricter = gather(model, examples, judging, before, after, task.held_out)
    return (paired, "") if _gains(stricter, metric) else (stricter, _note(metric.name, shares))


def _gains(paired: PairedScores, metric: Metric) -> bool:
    return conclude(paired, [metric]).comparisons[0].outcome is Outcome.GAIN


def _note(name: str, shares: Tensor) -> str:
    low, high = 100 * shares.min(), 100 * shares.max()
    return (
        f"the classes may not be equally frequent: patched, the model predicts {low:.1f}% to {high:.1f}% of "
        f"each, and by these frequencies, which give the verdict, {name} does not improve. If you know how "
        "often the classes occur, say so with --class-prior"
    )


def _predictions(model: Model[Any], examples: Examples, indices: Indices, batch_size: int) -> Tensor:
    """Return the probabilities (N, K) that the model predicts."""
    with model.evaluating():
        logits = [model.as_classes(model.predict(b.x)) for b in examples.batches(batch_size, indices)]
    return torch.cat(logits).float().softmax(1).cpu()
