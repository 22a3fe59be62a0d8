"""Options of ``bnpatch fine-tune``: what for, with which techniques, and how to train."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnpatch.core.errors import BnpatchError

from .console import say
from .options import panel

if TYPE_CHECKING:
    from bnpatch.data.dataset import Examples
    from bnpatch.finetune.config import FineTuneSettings
    from bnpatch.finetune.techniques import Choice
    from bnpatch.models.torch_model import TorchModel

_norms, _training = panel("Techniques"), panel("Training")


@dataclass(frozen=True)
class Run:
    """What a run is for, and how it is judged."""

    metric: Annotated[str, typer.Option(help="accuracy or cross-entropy.")] = "accuracy"
    new_head: Annotated[
        bool, typer.Option("--new-head", help="Give the model a new classifier for the classes of --data.")
    ] = False
    trials: Annotated[int, typer.Option(min=1, help="Weights of the example to try afterwards.")] = 15
    holdout: Annotated[
        float, typer.Option(help="Part of --val that gives the verdict, unseen by everything.")
    ] = 0.5
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the last run was cut off.")] = False
    seeds: Annotated[
        int, typer.Option(min=0, help="Compare the techniques one by one over so many seeds; 0: don't.")
    ] = 0


@dataclass(frozen=True)
class Techniques:
    """The options that say which of the paper's techniques to train with."""

    ghost_batch_size: Annotated[
        str,
        _norms(help="Examples whose moments are pooled; auto, or 0 for the whole batch."),
    ] = "auto"
    channels_per_group: Annotated[
        int | None,
        _norms(min=1, help="Pool so many channels too (Batch/Group Norm). Default: as auto."),
    ] = None
    norm_weight_decay: Annotated[str, _norms(help="Decay of scales and shifts; auto, or a number.")] = "auto"
    norm_weight_decay_sites: Annotated[
        str, _norms(help="reachable: where no later norm undoes it; or all.")
    ] = "reachable"
    gamma_toward: Annotated[int, _norms(min=0, max=1, help="Where scales decay to, 1 or 0.")] = 1
    decoupled: Annotated[
        bool,
        _norms("--decoupled", help="Decay scales and shifts as AdamW does, not as an L2 loss."),
    ] = False
    choose: Annotated[
        str, _norms(help="What auto means: guidance (by batch size) or search (by trying).")
    ] = "guidance"
    choose_trials: Annotated[int, _norms(min=2, help="Short runs of the search.")] = 12
    choose_epochs: Annotated[int, _norms(min=1, help="Epochs of each of them.")] = 3

    def settle(
        self,
        model: "TorchModel",
        examples: "Examples",
        settings: "FineTuneSettings",
        database: Path,
        resume: bool,
    ) -> "FineTuneSettings":
        """Return settings with the techniques that are asked for, or chosen; say why."""
        from bnpatch.core.norm_spec import NormSpec
        from bnpatch.finetune.norm_decay import NormDecay
        from bnpatch.finetune.techniques import decayed_norms

        self._check()
        is_auto = self.ghost_batch_size == "auto" and self.channels_per_group is None
        if is_auto or self.norm_weight_decay == "auto":
            chosen = self._choose(model, examples, settings, database, resume)
            for reason in chosen.reasons:
                say(f"               {reason}")
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
        for name, value, number in (
            ("ghost-batch-size", self.ghost_batch_size, int),
            ("norm-weight-decay", self.norm_weight_decay, float),
        ):
            try:
                is_number = value == "auto" or number(value) >= 0
            except ValueError:  # the text is no number
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
        from bnpatch.finetune.config import Callbacks
        from bnpatch.finetune.technique_search import by_search
        from bnpatch.finetune.techniques import by_guidance

        from .render import progress_bar

        if self.choose == "guidance":
            return by_guidance(model, settings)
        with progress_bar() as progress:
            return by_search(
                model,
                examples,
                settings,
                trials=self.choose_trials,
                epochs=self.choose_epochs,
                database=database,
                resume=resume,
                callbacks=Callbacks(progress=progress, tell=say),
            )


@dataclass(frozen=True)
class Training:
    """How to train."""

    epochs: Annotated[int, _training(min=1, help="Passes over the images.")] = 10
    lr: Annotated[float, _training(help="Learning rate at its top.")] = 0.01
    optimizer: Annotated[str, _training(help="Name of timm's: sgd, adamw, lamb.")] = "sgd"
    momentum: Annotated[float, _training()] = 0.9
    weight_decay: Annotated[float, _training(min=0, help="Of the other weights.")] = 1e-4
    schedule: Annotated[str, _training(help="cosine, tanh, step, poly.")] = "cosine"
    warmup_epochs: Annotated[int, _training(min=0)] = 0
    accumulate: Annotated[int, _training(min=1, help="Batches per step.")] = 1
    clip_grad: Annotated[float | None, _training(min=0, help="Largest norm of it.")] = None
    smoothing: Annotated[float, _training(min=0, max=1, help="Of labels.")] = 0.0
    ema: Annotated[float | None, _training(min=0, max=1, help="Average the weights, decaying so.")] = None
    patience: Annotated[
        int | None, _training(min=1, help="Stop after so many epochs without a better score.")
    ] = None
    precision: Annotated[str, _training(help="no, fp16 or bf16.")] = "no"
    min_scale: Annotated[
        float, _training(help="Smallest part of an image that a crop keeps; 1: no crop.")
    ] = 0.35
    hflip: Annotated[float, _training(min=0, max=1, help="Flip with this probability.")] = 0.5
    auto_augment: Annotated[str | None, _training(help="timm's policy, as rand-m9-mstd0.5.")] = None
    random_erasing: Annotated[float, _training(min=0, max=1)] = 0.0
    mixup: Annotated[float, _training(min=0)] = 0.0
    cutmix: Annotated[float, _training(min=0)] = 0.0

    def settings(
        self, metric: str, batch_size: int, workers: int | None, seed: int, num_examples: int
    ) -> "FineTuneSettings":
        """Return the library's settings, without techniques."""
        from bnpatch.finetune.config import Augmentation, FineTuneSettings

        if workers is None:  # starting a process costs as much as decoding a few hundred images
            workers = min(8, os.cpu_count() or 1, num_examples // 1024)
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
