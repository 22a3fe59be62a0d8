"""How far a search goes, and what it finds on the way: rungs of a ladder, trials of the races for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bnpatch.core.patch import Setting
from bnpatch.evaluation.metrics import Estimate

Granularity = Literal["auto", "global", "stage", "layer"]

#: Rungs with one weight for all sites.
GLOBAL_RUNGS = ("identity", "alpha", "lambda", "lambda, alpha")


@dataclass(frozen=True)
class Plan:
    """How far to search.

    Attributes:
        granularity: what has a weight of its own: the model, each stage (the sites of one resolution of
            feature maps), or each layer; "auto" is layer where gradients make that affordable.
        recalibrate: let lambda, the weight of re-estimated running moments, join alpha.
        trials: at most so many weights in each race.
        max_passes: at most so many passes over the tuning examples in each race. Where a label-free metric
            finds them too few for a race, a dozen trials are scored on all of them instead.
        timeout: seconds after which nothing further is begun; the best so far still sees all examples.
        reach: climb no further than so many rungs above the identity.
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
class Rung:
    """A setting that was found in one way.

    Attributes:
        name: of the way.
        setting: the weights.
        mean: of the tuned metric over the selection examples.
        change: of it from the identity, on the same examples.
        chosen: this is the one that is kept.
    """

    name: str
    setting: Setting
    mean: float
    change: Estimate
    chosen: bool = False


def kept(rungs: Sequence[Rung]) -> Rung:
    """The one that is chosen."""
    return next(rung for rung in rungs if rung.chosen)


@dataclass(frozen=True)
class Trial:
    """What was tried in a race, and how the tuning examples scored with it.

    Attributes:
        rung: the race that it ran in.
        number: within the race; 0 is where that began.
        params: ``weight``, the distance of all sites from the identity: alpha for Batch Norm, 1 - alpha for
            Group Norm; or lambda. In the race that refines: ``scale``, by which all of these distances are
            multiplied, and ``threshold``, below which they become none.
        scores: by name of metric, the mean over the tuning examples, judged by those that were seen.
        errors: standard errors of the change from where the race began, likewise.
        examples: how many were seen.
    """

    rung: str
    number: int
    params: Mapping[str, float]
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    examples: int

    @property
    def weight(self) -> float | None:
        """Of all sites; None in the race that refines, whose trials have none in common."""
        return self.params.get("weight")
