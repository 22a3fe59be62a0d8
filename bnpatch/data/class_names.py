"""Match the names that data has for its classes with the outputs of a model."""

import re
from collections.abc import Callable, Sequence

from bnpatch.core.errors import BnpatchError
from bnpatch.data.class_maps import SYNSET, composed

#: The remedy where names leave the order of the classes open.
SAY_WHICH = "say which is which with --class-map FILE: the folders, one a line, in the order of the outputs"

_BACKGROUND = 1  # TensorFlow's models of ImageNet have an output for the background, before the others


def outputs_by_name(
    names: Sequence[str], num_outputs: int, class_names: Sequence[str] | None
) -> dict[str, int]:
    """Return the outputs of the names that are certainly classes of the model.

    Names are compared as they are. Where that leaves some without a class, they are compared without regard
    to case and to what is between words, and a class such as "tench, Tinca tinca" may go by its first name.

    Args:
        names: what the data calls its classes.
        num_outputs: K, the number of outputs.
        class_names: names of the outputs, if they are known.

    Returns:
        The outputs by name. Names that no output has, or several outputs have, are missing.
    """
    if not class_names or len(class_names) != num_outputs:
        return {}
    known: dict[str, int] = {}
    for key, key_of_class in ((composed, composed), (_plain, _plain), (_plain, _first)):
        alike = _by_key(class_names, key_of_class)
        found = {name: alike.get(key(name), []) for name in names if name not in known}
        more = {name: outputs[0] for name, outputs in found.items() if len(outputs) == 1}
        if key is composed or len({*known.values(), *more.values()}) == len(known) + len(more):
            known |= more
    return {name: known[name] for name in names if name in known}


def check_names(names: Sequence[str], class_names: Sequence[str]) -> None:
    """Check that no name is that of several outputs.

    Raises:
        BnpatchError: one is, such as "crane" among ImageNet's classes, a bird and a machine.
    """
    outputs = _by_key(class_names, composed)
    for name in names:
        if len(several := outputs.get(composed(name), [])) > 1:
            raise BnpatchError(f"{name!r} is the name of outputs {several[0]} and {several[1]}", SAY_WHICH)


def outputs_by_synset(names: Sequence[str], num_outputs: int) -> dict[str, int] | None:
    """Return the outputs of ImageNet's synsets (n01440764), as far as the model has them.

    The result is None if a name is no synset, or if no set of ImageNet's classes has so many outputs.
    """
    if not names or not all(SYNSET.fullmatch(name) for name in names):
        return None
    from timm.data import ImageNetInfo, infer_imagenet_subset

    for before in (0, _BACKGROUND):
        if (subset := infer_imagenet_subset({"num_classes": num_outputs - before})) is not None:
            synsets = {name: index for index, name in enumerate(ImageNetInfo(subset).label_names(), before)}
            return {name: synsets[name] for name in names if name in synsets}
    return None


def _by_key(class_names: Sequence[str], key: Callable[[str], str]) -> dict[str, list[int]]:
    """Return the outputs by a key of their names."""
    outputs: dict[str, list[int]] = {}
    for index, name in enumerate(class_names):
        outputs.setdefault(key(name), []).append(index)
    return outputs


def _plain(name: str) -> str:
    """Return a name in lower case, with one space between words."""
    return " ".join(re.split(r"[\s_-]+", composed(name).casefold().strip("_- \t")))


def _first(name: str) -> str:
    """Return the first of several names of a class."""
    return _plain(name.split(",")[0])
