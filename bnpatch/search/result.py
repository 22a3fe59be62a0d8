"""The result of a search."""

from dataclasses import dataclass, field

from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.evaluation.metrics import Comparison, Metric
from bnpatch.search.config import Candidate, Trial, kept
from bnpatch.search.held_out import Verdict
from bnpatch.search.latency_limit import Point
from bnpatch.search.samples import Samples


@dataclass(repr=False)
class TuneResult:
    """The result of a search.

    Attributes:
        metric: the tuned metric.
        candidates: the candidates, the identity first, with their scores on the selection examples; one of
            them is chosen.
        trials: trials of the global searches, with their scores on the tuning examples.
        verdict: the verdict on held-out examples.
        weights: the recommended weights: those of the chosen candidate if held-out examples support it,
            otherwise those of the model as it came.
        norm_layers: names of the norm layers, in the order of the model.
        passes: passes over the tuning examples before the verdict, with all searches of a cross-fit;
            learning counts three times.
        num_tuning: number of examples that the search saw, without unreadable ones.
        num_tuning_groups: number of groups that these are of; None if all examples are independent.
        num_parts: number of parts of a cross-fit that judged; 1 without cross-fitting.
        skipped: reasons by name of example that can't be read.
        notes: notes for the user.
        interrupted: whether the user stopped the search early.
        trade_off: gain and latency of ever more norm layers, the baseline first, if there was a limit.
        samples: small pictures of some held-out examples.
        seconds: wall time.
        recipe: the recommended weights and their provenance, to keep and to apply.
        is_recommended: whether held-out examples support the chosen candidate, so that ``recipe`` applies it.
        candidate_recipe: the weights of the best candidate where that is not recommended; None where there is
            none. It was not even chosen if it does harm to images that must be spared.
        reason: why it is not recommended, as a sentence for users.
    """

    metric: Metric
    candidates: list[Candidate]
    trials: list[Trial]
    verdict: Verdict
    weights: PatchWeights
    norm_layers: list[str]
    passes: float
    num_tuning: int
    num_parts: int = 1
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    trade_off: list[Point] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples, repr=False)
    seconds: float = 0.0
    num_tuning_groups: int | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(()))
    is_recommended: bool = False
    candidate_recipe: Recipe | None = None
    reason: str = ""

    def __repr__(self) -> str:
        return f"TuneResult({self.chosen.name}, {self.comparisons[0].metric.name}: {self.verdict})"

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen."""
        return kept(self.candidates)

    @property
    def comparisons(self) -> list[Comparison]:
        """Comparisons on the held-out examples, one per metric."""
        return self.verdict.comparisons

    @property
    def num_held_out(self) -> int:
        """The number of held-out examples that gave the verdict."""
        return self.verdict.num_examples

    @property
    def alpha(self) -> float | None:
        """The alpha that all norm layers share; None where they differ."""
        values = set(self.weights.alphas.values())
        return values.pop() if len(values) == 1 else None
