"""Progress of a search, counted in examples."""

from collections.abc import Callable


class Progress:
    """Counts examples, towards an estimated total that grows as the search continues."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self._show = show
        self._done, self._total, self._label = 0, 0, ""

    def expect(self, examples: float) -> None:
        """Add to the estimated total."""
        self._total += int(examples)

    def count(self, label: str, examples: int) -> None:
        """Add to the examples that are done, and show the progress."""
        self._label = label
        self._done += examples
        self._show(label, self._done, max(self._done, self._total))

    def finish(self) -> None:
        """Show that everything is done."""
        self._show(self._label, self._done, self._done)
