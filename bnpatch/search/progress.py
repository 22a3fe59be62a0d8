"""What a search has done and may still do: the progress for the user, and the budget of one search."""

import time
from collections.abc import Callable


class Progress:
    """Counts examples against an estimated total."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self._show = show
        self._done, self._total, self._label = 0, 0, ""

    def expect(self, examples: float) -> None:
        """Add to the estimated total; a negative number takes back what is not going to be done."""
        self._total += int(examples)

    def count(self, label: str, examples: int) -> None:
        """Add to the examples that are done, and show the progress."""
        self._label = label
        self._done += examples
        self._show(label, self._done, max(self._done, self._total))

    def finish(self) -> None:
        """Show that everything is done."""
        self._show(self._label, self._done, self._done)


class Budget:
    """The time that a search may use, and the examples that it has scored.

    Attributes:
        spent: number of examples scored so far, weighted by cost.
    """

    def __init__(
        self, timeout: float | None, count: Callable[[str, int], None] = lambda label, examples: None
    ) -> None:
        """Start the clock.

        Args:
            timeout: seconds after which nothing new is started; None for no limit.
            count: called with a label and the number of examples whenever some were scored.
        """
        self._timeout, self._count, self._started = timeout, count, time.monotonic()
        self.spent = 0.0

    def spend(self, label: str, examples: int, cost: float = 1.0) -> None:
        """Count examples; ``cost`` is that of one of them, in evaluations of an example."""
        self.spent += cost * examples
        self._count(label, examples)

    def seconds_left(self) -> float | None:
        """Seconds left; None where there is no limit."""
        if self._timeout is None:
            return None
        return max(0.0, self._timeout - (time.monotonic() - self._started))

    def is_over(self) -> bool:
        """Tell whether there is no time left."""
        return self.seconds_left() == 0
