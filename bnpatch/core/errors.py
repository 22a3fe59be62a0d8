"""Errors that a user can act on."""

from collections.abc import Mapping

# The most characters that an error quotes from another library's message.
_LONGEST = 300

#: The least and the greatest value of each number that a norm layer has in a patch.
RANGES: Mapping[str, tuple[int, int]] = {
    "alpha": (0, 1),
    "lambda": (0, 1),
    "slope": (-4, 4),
    "var_offset": (-8, 8),
}


class BnpatchError(Exception):
    """The user's input is wrong, and the user can correct it.

    ``str(error)`` is one line: the problem, a semicolon, the remedy. ``except bnpatch.BnpatchError`` catches
    all errors that a user's input is meant to cause; any other error is a defect or wrong use of a function.

    Args:
        problem: what is wrong; it names the file, the norm layer or the option.
        remedy: what the user can do about it.
    """

    #: Exit status of the command line: 2 for bad input, 1 if a check that the user asked for failed.
    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.problem.rstrip('.')}; {self.remedy}" if self.remedy else self.problem
        return " ".join(text.split())  # one line, whatever was quoted in it


_FEW = 3


class NotEnoughMemoryError(BnpatchError):
    """A batch does not fit into the memory of a device.

    Args:
        device: the device that ran out of memory.
        batch_size: number of examples in the batch.
    """

    def __init__(self, device: object, batch_size: int) -> None:
        remedy = "lower --batch-size"
        if batch_size <= _FEW:  # a model is probed with so many, whatever --batch-size
            elsewhere = "" if str(device) == "cpu" else "choose --device cpu, or "
            remedy = f"{elsewhere}set a smaller --img-size"
        super().__init__(f"{device} has not enough memory for a batch of {batch_size}", remedy)


class InvalidWeightError(BnpatchError, ValueError):
    """A number of a norm layer lies outside its range in :data:`RANGES`."""


def check_weight(kind: str, value: float, where: str = "") -> float:
    """Return ``value``, or raise InvalidWeightError if it is not in its range.

    Args:
        kind: what it is, a key of :data:`RANGES`.
        value: the number.
        where: name of the norm layer that it is for, for the message.
    """
    least, most = RANGES[kind]
    if not least <= value <= most:
        place = f" at {where!r}" if where else ""
        raise InvalidWeightError(
            f"{kind} = {value}{place} is out of range", f"it must lie in [{least}, {most}]"
        )
    return value


class BnpatchWarning(UserWarning):
    """The input looks wrong, but bnpatch can go on with it."""


def root_cause(error: BaseException) -> BaseException:
    """Return the error at the start of the chain of causes: the one that another library wrapped."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its type if that line has no letters."""
    line = next(iter(str(error).strip().splitlines()), "")
    if not any(map(str.isalpha, line)):
        return type(error).__name__
    if len(line) <= _LONGEST:
        return line
    end = line.rfind(" ", _LONGEST // 2, _LONGEST)  # cut between words, unless a word is too long for that
    return f"{line[: end if end > 0 else _LONGEST]} ..."
