"""Options of ``bnpatch fine-tune``: which techniques, and how to train."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as opt

if TYPE_CHECKING:
    from bnpatch.data.dataset import Examples
    from bnpatch.finetune.config import FineTuneSettings
    from bnpatch.finetune.techniques import Choice
    from bnpatch.models.torch_model import TorchModel

_NORMS = "Techniques"
_TRAINING = "Training"


def _option(*names: str, panel: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


@dataclass(frozen=True)
class Techniques:
    """The options that say which of the paper's techniques to train with."""

    ghost_batch_size: Annotated[
        str,
        _option(help="Examples whose moments are pooled; auto, or 0 for the whole batch.", panel=_NORMS),
    ] = "auto"
    channels_per_group: Annotated[
        int | None,
        _option(min=1, help="Pool so many channels too (Batch/Group Norm). Default: as auto.", panel=_NORMS),
    ] = None
    norm_weight_decay: Annotated[
        str, _option(help="Decay of scales and shifts; auto, or a number.", panel=_NORMS)
    ] = "auto"
    norm_weight_decay_sites: Annotated[
        str, _option(help="reachable: where no later norm undoes it; or all.", panel=_NORMS)
    ] = "reachable"
    gamma_toward: Annotated[
        int, _option(min=0, max=1, help="Where scales decay to, 1 or 0.", panel=_NORMS)
    ] = 1
    decoupled: Annotated[
        bool,
        _option(
            "--decoupled", help="Decay scales and shifts as AdamW does, not as an L2 loss.", panel=_NORMS
        ),
    ] = False
    choose: Annotated[
        str, _option(help="What auto means: guidance (by batch size) or search (by trying).", panel=_NORMS)
    ] = "guidance"
    choose_trials: Annotated[int, _option(min=2, help="Short runs of the search.", panel=_NORMS)] = 12
    choose_epochs: Annotated[int, _option(min=1, help="Epochs of each of them.", panel=_NORMS)] = 3

    def settle(
        self,
        model: "TorchModel",
        examples: "Examples",
        settings: "FineTuneSettings",
        database: Path,
        resume: bool,
    ) -> "FineTuneSettings":
        """Settings with the techniques that are asked for, or chosen; says why."""
        from bnpatch.core.norm_spec import NormSpec
        from bnpatch.finetune.norm_decay import NormDecay
        from bnpatch.finetune.techniques import decayed_norms

        self._check()
        is_auto = self.ghost_batch_size == "auto" and self.channels_per_group is None
        if is_auto or self.norm_weight_decay == "auto":
            chosen = self._choose(model, examples, settings, database, resume)
            for reason in chosen.reasons:
                opt.say(f"               {reason}")
            settings = chosen.settings(settings)
        if not is_auto:
            ghost = None if self.ghost_batch_size == "auto" else int(self.ghost_batch_size)
            settings = replace(settings, spec=NormSpec(self.channels_per_group or 1, ghost or None))
        rate = None if self.norm_weight_decay == "auto" else float(self.norm_weight_decay)
        decay = settings.norm_decay if rate is None else NormDecay(rate, norm_layers=decayed_norms(model))
        if decay is not None:
            norm_layers = "all" if self.norm_weight_decay_sites == "all" else decay.norm_layers
            decay = replace(
                decay,
                norm_layers=norm_layers,
                gamma_toward=float(self.gamma_toward),
                coupled=not self.decoupled,
            )
        return replace(settings, norm_decay=decay)

    def _check(self) -> None:
        from bnpatch.core.errors import BnpatchError

        for name, value in (
            ("ghost-batch-size", self.ghost_batch_size),
            ("norm-weight-decay", self.norm_weight_decay),
        ):
            number = int if name.startswith("ghost") else float
            try:
                is_number = value == "auto" or number(value) >= 0
            except ValueError:
                is_number = False
            if not is_number:
                raise BnpatchError(f"--{name} {value!r} is neither auto nor a number", "give one of these")
        if self.norm_weight_decay_sites not in ("reachable", "all"):
            raise BnpatchError(
                f"--norm-weight-decay-sites {self.norm_weight_decay_sites!r}", "choose reachable or all"
            )
        if self.choose not in ("guidance", "search"):
            raise BnpatchError(f"--choose {self.choose!r}", "choose guidance or search")

    def _choose(
        self,
        model: "TorchModel",
        examples: "Examples",
        settings: "FineTuneSettings",
        database: Path,
        resume: bool,
    ) -> "Choice":
        from bnpatch.finetune.techniques import by_guidance, by_search

        from .render import progress_bar

        if self.choose == "guidance":
            return by_guidance(model, settings)
        with progress_bar() as progress:

            def show(name: str, score: float | None) -> None:
                opt.say(f"tried          {name}: {'given up' if score is None else f'{score:.4f}'}")

            return by_search(
                model,
                examples,
                settings,
                trials=self.choose_trials,
                epochs=self.choose_epochs,
                database=database,
                resume=resume,
                on_trial=show,
                progress=progress,
            )


