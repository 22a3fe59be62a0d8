"""Errors that a user can act on."""


class BnpatchError(Exception):
    """Something is wrong with the user's input, and the user can put it right.

    Args:
        problem: what is wrong, naming the file, the site or the option.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.problem}; {self.remedy}" if self.remedy else self.problem
        return " ".join(text.split())  # one line, whatever was quoted in it


class InvalidAlphaError(BnpatchError, ValueError):
    """A weight outside [0, 1]."""


class BnpatchWarning(UserWarning):
    """Something looks wrong, but the work can go on."""
