"""The techniques to train with, as chosen by the paper's guidance for a model and a batch size."""

from dataclasses import dataclass, replace

import torch

from bnpatch.core.norm_spec import NormSpec
from bnpatch.finetune.config import FineTuneSettings
from bnpatch.finetune.guidance import techniques
from bnpatch.finetune.norm_decay import NormDecay
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.tracing import unnormalized_norms

#: Channels per group of Batch/Group Norm, by default.
CHANNELS_PER_GROUP = 16
_GHOST = 16  # examples per group; near the best of the paper's Fig. 3


@dataclass(frozen=True)
class Choice:
    """Techniques to train with, and the reasons.

    Attributes:
        spec: which values the norms pool.
        norm_decay: decay of scales and shifts, or None.
        reasons: one line per technique, as text for users.
    """

    spec: NormSpec
    norm_decay: NormDecay | None
    reasons: tuple[str, ...]

    def settings(self, settings: FineTuneSettings) -> FineTuneSettings:
        """Return the settings with these techniques."""
        return replace(settings, spec=self.spec, norm_decay=self.norm_decay)


def decayed_norms(model: TorchModel) -> frozenset[str]:
    """Name the norm layers where decay has an effect, because no other norm follows on some path."""
    example = torch.zeros(1, *model.preprocessing.input_size, device=model.device)
    return unnormalized_norms(model.module, example)


def ghost_of(batch_size: int) -> NormSpec:
    """Choose a Ghost Batch Norm for batches of two examples or more."""
    return NormSpec.ghost(max(2, min(_GHOST, batch_size // 2)))


def by_guidance(model: TorchModel, settings: FineTuneSettings) -> Choice:
    """Choose techniques by the paper's guidance; scales and shifts decay at the rate of the weight decay."""
    norm_layers, batch_size = decayed_norms(model), settings.batch_size
    judged = techniques(batch_size, len(model.inventory().norm_layers), len(norm_layers))
    fits = {technique.name: technique.fits == "yes" for technique in judged}
    spec = NormSpec.batch()
    if fits["Ghost Batch Norm"]:
        spec = ghost_of(batch_size)
    elif fits["Batch/Group Norm"]:
        spec = NormSpec.batch_group(CHANNELS_PER_GROUP)
    decay = None
    if fits["weight decay on scales and shifts"] and settings.weight_decay:
        decay = NormDecay(settings.weight_decay, norm_layers=norm_layers)
    reasons = tuple(f"{t.name}: {t.fits}; {t.reason}" for t in judged)
    return Choice(spec, decay, reasons)