@dataclass(frozen=True)
class Training:
    """How to train."""

    epochs: Annotated[int, _option(min=1, help="Passes over the images.", panel=_TRAINING)] = 10
    lr: Annotated[float, _option(help="Learning rate at its top.", panel=_TRAINING)] = 0.01
    optimizer: Annotated[str, _option(help="Name of timm's: sgd, adamw, lamb.", panel=_TRAINING)] = "sgd"
    momentum: Annotated[float, _option(panel=_TRAINING)] = 0.9
    weight_decay: Annotated[float, _option(min=0, help="Of the other weights.", panel=_TRAINING)] = 1e-4
    schedule: Annotated[str, _option(help="cosine, tanh, step, poly.", panel=_TRAINING)] = "cosine"
    warmup_epochs: Annotated[int, _option(min=0, panel=_TRAINING)] = 0
    accumulate: Annotated[int, _option(min=1, help="Batches per step.", panel=_TRAINING)] = 1
    clip_grad: Annotated[float | None, _option(min=0, help="Largest norm of it.", panel=_TRAINING)] = None
    smoothing: Annotated[float, _option(min=0, max=1, help="Of labels.", panel=_TRAINING)] = 0.0
    ema: Annotated[
        float | None, _option(min=0, max=1, help="Average the weights, decaying so.", panel=_TRAINING)
    ] = None
    patience: Annotated[
        int | None, _option(min=1, help="Stop after so many epochs without a better score.", panel=_TRAINING)
    ] = None
    precision: Annotated[str, _option(help="no, fp16 or bf16.", panel=_TRAINING)] = "no"
    min_scale: Annotated[
        float, _option(help="Smallest part of an image that a crop keeps; 1: no crop.", panel=_TRAINING)
    ] = 0.35
    hflip: Annotated[float, _option(min=0, max=1, help="Flip with this probability.", panel=_TRAINING)] = 0.5
    auto_augment: Annotated[
        str | None, _option(help="timm's policy, as rand-m9-mstd0.5.", panel=_TRAINING)
    ] = None
    random_erasing: Annotated[float, _option(min=0, max=1, panel=_TRAINING)] = 0.0
    mixup: Annotated[float, _option(min=0, panel=_TRAINING)] = 0.0
    cutmix: Annotated[float, _option(min=0, panel=_TRAINING)] = 0.0

    def settings(
        self, metric: str, batch_size: int, workers: int | None, seed: int, num_examples: int
    ) -> "FineTuneSettings":
        """The library's settings, without techniques."""
        if workers is None:  # starting a process costs as much as decoding a few hundred images
            workers = min(8, os.cpu_count() or 1, num_examples // 1024)
        from bnpatch.finetune.config import Augmentation, FineTuneSettings

        images = ("min_scale", "hflip", "auto_augment", "random_erasing", "mixup", "cutmix")
        values = dict(vars(self))
        augmentation = Augmentation(**{name: values.pop(name) for name in images})
        return FineTuneSettings(
            **values,
            augmentation=augmentation,
            metric=metric,
            batch_size=batch_size,
            workers=workers,
            seed=seed,
        )
