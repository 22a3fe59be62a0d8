"""How far a search goes, and what it finds on the way: candidates, trials of the global searches for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bnpatch.core.patch import PatchWeights
from bnpatch.evaluation.metrics import Estimate

Granularity = Literal["auto", "global", "stage", "layer"]

#: Rungs with one weight for all norm layers.
GLOBAL_RUNGS = ("identity", "alpha", "lambda", "lambda, alpha")


@dataclass(frozen=True)
class Plan:
    """How far to search.

    Attributes:
        granularity: what has a weight of its own: the model, each stage (the norm layers of one resolution of
            feature maps), or each layer; "auto" is layer where gradients make that affordable.
        recalibrate: let lambda, the weight of re-estimated running moments, join alpha.
        trials: at most so many weights in each global search.
        max_passes: at most so many passes over the tuning examples in each global search. Where a label-free
            metric finds them too few for a global search, a dozen trials are scored on all of them instead.
        timeout: seconds after which nothing further is begun; the best so far still sees all examples.
        reach: climb no further than so many candidates above the identity.
        seed: of everything random.
        batch_size: examples at a time.
        storage: of the studies, see :func:`bnpatch.search.studies.open_study`.
        study: their name.
        fingerprint: what they are of.
    """

    granularity: Granularity = "auto"
    recalibrate: bool = False
    trials: int | None = None
    max_passes: float = 3.0
    timeout: float | None = None
    reach: int | None = None
    seed: int = 0
    batch_size: int = 64
    storage: str | None = None
    study: str | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A setting that was found in one way.

    Attributes:
        name: of the way.
        setting: the weights.
        mean: of the tuned metric over the selection examples.
        change: of it from the identity, on the same examples.
        chosen: this is the one that is kept.
    """

    name: str
    setting: PatchWeights
    mean: float
    change: Estimate
    chosen: bool = False


def kept(candidates: Sequence[Candidate]) -> Candidate:
    """The one that is chosen."""
    return next(candidate for candidate in candidates if candidate.chosen)


@dataclass(frozen=True)
class Trial:
    """What was tried in a global search, and how the tuning examples scored with it.

    Attributes:
        candidate: the global search that it ran in.
        number: within the global search; 0 is where that began.
        params: ``weight``, the distance of all norm layers from the identity: alpha for Batch Norm, 1 - alpha
            for Group Norm; or lambda. In the global search that refines: ``scale``, by which all of these
            distances are multiplied, and ``threshold``, below which they become none.
        scores: by name of metric, the mean over the tuning examples, judged by those that were seen.
        errors: standard errors of the change from where the global search began, likewise.
        examples: how many were seen.
    """

    candidate: str
    number: int
    params: Mapping[str, float]
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    examples: int

    @property
    def weight(self) -> float | None:
        """Of all norm layers; None in the global search that refines, whose trials have none in common."""
        return self.params.get("weight")
