"""What a search has done and may still do: the progress for the user, and the budget of one search."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Counts work against an estimate of all work, in scorings of one example; a learning step counts more.

    The estimate is made in parts. When a part is over, the work that it took replaces its estimate:

        >>> progress = Progress(print)
        >>> progress.expect(300)
        >>> with progress.part(200):
        ...     progress.count("learning", 100)
        learning 100 300
        >>> progress.count("held-out evaluation", 50)
        held-out evaluation 150 200

    """

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        """Start at nothing; ``show`` is called with a label, the work done, and an estimate of all work."""
        self._show = show
        self._done, self._total, self._label = 0.0, 0.0, ""

    def expect(self, examples: float) -> None:
        """Add to the estimate of all work; a negative number takes back what is not going to be done."""
        self._total += examples

    @contextmanager
    def part(self, expected: float) -> Iterator[None]:
        """Replace ``expected``, a part of the estimate, by the work that is counted in this context."""
        before = self._done
        try:
            yield
        finally:
            self._total += self._done - before - expected

    def count(self, label: str, examples: float) -> None:
        """Add to the work that is done, and show the progress if there is an estimate of all work."""
        self._label = label
        self._done += examples
        if self._total:
            self._show(label, round(self._done), round(max(self._done, self._total)))

    def finish(self) -> None:
        """Show that everything is done."""
        self._show(self._label, round(self._done), round(self._done))


class Budget:
    """The time that a search may use, and the examples that it has scored.

    Attributes:
        spent: number of examples scored so far, weighted by cost.
    """

    def __init__(
        self, timeout: float | None, count: Callable[[str, float], None] = lambda label, examples: None
    ) -> None:
        """Start the clock.

        Args:
            timeout: seconds after which nothing new is started; None for no limit.
            count: called with a label and the number of examples whenever some were scored, weighted by cost.
        """
        self._timeout, self._count, self._started = timeout, count, time.monotonic()
        self.spent = 0.0

    def spend(self, label: str, examples: int, cost: float = 1.0) -> None:
        """Count examples; ``cost`` is that of one of them, in evaluations of an example."""
        self.spent += cost * examples
        self._count(label, cost * examples)

    def seconds_left(self) -> float | None:
        """Seconds left; None where there is no limit."""
        if self._timeout is None:
            return None
        return max(0.0, self._timeout - (time.monotonic() - self._started))

    def is_over(self) -> bool:
        """Tell whether there is no time left."""
        return self.seconds_left() == 0
