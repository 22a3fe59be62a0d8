"""Find weights per norm layer by coordinate search, for models without gradients, such as ONNX files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bnpatch.core.patch import PatchWeights
from bnpatch.data.dataset import Indices
from bnpatch.evaluation.metrics import Z95, Values, paired_difference

#: Values that are tried for a weight: the whole range, more densely at small values, where it matters.
TRIED = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)

#: Values that are tried for a slope: examples that are farther away have a larger weight.
TRIED_SLOPES = (0.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Coordinate:
    """One weight that can be changed: the alpha, lambda or slope of a group of norm layers.

    Attributes:
        kind: "alpha", "lambda" or "slope".
        norm_layers: names of the norm layers that share the weight.
    """

    kind: str
    norm_layers: tuple[str, ...]

    def moved(self, weights: PatchWeights, value: float) -> PatchWeights:
        """Return the weights with this one changed."""
        values = {**weights.of(self.kind), **dict.fromkeys(self.norm_layers, value)}
        return replace(weights, **{f"{self.kind}s": values})

    def value(self, weights: PatchWeights) -> float:
        """Return the present value of this weight."""
        return weights.of(self.kind).get(self.norm_layers[0], 0.0)

    def probes(self, now: float) -> set[float]:
        """Return other values, a higher and a lower one, to estimate the importance of this weight."""
        values = {1.0, 0.0} if self.kind == "slope" else {min(1.0, 0.1 + 2 * now), now / 3}
        return values - {now}

    @property
    def tried(self) -> Sequence[float]:
        """Values that are tried for this weight."""
        return TRIED_SLOPES if self.kind == "slope" else TRIED


@dataclass(frozen=True)
class _Gain:
    """The gain of weights over others: the mean, its standard error, and the scores of the former."""

    mean: float
    error: float
    values: Values

    @classmethod
    def over(cls, base: Values, values: Values | None, groups: Indices | None = None) -> "_Gain":
        """Compute the gain on the same examples; it is -inf where the outputs are not finite."""
        if values is None:
            return cls(-math.inf, 0.0, base)
        change = paired_difference(base, values, groups)
        return cls(change.value, change.reach / Z95 if len(values) > 1 else 0.0, values)


#: Maximum number of weights that are optimized, and of rounds.
MOST, ROUNDS = 16, 2


def expected_cost(num_coordinates: int, scored: int, previewed: int) -> int:
    """Estimate how many examples :func:`coordinate_search` scores, in one round where all weights gain."""
    probes = (1 + 2 * num_coordinates) * previewed
    moves = min(MOST, num_coordinates) * ((len(TRIED) - 1) * previewed + scored)
    return scored + probes + moves


def coordinate_search(
    scores: Callable[[PatchWeights], Values | None],
    start: PatchWeights,
    coordinates: Sequence[Coordinate],
    *,
    preview: Callable[[PatchWeights], Values | None] | None = None,
    most: int = MOST,
    rounds: int = ROUNDS,
    stop: Callable[[], bool] = lambda: False,
    groups: Indices | None = None,
) -> PatchWeights:
    """Find weights by changing one at a time, the most important first.

    First, each coordinate is changed alone, to a higher value and, where possible, to a lower one. The
    ``most`` coordinates that gain most over the start, if anything, are then optimized in this order, in
    ``rounds`` rounds, because the best value of one depends on the others. For each, the values of
    :attr:`Coordinate.tried` are scored on some of the examples, and only the best of them is scored on all.

    Args:
        scores: scores of weights, one per example or set, always of the same ones; higher is better. None
            where the outputs of the model are not finite.
        start: the weights to start from.
        coordinates: the weights that may be changed.
        preview: like ``scores``, for some of the examples; by default for all.
        most: maximum number of coordinates to optimize.
        rounds: maximum number of rounds.
        stop: called before each evaluation; the search ends if it returns true.
        groups: the group of each score; None if all are independent.

    Returns:
        The best weights found. A change that gains no more than its standard error isn't made.
    """
    of_some = preview or scores
    base, seen = scores(start), of_some(start)
    if base is None or seen is None:
        return start
    chosen = _important(coordinates, start, of_some, seen, stop)[:most]
    here = start
    for _ in range(rounds):
        before = here
        for coordinate in chosen:
            moves = [
                coordinate.moved(here, value) for value in coordinate.tried if value != coordinate.value(here)
            ]
            previews = []
            for moved in moves:
                if stop():
                    return here
                previews.append(_Gain.over(seen, of_some(moved)))
            promising, moved = max(zip(previews, moves, strict=True), key=lambda pair: pair[0].mean)
            if promising.mean <= 0:
                continue
            if stop():
                return here
            gain = _Gain.over(base, scores(moved), groups)
            if gain.mean > gain.error:
                here, base, seen = moved, gain.values, promising.values
        if here == before:
            break
    return here


def _important(
    coordinates: Sequence[Coordinate],
    start: PatchWeights,
    scores: Callable[[PatchWeights], Values | None],
    now: Values,
    stop: Callable[[], bool],
) -> list[Coordinate]:
    """Return the coordinates that gain when each alone is changed, the most important first.

    ``now`` are the scores of the start.
    """
    gains: list[float] = []
    for coordinate in coordinates:
        best = -math.inf
        for value in coordinate.probes(coordinate.value(start)):
            if stop():
                return []
            best = max(best, _Gain.over(now, scores(coordinate.moved(start, value))).mean)
        gains.append(best)
    ranked = sorted(zip(gains, coordinates, strict=True), key=lambda pair: -pair[0])
    return [coordinate for best, coordinate in ranked if best > 0]
