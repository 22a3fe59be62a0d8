"""The result of a search, and what a recipe says of where it comes from."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from torch import Tensor

from bnpatch import __version__
from bnpatch.core.patch import PatchWeights
from bnpatch.core.recipe import Recipe
from bnpatch.evaluation.metrics import Comparison, Metric
from bnpatch.search.config import Candidate, Trial, chosen_of
from bnpatch.search.held_out import HeldOutEvaluation
from bnpatch.search.latency_limit import Point
from bnpatch.search.task import Task
from bnpatch.search.thumbnails import Samples


@dataclass(repr=False)
class TuneResult:
    """The result of a search.

    Attributes:
        metric: the tuned metric.
        candidates: the candidates, the baseline first, with their scores on the selection examples; one of
            them is chosen.
        trials: trials of the global searches, with their scores on the tuning examples.
        held_out: the effect on held-out examples, which gives the verdict.
        weights: the recommended weights: those of the chosen candidate if held-out examples support it,
            otherwise those of the model as it was loaded.
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
        inputs: up to four inputs (N, ...) of tuning examples, bytes or floats; a file that is written with
            the result is compared on them. None if they can't be read.
        seconds: wall time.
        recipe: the recommended weights and their provenance, to keep and to apply.
        is_recommended: whether held-out examples support the chosen candidate, so that ``recipe`` applies it.
        candidate_recipe: the weights of the best candidate if it is not recommended; None if there is none.
            It need not be the chosen candidate: one that harms images that must be kept is never chosen.
        reason: why it is not recommended, as a sentence for users.
    """

    metric: Metric
    candidates: list[Candidate]
    trials: list[Trial]
    held_out: HeldOutEvaluation
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
    inputs: Tensor | None = field(default=None, repr=False)
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
        return chosen_of(self.candidates)

    @property
    def verdict(self) -> str:
        """The verdict in words: gain, loss, or no significant change."""
        return self.held_out.verdict

    @property
    def comparisons(self) -> list[Comparison]:
        """Comparisons on the held-out examples, one per metric."""
        return self.held_out.comparisons

    @property
    def num_held_out(self) -> int:
        """The number of held-out examples that gave the verdict."""
        return self.held_out.num_examples

    @property
    def alpha(self) -> float | None:
        """The alpha that all norm layers share; None where they differ."""
        values = set(self.weights.alphas.values())
        return values.pop() if len(values) == 1 else None


def provenance(result: TuneResult, task: Task, sources: Mapping[str, Any]) -> dict[str, Any]:
    """Describe where a recipe comes from.

    Args:
        result: the result.
        task: what the search was given.
        sources: the data sets as the user gave them, by name of the parameter of :func:`bnpatch.tune_alpha`.
    """
    model = task.model
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model.name,
        "architecture": str(model.arch) if model.arch else None,
        "output": model.chosen_output,
        "preprocessing": None if task.examples.as_they_are else model.preprocessing.to_json(),
        "data": {
            "name": _name(sources["data"]),
            "test_name": _name(sources["test_data"]),
            "keep_name": _name(sources["keep"]),
            "fingerprint": task.seen.fingerprint(),
            "input_shape": None if result.inputs is None else list(result.inputs.shape[1:]),
            "tuning_examples": result.num_tuning,
            "held_out_examples": result.num_held_out,
            **_group_counts(result),
            "skipped": len(result.skipped),
        },
        "metric": result.metric.name,
        "granularity": task.plan.granularity,
        "ladder": [
            {"rung": r.name, "mean": r.mean, "change": r.change.to_json(), "chosen": r.chosen}
            for r in result.candidates
        ],
        "passes": round(result.passes, 2),
        "trials": len(result.trials),
        "interrupted": result.interrupted,
        "verdict": result.verdict,
        "held_out": result.held_out.to_json(),
        "kept": None if result.held_out.kept is None else result.held_out.kept.to_json(),
        "notes": result.notes,
        "seed": task.plan.seed,
        "versions": {
            "bnpatch": __version__,
            **{name: version(name) for name in ("torch", "timm", "optuna")},
            "python": platform.python_version(),
        },
    }


def _name(source: Any) -> str | None:
    """Return the path of a data set; None where it is something else."""
    return str(source) if isinstance(source, (str, os.PathLike)) else None


def _group_counts(result: TuneResult) -> dict[str, int]:
    """Return the numbers of groups, where examples come in groups."""
    counts = {"tuning_groups": result.num_tuning_groups, "held_out_groups": result.held_out.num_groups}
    return {name: count for name, count in counts.items() if count is not None}
