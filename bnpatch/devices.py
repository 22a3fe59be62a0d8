"""Where models compute."""

import os

import torch

from bnpatch.errors import BnpatchError


def pick_device(name: str = "auto") -> torch.device:
    """Resolve a device name; "auto" is the accelerator if there is one.

    Raises:
        BnpatchError: no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None and (rank := os.environ.get("LOCAL_RANK")):
            return torch.device(accelerator.type, int(rank))  # one of several processes, each with its own
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BnpatchError(
            f"there is no device {name!r} here", "leave out --device to have one chosen"
        ) from error
    return device
