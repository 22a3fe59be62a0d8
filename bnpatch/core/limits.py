"""Limits on what a file may ask of the machine, so that no file fills the memory or runs without end.

A file of a kilobyte can ask for a terabyte. Every limit lies far above what models and data sets need, and an
environment variable sets each; docs/performance.md has the table.
"""

import os
from dataclasses import dataclass

from bnpatch.core.errors import BnpatchError


@dataclass(frozen=True)
class Limit:
    """A limit that an environment variable sets.

        MEGAPIXELS.check(144.0, "a.png has 144 megapixels")

    Attributes:
        name: the environment variable.
        default: the limit if the variable is not set.
    """

    name: str
    default: float

    @property
    def value(self) -> float:
        """The limit in effect.

        Raises:
            BnpatchError: the variable is set, and is not a positive number.
        """
        text = os.environ.get(self.name)
        try:
            value = self.default if text is None else float(text)
        except ValueError:  # no number, which is refused below as a negative one is
            value = -1
        if not value > 0:
            raise BnpatchError(f"the environment variable {self.name} is {text!r}", "set a positive number")
        return value

    def check(self, amount: float, problem: str) -> None:
        """Raise an error if ``amount`` is above the limit.

        Args:
            amount: what is asked for, in the unit of the limit.
            problem: what asks for how much, as a sentence without the full stop.

        Raises:
            BnpatchError: the amount is above the limit.
        """
        if amount > self.value:
            raise BnpatchError(
                f"{problem}, and the limit is {self.value:,.12g}",
                f"if you trust the file, set the environment variable {self.name} to a higher number",
            )


UNPACKED_MB = Limit("BNPATCH_MAX_UNPACKED_MB", 500)  #: by how much a file may grow when it is unpacked
MEGAPIXELS = Limit("BNPATCH_MAX_MEGAPIXELS", 178)  #: of an image
TEXT_MB = Limit("BNPATCH_MAX_TEXT_MB", 20)  #: of a recipe, a class map or a configuration
CLASSES = Limit("BNPATCH_MAX_CLASSES", 200_000)  #: in a class map
NODES = Limit("BNPATCH_MAX_NODES", 10_000)  #: of an ONNX graph
VALUES = Limit("BNPATCH_MAX_VALUES", 1 << 28)  #: numbers in one value of an ONNX graph
SECONDS = Limit("BNPATCH_MAX_SECONDS", 5)  #: per example, in a graph with loops
