"""Settings of a fine-tuning run."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bnpatch.core.errors import BnpatchError
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.text import counted
from bnpatch.evaluation.metrics import ACCURACY, CROSS_ENTROPY
from bnpatch.finetune.norm_decay import NormDecay

if TYPE_CHECKING:
    from bnpatch.finetune.checkpoint import Epoch

_PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of training images, by timm's transforms.

    Attributes:
        min_scale: smallest fraction of the image's area that a random crop keeps; 1 for no random crop.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy string, such as ``rand-m9-mstd0.5`` or ``augmix``.
        random_erasing: probability of erasing a rectangle.
        mixup: timm's mixup alpha; 0 is off.
        cutmix: timm's cutmix alpha; 0 is off.
    """

    min_scale: float = 0.35
    hflip: float = 0.5
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise BnpatchError(
                f"a crop can't keep {self.min_scale} of an image", "give more than 0, at most 1"
            )


@dataclass(frozen=True)
class FineTuneSettings:
    """Settings of training.

    Attributes:
        spec: which values the norms pool in training; Batch Norm by default.
        norm_decay: decay of scales and shifts, or None.
        epochs: passes over the training examples.
        batch_size: examples per process and forward pass.
        accumulate: forward passes per optimizer step.
        lr: maximum learning rate of the schedule.
        optimizer: timm's name of an optimizer.
        momentum: momentum, for optimizers that have one.
        weight_decay: weight decay of kernels and matrices, by the optimizer itself.
        schedule: timm's name of a schedule that needs no score: cosine, tanh, step, poly.
        warmup_epochs: epochs at the start over which the learning rate grows.
        clip_grad: maximum norm of the gradient, or None.
        smoothing: label smoothing.
        ema: decay of averaged weights, which are then evaluated and kept; None for none.
        patience: epochs without a better score after which training stops; None for never.
        metric: the validation score by which the best epoch is chosen, accuracy or cross-entropy.
        precision: no, fp16 or bf16.
        augmentation: augmentation of the training images.
        workers: number of processes that decode training images.
        seed: seed of all random choices.
    """

    spec: NormSpec = field(default_factory=NormSpec)
    norm_decay: NormDecay | None = None
    epochs: int = 10
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 0.01
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    warmup_epochs: int = 0
    clip_grad: float | None = None
    smoothing: float = 0.0
    ema: float | None = None
    patience: int | None = None
    metric: str = "accuracy"
    precision: str = "no"
    augmentation: Augmentation = field(default_factory=Augmentation)
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise BnpatchError(f"{name} is {getattr(self, name)}", "give 1 or more")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BnpatchError(f"a learning rate of {self.lr} is none", "give a positive --lr")
        if self.metric not in (known := (ACCURACY.name, CROSS_ENTROPY.name)):
            raise BnpatchError(
                f"there is no metric {self.metric!r} to train by", f"choose {' or '.join(known)}"
            )
        if self.precision not in _PRECISIONS:
            raise BnpatchError(
                f"there is no precision {self.precision!r}", f"choose {', '.join(_PRECISIONS)}"
            )
        if self.schedule == "plateau":
            raise BnpatchError("the schedule plateau can't be resumed", "choose cosine, tanh, step or poly")
        self.check_batch(self.batch_size)
        if self.batch_size % 2 and (self.augmentation.mixup or self.augmentation.cutmix):
            raise BnpatchError(
                f"mixup and cutmix pair images, {self.batch_size} is odd", "give an even batch"
            )

    def check_batch(self, batch_size: int) -> None:
        """Check that a group of examples fits into a batch.

        Raises:
            BnpatchError: the group is larger than the batch.
        """
        group = self.spec.examples_per_group
        if group is not None and batch_size < group:
            raise BnpatchError(
                f"a batch of {batch_size} has no group of {counted(group, 'example')}",
                "give a larger --batch-size or a smaller --ghost-batch-size",
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        decay = self.norm_decay
        if decay is not None and decay.norm_layers != "all":
            values["norm_decay"]["norm_layers"] = sorted(decay.norm_layers)
        if decay is not None:  # the key in files since the first version
            values["norm_decay"]["sites"] = values["norm_decay"].pop("norm_layers")
        return values


@dataclass(frozen=True)
class Callbacks:
    """Functions that training calls while it lasts.

    Attributes:
        progress: called with a label, the examples done, and the number of all examples.
        on_epoch: called after each epoch.
        tell: called with notes that the user should see at once.
    """

    progress: Callable[[str, int, int], None] = lambda label, done, total: None
    on_epoch: "Callable[[Epoch], None]" = lambda epoch: None
    tell: Callable[[str], None] = lambda note: None
