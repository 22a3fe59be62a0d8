"""How far a search has come, counted in examples."""

from collections.abc import Callable


class Progress:
    """Counts examples towards a total that grows as more is found to be needed."""

    def __init__(self, show: Callable[[str, int, int], None]) -> None:
        self._show = show
        self._done, self._total, self._label = 0, 0, ""

    def expect(self, examples: float) -> None:
        """So many more will come, about."""
        self._total += int(examples)

    def count(self, label: str, examples: int) -> None:
        """So many were done."""
        self._label = label
        self._done += examples
        self._show(label, self._done, max(self._done, self._total))

    def finish(self) -> None:
        """All that will be done is done."""
        self._show(self._label, self._done, self._done)
