"""Fine-tune a checkpoint: train it further, then tune alpha."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnpatch.data.dataset import Examples
from bnpatch.evaluation.evaluate import compare_scores, evaluate
from bnpatch.evaluation.metrics import Comparison
from bnpatch.finetune.checkpoint import Epoch
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.engine import new_accelerator
from bnpatch.finetune.trainer import FineTuned, train
from bnpatch.models.torch_model import TorchModel
from bnpatch.search.result import TuneResult
from bnpatch.search.task import parts_of
from bnpatch.search.tune import tune_alpha


@dataclass
class FineTuneResult:
    """The result of fine-tuning.

    Attributes:
        training: the result of training.
        tuning: the result of the search for alpha on the trained model.
        comparisons: one comparison per metric on held-out examples, of the checkpoint with the fine-tuned
            model and its alphas; empty except in the main process.
    """

    training: FineTuned
    tuning: TuneResult
    comparisons: list[Comparison] = field(default_factory=list)


def fine_tune(
    model: TorchModel,
    train_examples: Examples,
    val_examples: Examples,
    settings: FineTuneSettings | None = None,
    *,
    holdout: float = 0.5,
    trials: int = 15,
    output: Path | None = None,
    resume: bool = False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    tell: Callable[[str], None] = lambda note: None,
    accelerator: Any = None,
) -> FineTuneResult:
    """Train a model further with the techniques of the settings, in place, then tune one alpha and set it.

    Alphas and lambdas of the model are dropped first, see :func:`bnpatch.finetune.trainer.train`.

    The validation examples are split in two: one part selects the best epoch and alpha, and the other, which
    neither has seen, gives the verdict.

    Args:
        model: from :func:`bnpatch.load`; it has the weights of its best epoch afterwards.
        train_examples: from :func:`bnpatch.open_examples`.
        val_examples: from :func:`bnpatch.open_examples`.
        settings: settings of training.
        holdout: fraction of the validation examples that gives the verdict.
        trials: number of alphas to try.
        output: folder for ``last.pt``, ``best.pt`` and ``metrics.csv``; None to write nothing.
        resume: whether to continue from ``last.pt``, if it exists.
        progress: called with a label, the examples done, and the number of all examples.
        on_epoch: called after each epoch.
        tell: called with notes that the user should see at once.
        accelerator: an ``accelerate.Accelerator``; None to make one.

    Raises:
        BnpatchError: the settings don't fit the model or the data, training diverged, or the resume file
            is of another run.
    """
    settings = settings or FineTuneSettings()
    accelerator = accelerator or new_accelerator(settings, model.device)
    [(selection, held_out)] = parts_of(val_examples, None, holdout, settings.seed, needs_labels=True)
    before = evaluate(model, val_examples, indices=held_out) if accelerator.is_main_process else None
    training = train(
        model,
        RunExamples(train_examples, val_examples, selection=selection),
        settings,
        output=output,
        resume=resume,
        accelerator=accelerator,
        callbacks=Callbacks(progress, on_epoch, tell),
    )
    # The same seed gives the same split: the part that selected the epoch tunes alpha, the rest is unseen.
    # Training has just updated the running statistics, so only one alpha is searched for, and no lambda.
    tuning = tune_alpha(
        model,
        val_examples,
        metric=settings.metric,
        granularity="global",
        trials=trials,
        holdout=holdout,
        seed=settings.seed,
        progress=progress,
    )
    model.apply(tuning.recipe)
    if before is None:
        return FineTuneResult(training, tuning)
    return FineTuneResult(
        training, tuning, compare_scores(before, evaluate(model, val_examples, indices=held_out))
    )
