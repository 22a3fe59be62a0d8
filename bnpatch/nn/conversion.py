"""Turn the Batch Norm layers of a model into other members of the family, to train it further."""

from collections.abc import Callable

from torch import nn

from bnpatch.errors import BnpatchError
from bnpatch.nn.norm import ExampleWeighedNorm
from bnpatch.nn.surgery import Site, patch, survey, swap
from bnpatch.nn.training_norm import GeneralNorm
from bnpatch.spec import NormSpec


def convert_norms(
    model: nn.Module, spec: NormSpec, *, where: Callable[[Site], bool] = lambda site: True
) -> nn.Module:
    """Let the Batch Norm layers of a model train as ``spec`` says, in place; scale and shift are kept.

    Layers that are frozen, or that keep no running moments (Group Norm), stay as they are. Where ``spec``
    pools channels, the activations change: the running moments should be taken anew
    (:func:`bnpatch.finetune.moments.recalibrate`).

    Args:
        model: any module; it may be patched already.
        spec: for every site, fitted to its channels by :meth:`NormSpec.for_channels`.
        where: which sites to convert.

    Returns:
        The model; another object only where the model itself is a norm.

    Raises:
        BnpatchError: there is no site, or all of them stay as they are.
    """
    model = patch(model, where=where)
    swaps: dict[int, nn.Module] = {}
    for site in survey(model).sites:
        layer = site.module
        if not (where(site) and isinstance(layer, ExampleWeighedNorm)) or layer.always_inference:
            continue
        if site.parameters()[2] is not None:
            swaps[id(layer)] = GeneralNorm.of(layer, spec.for_channels(site.num_channels))
    if not swaps:
        raise BnpatchError(
            "the model's norms are all frozen or keep no running moments: training would not change them",
            "take a checkpoint with ordinary Batch Norm",
        )
    return swap(model, swaps)
