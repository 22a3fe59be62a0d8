"""Errors that a user can act on."""

# Of another library's message.
_LONGEST = 300


class BnpatchError(Exception):
    """Something is wrong with the user's input, and the user can put it right.

    Args:
        problem: what is wrong, naming the file, the norm layer or the option.
        remedy: what to do about it.
    """

    #: What the command line exits with: 2 for bad input, 1 where a check that was asked for failed.
    exit_code = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.problem.rstrip('.')}; {self.remedy}" if self.remedy else self.problem
        return " ".join(text.split())  # one line, whatever was quoted in it


class NotEnoughMemoryError(BnpatchError):
    """A batch does not fit into the memory of a device.

    Args:
        device: which.
        batch_size: examples in the batch.
    """

    def __init__(self, device: object, batch_size: int) -> None:
        super().__init__(f"{device} has not enough memory for a batch of {batch_size}", "lower --batch-size")


class InvalidAlphaError(BnpatchError, ValueError):
    """A weight outside [0, 1]."""


def check_alpha(alpha: float, where: str = "", name: str = "alpha") -> float:
    """Return ``alpha``, or raise InvalidAlphaError where it is not in [0, 1].

    Args:
        alpha: the weight.
        where: the norm layer that it is for.
        name: what the weight is called.
    """
    if not 0 <= alpha <= 1:
        place = f" at {where!r}" if where else ""
        raise InvalidAlphaError(f"{name} = {alpha}{place} is not a weight", "it must lie in [0, 1]")
    return alpha


class BnpatchWarning(UserWarning):
    """Something looks wrong, but the work can go on."""


def root_cause(error: BaseException) -> BaseException:
    """The error that another library wrapped in its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type where it says nothing in words."""
    line = next(iter(str(error).strip().splitlines()), "")
    if not any(map(str.isalpha, line)):
        return type(error).__name__
    if len(line) <= _LONGEST:
        return line
    end = line.rfind(" ", _LONGEST // 2, _LONGEST)  # between words, unless one is too long for that
    return f"{line[: end if end > 0 else _LONGEST]} ..."
