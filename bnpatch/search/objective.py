"""What a search optimizes: a metric of labelled examples, or an objective that needs no labels."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import Moments
from bnpatch.data.dataset import Batch, Examples, Indices
from bnpatch.data.groups import cut
from bnpatch.evaluation.evaluate import STANDARD_METRICS, OutputsNotFiniteError, evaluate
from bnpatch.evaluation.metrics import (
    ACCURACY,
    CONFIDENCE,
    PREDICTION,
    Metric,
    ScoreFunction,
    Values,
    as_metric,
    no_scores,
    score,
)
from bnpatch.models.base import Model
from bnpatch.nn.hooks import joined
from bnpatch.search import label_free
from bnpatch.search.label_free import LabelFreeLoss, Seen
from bnpatch.search.temperature import SCALED, TEMPERED, guide_of

#: Label-free objectives score a set of examples, of at least this many, and of this many per class.
SET_SIZE, _PER_CLASS = 250, 2

#: An interval from the scores of fewer sets than this says next to nothing.
FEW_SETS = 8
# With fewer sets, all examples make one set of this many groups.
_GROUPS = 20

# Logits of a batch, and the moments of its examples at the norm layers.
_Part = tuple[Tensor, Mapping[str, Moments[Tensor]]]


def in_sets(indices: Indices, size: int, groups: Indices | None = None) -> list[Indices]:
    """Split examples into sets that are scored together; one set where each example has its own score.

    A group of examples (``groups``, of shape (N,)) stays in one set, if ``indices`` has it side by side.
    """
    if size == 1:
        return [indices]
    sizes = [len(part) for part in np.array_split(indices, max(1, len(indices) // size))]
    return cut(indices, np.cumsum(sizes)[:-1], groups)


def groups_of_scores(objective: "Objective", examples: Examples, indices: Indices) -> Indices | None:
    """Return the group of each score; None where scores are of sets, or examples are independent."""
    return None if objective.set_size > 1 or examples.groups is None else examples.groups[indices]


class Objective(Protocol):
    """Scores a model with its present weights; a search compares weights by these scores."""

    @property
    def metric(self) -> Metric:
        """The metric that is tuned."""

    @property
    def set_size(self) -> int:
        """Number of examples that are scored together; 1 where each has its own score."""

    def scores(self, model: Model[Any], examples: Examples, indices: Indices) -> dict[str, Values]:
        """Return scores by name of metric: one per example, or one for all where the metric scores sets.

        Raises:
            OutputsNotFiniteError: an output is infinite or not a number.
        """

    def is_differentiable(self, model: Model[Any], batch: Batch) -> bool:
        """Tell whether the loss has a gradient, from a batch of one example or more."""

    def loss(self, model: Model[Any], batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Return the loss of all batches together, in parts that add up.

        Each part is computed when it is asked for, so that only one batch's activations are in memory. A part
        that does not depend on the weights has no gradient.
        """


