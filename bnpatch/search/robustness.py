"""Weaken a patch until it does no harm to images that it was not tuned for.

Weights that help shifted images may cost some accuracy on images without the shift. Halfway between the
baseline and such weights, most of the gain remains and hardly any of the cost. So where a candidate does
harm, some points between the baseline and it take its place.
"""

from collections.abc import Callable, Mapping, Sequence

from bnpatch.core.patch import PatchWeights
from bnpatch.search.config import Candidate, kept

#: Points that take the place of a candidate, as fractions of the way from the baseline to it.
PARTS = (0.75, 0.5, 0.25, 0.1)


def without_harm(
    candidates: Sequence[Candidate],
    choose: Callable[[Mapping[str, PatchWeights]], Sequence[Candidate]],
    is_harmless: Callable[[PatchWeights], bool],
) -> Candidate:
    """Choose the best candidate, or the best point between the baseline and one, that does no harm.

    Args:
        candidates: what a search found, the identity first; one of them is chosen.
        choose: chooses between weights by name, the identity first.
        is_harmless: whether weights do no harm.

    Returns:
        The first choice that does no harm; the identity where there is none.
    """
    weights = {candidate.name: candidate.weights for candidate in candidates}
    identity, found = candidates[0], set(weights)
    best = kept(candidates)
    while best.name != identity.name and not is_harmless(best.weights):
        del weights[best.name]
        if best.name in found:
            weights |= {
                f"{best.name} x {part:g}": toward(identity.weights, best.weights, part) for part in PARTS
            }
        best = kept(choose(weights))
    return best


def toward(start: PatchWeights, end: PatchWeights, part: float) -> PatchWeights:
    """Interpolate between two weights: ``part`` is 0 for ``start`` and 1 for ``end``."""

    def between(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {name: a.get(name, 0.0) + part * (weight - a.get(name, 0.0)) for name, weight in b.items()}

    return PatchWeights(
        between(start.alphas, end.alphas), between(start.lambdas, end.lambdas), slopes=end.slopes
    )
