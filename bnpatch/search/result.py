"""What a search found."""

from dataclasses import dataclass, field

from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.evaluation.metrics import Comparison, Metric
from bnpatch.search.config import Candidate, Trial, kept
from bnpatch.search.held_out import Verdict
from bnpatch.search.latency_limit import Point


@dataclass(repr=False)
class TuneResult:
    """What a search found.

    Attributes:
        metric: what was tuned.
        candidates: the list of candidates of the search, the identity first, each with its score on the
            selection examples; one of them is chosen.
        trials: weights for all norm layers that were tried, with their scores on the tuning examples.
        verdict: on held-out examples.
        setting: the weights that are kept: those of the chosen candidate, or those that the model had before
            where the verdict is a loss.
        norm_layers: names of the norm layers, in the order of the model.
        passes: how often the tuning examples were gone through before the verdict, a cross-fit's searches
            included; learning counts threefold.
        num_tuning: examples that the search saw, without the unreadable.
        num_parts: parts that took turns in being held out and judged what was found without them, where
            examples are few; else 1.
        skipped: examples that can't be read, by name, and why.
        notes: what a person should know about the result.
        interrupted: the user stopped the search early.
        trade_off: gain against latency of ever more norm layers, where a limit was set; the original first.
        seconds: wall time.
        recipe: the weights and their provenance, to keep and to apply.
    """

    metric: Metric
    candidates: list[Candidate]
    trials: list[Trial]
    verdict: Verdict
    setting: PatchWeights
    norm_layers: list[str]
    passes: float
    num_tuning: int
    num_parts: int = 1
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    trade_off: list[Point] = field(default_factory=list)
    seconds: float = 0.0
    recipe: Recipe = field(default_factory=lambda: Recipe(()))

    def __repr__(self) -> str:
        return f"TuneResult({self.chosen.name}, {self.comparisons[0].metric.name}: {self.verdict})"

    @property
    def chosen(self) -> Candidate:
        """The candidate that the selection examples support."""
        return kept(self.candidates)

    @property
    def comparisons(self) -> list[Comparison]:
        """Held-out examples, metric by metric."""
        return self.verdict.comparisons

    @property
    def num_held_out(self) -> int:
        """Examples that gave the verdict."""
        return self.verdict.num_examples

    @property
    def alpha(self) -> float | None:
        """The one alpha of all norm layers; None where they differ."""
        values = set(self.setting.alphas.values())
        return values.pop() if len(values) == 1 else None