@dataclass(frozen=True)
class LabelledObjective:
    """Scores labelled examples one by one; their mean is compared."""

    metric: Metric
    metrics: Sequence[Metric]
    batch_size: int = 64
    set_size: int = 1

    def scores(self, model: Model[Any], examples: Examples, indices: Indices) -> dict[str, Values]:
        """See :class:`Objective`."""
        return evaluate(model, examples, self.metrics, indices=indices, batch_size=self.batch_size).values

    def is_differentiable(self, model: Model[Any], batch: Batch) -> bool:
        """Tell whether the loss has a gradient: a metric of the user's own may count what is right."""
        if self.metric.of_classes:
            return True
        outputs = model.predict(batch.x).clone().requires_grad_()
        with torch.enable_grad():
            try:
                return self.metric.score(outputs, batch.targets.to(outputs.device)).requires_grad
            except RuntimeError:  # it leaves torch, which needs tensors without gradients
                return False

    def loss(self, model: Model[Any], batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Return the cross-entropy for classes, whatever the metric; for others the metric itself."""
        count = sum(len(batch.indices) for batch in batches)
        for batch in batches:
            targets = batch.targets.to(model.device, non_blocking=True)
            yield self._total_loss(model, model.forward(batch.x), targets) / count

    def _total_loss(self, model: Model[Any], outputs: Tensor, targets: Tensor) -> Tensor:
        if self.metric.of_classes:
            return F.cross_entropy(model.as_classes(outputs).float(), targets, reduction="sum")
        return -self.metric.sign * self.metric.score(outputs, targets).float().sum()


@dataclass(frozen=True)
class LabelFreeObjective:
    """Scores a set of examples without labels, by their predictions and moments.

    Attributes:
        metric: name and direction of the objective; it can't score single examples.
        of_set: the objective as a function, see :mod:`bnpatch.search.label_free`.
        step: the loss for learning by gradient.
        norm_layers: what the objective needs to know of the norm layers.
        metrics: further metrics, which score each example.
        num_classes: number of classes, K.
        batch_size: examples per batch.
        groups: if this is more than 1, all examples make one set, and there is one score per group. Each
            score comes from the set without that group, as the pseudovalues of the jackknife do. The scores
            vary as pseudovalues do, and so give an interval. Their mean is the objective itself, because the
            mean of pseudovalues corrects too much where the objective depends on the size of the set. A group
            has consecutive examples, which are in random order.
    """

    metric: Metric
    of_set: LabelFreeLoss
    step: LabelFreeLoss
    norm_layers: Mapping[str, NormFacts]
    metrics: Sequence[Metric] = ()
    num_classes: int = 2
    batch_size: int = 64
    groups: int = 1

    @property
    def set_size(self) -> int:
        """Number of examples that are scored together: enough for a meaningful mean prediction."""
        return sys.maxsize if self.groups > 1 else max(SET_SIZE, _PER_CLASS * self.num_classes)

    def with_intervals(self, count: int) -> "LabelFreeObjective":
        """Return the same objective, with scores that give an interval for ``count`` examples."""
        if count >= FEW_SETS * self.set_size or count < 2:
            return self
        groups = min(_GROUPS, count)
        return replace(self, groups=groups, batch_size=max(1, min(self.batch_size, count // groups)))

    def scores(self, model: Model[Any], examples: Examples, indices: Indices) -> dict[str, Values]:
        """Return the objective of the set, once or per group, and other metrics per example."""
        parts: list[_Part] = []
        by_example: dict[str, list[Tensor]] = {metric.name: [] for metric in self.metrics}
        with model.evaluating():
            for batch in examples.batches(self.batch_size, indices):
                outputs, moments = model.observe(batch.x)
                logits = model.as_classes(outputs)
                parts.append((logits, moments))
                for metric in self.metrics:
                    by_example[metric.name].append(score(metric, logits, batch.targets.to(logits.device)))
            if not parts:
                return dict.fromkeys((self.metric.name, *by_example), np.zeros(0))
            found = np.array([self._of(model, parts)])
            if self.groups > 1 and len(parts) > 1:
                found = self._by_group(model, parts, found)
        if not np.isfinite(found).all():
            raise OutputsNotFiniteError(
                f"{model.name} returns infinities or NaN", "check the weights and the preprocessing"
            )
        values = {name: torch.cat(some).cpu().double().numpy() for name, some in by_example.items()}
        return {self.metric.name: found, **values}

    def _by_group(self, model: Model[Any], parts: Sequence[_Part], whole: Values) -> Values:
        """Return one value per group, made by leaving it out; their mean is that of all (delete-a-group)."""
        count = min(self.groups, len(parts))
        without = np.array(
            [
                self._of(model, [part for n, part in enumerate(parts) if n % count != left])
                for left in range(count)
            ]
        )
        values: Values = whole + (count - 1) * (without.mean() - without)
        return values

    def _of(self, model: Model[Any], parts: Sequence[_Part]) -> float:
        return float(self.of_set(_as_one(model, parts), self.norm_layers))

    def is_differentiable(self, model: Model[Any], batch: Batch) -> bool:
        """Return true: each of these objectives has a gradient."""
        return True

    def loss(self, model: Model[Any], batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Return the loss of all batches as one set, in one part."""
        if len(batches) == 1:
            seen = [model.observe(batches[0].x, gradients=True)]
        else:  # the backward pass runs each again: not all activations fit into memory
            seen = [
                checkpoint(model.observe, batch.x, True, use_reentrant=False, preserve_rng_state=False)
                for batch in batches
            ]
        parts = [(model.as_classes(outputs), moments) for outputs, moments in seen]
        yield self.step(_as_one(model, parts), self.norm_layers)


def _as_one(model: Model[Any], parts: Sequence[_Part]) -> Seen:
    moments = {name: joined([seen[name] for _, seen in parts]) for name in parts[0][1]}
    return seen_by(model, torch.cat([logits for logits, _ in parts]), moments)


def seen_by(model: Model[Any], logits: Tensor, moments: Mapping[str, Moments[Tensor]]) -> Seen:
    """Return what label-free objectives see: logits (N, K), moments (N, C) at norm layers, and weights."""
    running = {
        name: Moments(*(torch.as_tensor(part, dtype=torch.float32) for part in (m.mean, m.var)))
        for name, m in model.statistics_in_use().items()
    }
    return Seen(logits, moments, model.weights_in_use(), running)


#: Metrics that need no labels, and the weakness of each.
LABEL_FREE = {
    "unlabeled": "it presumes that all classes are equally frequent, or as --class-prior says",
    "information": "it presumes that all classes are equally frequent, or as --class-prior says",
    "alignment": "it looks at the moments of the norms' inputs alone, never at an answer",
    "entropy": "it rewards certainty, also that of a model that predicts one class for everything",
    "evalnorm": "it makes inference similar to training, whether or not that helps",
}

#: "unlabeled" is self-labelling where there are this many sets, with this many examples per class in each;
#: otherwise it is information maximisation, see :func:`bnpatch.search.label_free.unlabeled`.
SELF_LABELLED_SETS, _LABELS_PER_CLASS = 4, 25


@dataclass(frozen=True)
class ObjectiveSpec:
    """What is tuned, before there are a model and data.

    Attributes:
        metric: the tuned metric; for a label-free objective it has only a name and a direction.
        needs_labels: whether the metric compares outputs with targets.
        classes: whether the targets are classes.
        prior: frequencies of the classes, for label-free objectives.
        batch_size: examples per batch.
    """

    metric: Metric
    needs_labels: bool
    classes: bool
    prior: str | Sequence[float] | None
    batch_size: int

    @classmethod
    def of(
        cls, metric: str | Metric | ScoreFunction, prior: str | Sequence[float] | None, batch_size: int
    ) -> "ObjectiveSpec":
        """Make one from a metric, its name or a function; BnpatchError if it can't use a class prior."""
        if isinstance(metric, str) and metric in LABEL_FREE:
            return cls(Metric(metric, no_scores, higher_is_better=False), False, True, prior, batch_size)
        if prior is not None:
            raise BnpatchError("a class prior is for tuning without labels", "add --metric unlabeled")
        tuned = as_metric(metric, also=LABEL_FREE)
        return cls(tuned, True, tuned.of_classes, None, batch_size)

    def objective(self, model: Model[Any], examples: Examples, indices: Indices) -> Objective:
        """Return the objective of the search, which will score the examples ``indices``."""
        if self.needs_labels:
            beside = STANDARD_METRICS if self.classes else ()
            metrics = [self.metric, *(m for m in beside if m.name != self.metric.name)]
            if guide_of(self.metric) is TEMPERED:
                metrics += SCALED
            return LabelledObjective(self.metric, metrics, self.batch_size)
        readable = examples.readable(indices)  # or an error that says why not
        num_outputs = model.num_outputs(next(examples.batches(1, readable)).x)
        prior = label_free.as_prior(self.prior, num_outputs)
        infomax = label_free.infomax(prior)
        enough = len(indices) >= SELF_LABELLED_SETS * SET_SIZE and _LABELS_PER_CLASS * num_outputs <= SET_SIZE
        objectives: Mapping[str, label_free.LabelFreeLoss] = {
            "unlabeled": label_free.unlabeled(prior) if enough else infomax,
            "information": infomax,
            "alignment": label_free.alignment,
            "entropy": label_free.entropy,
            "evalnorm": label_free.evalnorm,
        }
        beside = STANDARD_METRICS if examples.labelled[indices].all() else ()
        of_set = objectives[self.metric.name]
        is_self_labelled = enough and self.metric.name == "unlabeled"
        step = label_free.unlabeled_step(prior) if is_self_labelled else of_set
        return LabelFreeObjective(
            self.metric, of_set, step, model.facts(), beside, num_outputs, self.batch_size
        )

    def held_out_objective(
        self, objective: Objective, examples: Examples, indices: Indices
    ) -> tuple[Objective, list[Metric]]:
        """Return the objective for held-out examples, by labels if any, and the metrics to compare."""
        answers = (CONFIDENCE, PREDICTION)
        if not self.classes:
            return objective, [self.metric]
        if self.needs_labels or examples.labelled[indices].all():
            first = self.metric if self.needs_labels else ACCURACY
            metrics = [first, *(m for m in STANDARD_METRICS if m.name != first.name)]
            return LabelledObjective(first, [*metrics, *answers], self.batch_size), metrics
        assert isinstance(objective, LabelFreeObjective)
        return replace(objective, metrics=answers).with_intervals(len(indices)), [self.metric]
