"""Settings of a search, and the records of what it finds: candidates, and trials of its global searches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchState, PatchWeights
from bnpatch.data.corruptions import parse_kinds
from bnpatch.evaluation.metrics import Estimate

if TYPE_CHECKING:
    import optuna

    from bnpatch.search.storages import Storage

Callback = Callable[["optuna.Study", "optuna.trial.FrozenTrial"], None]

Granularity = Literal["auto", "global", "stage", "layer"]

#: Candidates with one weight for all norm layers.
GLOBAL_CANDIDATES = ("baseline", "alpha", "lambda", "lambda, alpha")


@dataclass(frozen=True)
class SearchConfig:
    """The less common options of :func:`bnpatch.tune_alpha`.

    The values are checked when an instance is made, before any model is loaded.

    >>> SearchConfig(max_passes=2.0, holdout=0.3).holdout
    0.3

    Attributes:
        recalibrate: also search for lambda, the weight of the statistics re-estimated on ``calib_data``; None
            for True where the granularity is "auto".
        slopes: let the weights per layer or stage depend on how far an example is from the running
            statistics, and let the variance have another than the mean, see
            :class:`~bnpatch.core.moments.ExampleWeight`.
        trials: maximum number of trials in each global search.
        max_passes: maximum number of passes over the tuning examples in each global search; 2 of them score
            the baseline and the best trial. It does not apply to label-free metrics on fewer than a thousand
            examples: there, five trials are scored on all examples.
        holdout: fraction of the data that the search does not see, and that gives the verdict; None for half,
            or, with few labelled examples, for cross-fitting: every part is held out once.
        class_prior: frequencies of the classes, in the order of the outputs, for ``unlabeled`` and
            ``information``.
        augment: tune on a mixture of the examples and of shifted ones, see :mod:`bnpatch.data.corruptions`.
        margin: the loss on the images to keep that is accepted, as a fraction: of their accuracy or, without
            labels, of the answers of the unpatched model.
        max_overhead: maximum ratio of the patched model's measured latency, one image at a time, to the
            baseline's; the norm layers that gain least for their time stay unpatched.
        recover_fused: take convolutions that a Batch Norm was fused into as norm layers.
        batch_size: examples per batch.
        storage: where the trials are kept, so that a search that was killed can continue:
            a database such as ``sqlite:///x.db``; None for memory.
        study: name of the study in the storage.
        callbacks: called as ``callback(study, trial)`` with Optuna's study and each trial of a global search
            that ended, as those of ``optuna.Study.optimize`` are; see :mod:`bnpatch.search.trackers`.
    """

    recalibrate: bool | None = None
    slopes: bool = True
    trials: int | None = None
    max_passes: float = 3.0
    holdout: float | None = None
    class_prior: str | Sequence[float] | None = None
    augment: str | Sequence[str] | None = None
    margin: float = 0.005
    max_overhead: float | None = None
    recover_fused: bool = False
    batch_size: int = 64
    storage: str | None = None
    study: str | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        if self.augment is not None:
            parse_kinds(self.augment)
        if self.trials is not None and self.trials < 1:
            raise BnpatchError(f"{self.trials} trials find nothing", "set --trials to 1 or more")
        if not self.max_passes > 0:
            raise BnpatchError(f"{self.max_passes} passes find nothing", "set --max-passes to 1 or more")
        if not 0 < self.margin < 1:
            raise BnpatchError(
                f"a margin of {self.margin:g} is not a fraction", "set --margin to 0.005 or so"
            )
        if self.max_overhead is not None and not self.max_overhead >= 1:
            raise BnpatchError(
                f"{self.max_overhead:g} times the latency is not possible", "write --max-overhead 1.1"
            )
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise BnpatchError(
                f"a held-out part of {self.holdout} is not a fraction", "set --holdout between 0 and 1"
            )


@dataclass(frozen=True)
class Plan(SearchConfig):
    """All settings of a search: those of the user, and what follows from them and the data.

    Attributes:
        granularity: what has a weight of its own: the model, each stage (the norm layers of one resolution of
            feature maps), or each layer; "auto" is each layer, or the model if it has no gradients and there
            are few examples.
        timeout: seconds after which nothing new is started; the best so far is still scored on all examples.
        seed: seed of all random choices.
        reach: maximum number of ways to find candidates that are tried.
        database: the storage, see :func:`bnpatch.search.studies.open_study`; None for memory.
        fingerprint: what the studies were made with; a study with another fingerprint is refused.
    """

    granularity: Granularity = "auto"
    timeout: float | None = None
    seed: int = 0
    reach: int | None = None
    database: "Storage | None" = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: SearchConfig, granularity: Granularity, timeout: float | None, seed: int) -> "Plan":
        """Make a plan of the user's options."""
        from bnpatch.search.storages import Storage  # imports Optuna, which takes time

        options = vars(config) | {
            "recalibrate": granularity == "auto" if config.recalibrate is None else config.recalibrate
        }
        database = None if config.storage is None else Storage(config.storage)
        return cls(**options, granularity=granularity, timeout=timeout, seed=seed, database=database)


@dataclass(frozen=True)
class Candidate:
    """Weights that were found in one way.

    Attributes:
        name: how the weights were found.
        weights: the weights.
        mean: mean of the tuned metric over the selection examples.
        change: difference of this mean from that of the baseline, on the same examples.
        chosen: whether this candidate is the one that the search chose.
    """

    name: str
    weights: PatchWeights
    mean: float
    change: Estimate
    chosen: bool = False


def chosen_of(candidates: Sequence[Candidate]) -> Candidate:
    """Return the chosen candidate."""
    return next(candidate for candidate in candidates if candidate.chosen)


@dataclass(frozen=True)
class Trial:
    """A point that a global search tried, and the scores of the tuning examples with it.

    Attributes:
        candidate: name of the candidate that the global search is for.
        number: number within the global search; 0 is its starting point.
        params: ``weight``, the distance of all norm layers from the baseline: alpha for Batch Norm, 1 - alpha
            for Group Norm; or lambda. To refine a candidate: ``scale``, by which all of these distances are
            multiplied, and ``threshold``, below which they are set to 0.
        scores: mean over all tuning examples by name of metric, extrapolated from those that were scored.
        errors: standard error of the change from the starting point, by name of metric.
        examples: number of examples that were scored.
        state: state of the model in this trial; None for a trial of an earlier run.
    """

    candidate: str
    number: int
    params: Mapping[str, float]
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    examples: int
    state: PatchState | None = field(default=None, compare=False, repr=False)

    @property
    def weight(self) -> float | None:
        """The weight of all norm layers; None where a candidate is refined, as its layers differ."""
        return self.params.get("weight")
