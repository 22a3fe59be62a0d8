"""The training loop."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError, NotEnoughMemoryError
from bnpatch.core.text import counted
from bnpatch.evaluation.evaluate import OutputsNotFiniteError, evaluate
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY, METRICS
from bnpatch.finetune.checkpoint import Epoch, load_state, save_state, write_history
from bnpatch.finetune.config import Callbacks, FineTuneSettings
from bnpatch.finetune.data import RunExamples, TrainingData, TrainingImages, check_same_classes
from bnpatch.finetune.engine import Engine, copied, new_accelerator
from bnpatch.finetune.moments import merge_processes, recalibrate
from bnpatch.finetune.workers import affordable
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.training_norm import convert_norms

_CALIBRATION_BATCHES = 32
_CHECK_EVERY = 50  # steps, because reading the loss waits for the device


class NotFiniteLossError(BnpatchError):
    """Training diverged."""


@dataclass
class FineTuned:
    """The result of training.

    Attributes:
        history: all epochs.
        best: the epoch whose weights the model has now.
        skipped: reasons by name of training example that can't be read.
        stopped_early: whether training stopped because the score no longer improved.
        notes: notes for the user.
    """

    history: list[Epoch]
    best: Epoch
    skipped: dict[str, str]
    stopped_early: bool
    notes: list[str]


def train(
    model: TorchModel,
    examples: RunExamples,
    settings: FineTuneSettings,
    *,
    output: Path | None = None,
    resume: bool = False,
    accelerator: Any = None,
    callbacks: Callbacks | None = None,
) -> FineTuned:
    """Train a model further, in place; it has the weights of its best epoch when this returns.

    Alphas and lambdas of the model are dropped first, because they were tuned for other parameters.

    The global random generators are seeded for each epoch from the seed and the epoch's number, so that a run
    that was killed and resumed gives exactly the same result as one that was not.

    Args:
        model: the model; its Batch Norm layers train as ``settings.spec`` says.
        examples: examples to train on, and to select the best epoch by.
        settings: settings of training.
        output: folder for ``last.pt``, ``best.pt`` and ``metrics.csv``; None to write nothing.
        resume: whether to continue from ``last.pt``, if it exists.
        accelerator: an ``accelerate.Accelerator``; None to make one for the model's device.
        callbacks: functions to call meanwhile.

    Raises:
        NotFiniteLossError: training diverged; ``best.pt`` has the best epoch before that.
        OutputsNotFiniteError: the model returned infinities or NaN before it was trained.
        BnpatchError: the settings don't fit the model or the data, or ``last.pt`` is of another run.
    """
    check_same_classes(examples.train, examples.val, model.class_names)
    callbacks, accelerator = callbacks or Callbacks(), accelerator or new_accelerator(settings, model.device)
    run = _Run(model, examples, settings, output, accelerator, callbacks)
    if resume and output is not None and (output / "last.pt").exists():
        run.load(load_state(output / "last.pt", run.identity))
    while run.epoch < settings.epochs and not run.is_stale():
        try:
            run.one_epoch()
        except RuntimeError as error:  # the memory is too small; halve_batch raises any other error again
            run.halve_batch(error)
            continue
        run.keep()
        callbacks.on_epoch(run.history[-1])
    return run.finish()


class _Run:
    """A run: its state between epochs, and the training of an epoch."""

    def __init__(
        self,
        model: TorchModel,
        examples: RunExamples,
        settings: FineTuneSettings,
        output: Path | None,
        accelerator: Any,
        callbacks: Callbacks,
    ) -> None:
        self.model, self.settings, self.output = model, settings, output
        self.accelerator, self.callbacks = accelerator, callbacks
        self.examples, self.val_examples = examples.train, examples.val
        subset, selection = examples.subset, examples.selection
        self.selection = np.arange(len(examples.val)) if selection is None else selection
        images = TrainingImages(self.examples, model.preprocessing, settings.augmentation)
        self.data = TrainingData(
            examples=self.examples,
            subset=np.arange(len(self.examples)) if subset is None else subset,
            images=images,
            seed=settings.seed,
            workers=0 if self.examples.in_memory else affordable(images, settings.workers),
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
        )
        self.micro, self.accumulate = settings.batch_size, settings.accumulate
        self.history: list[Epoch] = []
        self.best: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []
        per_step = self.micro * self.accumulate * self.accelerator.num_processes
        if len(self.data.subset) < per_step:
            raise BnpatchError(
                f"{counted(len(self.data.subset), 'training example')}, and a step takes {per_step}",
                "lower --batch-size",
            )
        self.identity = self._identity()
        model.set_state(model.baseline())
        model.device = self.accelerator.device
        model.adopt(convert_norms(model.module, settings.spec))
        if settings.spec.channels_per_group > 1:  # the checkpoint's running statistics don't fit
            batches = self.data.batches(0, self.micro)[:_CALIBRATION_BATCHES]
            recalibrate(model.module, (x.to(model.device) for x, _, _ in self.data.load(batches)))
        self.engine = Engine(model, settings, len(self.data.subset) // per_step, self.accelerator)
        self.state = self._snapshot()

    def _identity(self) -> dict[str, Any]:
        """Return what identifies the run, as plain values: a run goes on only from its own files."""
        data = {"train": self.examples.fingerprint(), "val": self.val_examples.fingerprint()}
        parts = (self.data.subset, self.selection)
        return {
            "model": self.model.name,
            "architecture": str(self.model.arch),
            "norms": self.model.fingerprints(),
            "data": data,
            "parts": [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in parts],
            "settings": self.settings.to_json(),
            "processes": self.accelerator.num_processes,
        }

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return len(self.history)

    def is_stale(self) -> bool:
        """Tell whether the score has not improved for ``patience`` epochs."""
        patience = self.settings.patience
        return patience is not None and bool(self.best) and self.epoch - self.best["epoch"] >= patience

    def one_epoch(self) -> None:
        """Train for one epoch, and score the model."""
        started = time.monotonic()
        loss = self._train()
        merge_processes(self.model.module, self.accelerator)
        try:
            scores = self._scores()
        except OutputsNotFiniteError:  # the last step broke the weights after the last loss
            if not self.best:
                self.engine.load(self.state)
                self._scores()  # raises if they were broken before training
            self._give_up()
        self.history.append(
            Epoch(
                epoch=self.epoch + 1,
                lr=self.engine.lr,
                batch_size=self.micro,
                train_loss=loss,
                accuracy=scores[ACCURACY.name],
                cross_entropy=scores[CROSS_ENTROPY.name],
                seconds=time.monotonic() - started,
            )
        )
        score, metric = scores[self.settings.metric], METRICS[self.settings.metric]
        if not self.best or metric.better(score, self.best["score"]):
            weights = copied(self.engine.scored.state_dict())
            self.best = {"epoch": self.epoch, "score": score, "model": weights}

    def _train(self) -> float:
        """Train for one pass over the training examples; return the mean loss."""
        batches = self.data.batches(self.epoch, self.micro, self.accumulate)
        self.data.seed_everything(self.epoch)
        self.engine.train()
        total, count = torch.zeros((), device=self.model.device), 0
        for index, (x, targets, problems) in enumerate(self.data.load(batches)):
            self.skipped |= {self.examples.source.name(i): problem for i, problem in problems.items()}
            is_last = (index + 1) % self.accumulate == 0
            total += self.engine.add_gradient(x, targets, self.accumulate, is_last) * len(x)
            count += len(x)
            if is_last:
                self.engine.step((self.epoch * len(batches) + index) // self.accumulate)
            if (index + 1) % _CHECK_EVERY == 0 or index + 1 == len(batches):
                self._check_finite(total)
            self._show(index + 1, len(batches))
        sums = self.engine.total(torch.stack([total, total.new_tensor(count)]))
        return float(sums[0] / sums[1])

    def _show(self, done: int, batches: int) -> None:
        epochs, size = self.settings.epochs, self.micro * self.accelerator.num_processes
        label = f"epoch {self.epoch + 1} of {epochs}"
        self.callbacks.progress(label, (self.epoch * batches + done) * size, epochs * batches * size)

    def _check_finite(self, total: Tensor) -> None:
        if not bool(torch.isfinite(self.engine.total(total))):
            self._give_up()

    def _give_up(self) -> NoReturn:
        """Restore the weights of the best epoch, and raise that training diverged."""
        kept = "no epoch was finished"
        if self.best:
            self._take_best()
            kept = f"the weights of epoch {self.best['epoch']} are kept"
            kept += f" in {self.output / 'best.pt'}" if self.output is not None else ""
        raise NotFiniteLossError(
            f"the loss is no longer a number in epoch {self.epoch + 1}; {kept}",
            "lower --lr, or set --clip-grad",
        )

    def _scores(self) -> dict[str, float]:
        """Compute mean scores over the validation examples; each process scores its share."""
        from accelerate.utils import gather_object

        mine = self.selection[self.accelerator.process_index :: self.accelerator.num_processes]
        metrics = (ACCURACY, CROSS_ENTROPY)
        scored = replace(self.model, module=self.engine.scored)
        part: Any
        try:
            scores = evaluate(scored, self.val_examples, metrics, indices=mine)
            part = len(scores), {name: v.sum() for name, v in scores.values.items()}
        except BnpatchError as error:
            part = error  # the other processes must not wait forever
        parts = gather_object([part])
        if errors := [p for p in parts if isinstance(p, BnpatchError)]:
            raise errors[0]
        total = sum(count for count, _ in parts)
        return {m.name: float(sum(sums[m.name] for _, sums in parts) / total) for m in metrics}

    def keep(self) -> None:
        """Keep the state after an epoch, in memory and on disk."""
        self.state = self._snapshot()
        if self.output is None or not self.accelerator.is_main_process:
            return
        if self.best["epoch"] == self.epoch:
            best = replace(self.model, module=self.engine.scored)
            best.save(self.output / "best.pt", best.recipe())
        write_history(self.history, self.output / "metrics.csv")
        save_state(self.output / "last.pt", self.identity, self.state)

    def _snapshot(self) -> dict[str, Any]:
        return {
            **self.engine.state(),
            "best": self.best,
            "history": [asdict(epoch) for epoch in self.history],
            "micro": self.micro,
            "accumulate": self.accumulate,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state at the end of an epoch."""
        self.engine.load(state)
        self.best = dict(state["best"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        self.micro, self.accumulate = state["micro"], state["accumulate"]
        self.state = dict(state)

    def halve_batch(self, error: RuntimeError) -> None:
        """Restart the epoch with half as many examples per batch and twice as many batches per step.

        Raises:
            RuntimeError: the error was not a lack of memory.
            BnpatchError: the batch can't be halved.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise error
        if self.micro % 2 or self.accelerator.num_processes > 1:
            raise NotEnoughMemoryError(self.model.device, self.micro) from error
        half = self.micro // 2
        self.settings.check_batch(half)
        self.load({**self.state, "micro": half, "accumulate": 2 * self.accumulate})
        clear_device_cache(garbage_collection=True)
        note = f"not enough memory for batches of {2 * half}: two of {half} take the place of one"
        if self.settings.spec.examples_per_group is None:
            note += "; the norms now pool over the smaller batch"
        self.notes.append(note)
        self.callbacks.tell(note)

    def _take_best(self) -> None:
        self.model.adopt(self.engine.release())
        self.model.module.load_state_dict(self.best["model"])
        self.model.module.eval()

    def finish(self) -> FineTuned:
        """Load the best weights into the model, and return the result."""
        self._take_best()
        best = self.history[self.best["epoch"] - 1]
        stopped = self.epoch < self.settings.epochs
        return FineTuned(self.history, best, self.skipped, stopped, self.notes)
