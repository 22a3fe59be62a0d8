"""What is tuned for: a metric of labelled examples, or an objective that needs no labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bnpatch.data.examples import Examples, Indices
from bnpatch.errors import BnpatchError
from bnpatch.evaluation import STANDARD_METRICS
from bnpatch.metrics import ACCURACY, CONFIDENCE, PREDICTION, Metric, ScoreFunction, as_metric, no_scores
from bnpatch.patchable import Patchable
from bnpatch.search import objectives as label_free
from bnpatch.search.judge import SET_SIZE, ByMetric, ByObjective, Judge

#: Metrics that need no labels, and what each can't see.
LABEL_FREE = {
    "unlabeled": "it presumes that all classes are equally frequent, or as --class-prior says",
    "information": "it presumes that all classes are equally frequent, or as --class-prior says",
    "alignment": "it looks at the moments of the norms' inputs alone, never at an answer",
    "entropy": "it takes certainty for truth, which fails where a strong shift makes one class of everything",
    "evalnorm": "it makes inference like training, batch by batch, whether or not that helps",
}

#: Labels are made of predictions where there are so many sets of examples, each of so many per class; else
#: information is maximised, see :func:`bnpatch.search.objectives.unlabeled`.
SELF_LABELLED_SETS, _PER_CLASS = 4, 25


@dataclass(frozen=True)
class Goal:
    """What is tuned for.

    Attributes:
        metric: name and direction; of label-free objectives, which no example has a score of, no more.
        needs_labels: it compares outputs with targets.
        classes: these targets are classes.
        prior: how often the classes occur, for label-free objectives.
        batch_size: examples at a time.
    """

    metric: Metric
    needs_labels: bool
    classes: bool
    prior: str | Sequence[float] | None
    batch_size: int

    @classmethod
    def of(
        cls, metric: str | Metric | ScoreFunction, prior: str | Sequence[float] | None, batch_size: int
    ) -> "Goal":
        """By the metric's name, or of a function; BnpatchError where it doesn't go with a class prior."""
        if isinstance(metric, str) and metric in LABEL_FREE:
            return cls(Metric(metric, no_scores, higher_is_better=False), False, True, prior, batch_size)
        if prior is not None:
            raise BnpatchError("a class prior is for tuning without labels", "add --metric unlabeled")
        tuned = as_metric(metric, also=LABEL_FREE)
        return cls(tuned, True, tuned.of_classes, None, batch_size)

    def judge(self, model: Patchable, examples: Examples, indices: Indices) -> Judge:
        """What the search goes by, on examples of which these will be seen."""
        if self.needs_labels:
            beside = STANDARD_METRICS if self.classes else ()
            metrics = [self.metric, *(m for m in beside if m.name != self.metric.name)]
            return ByMetric(self.metric, metrics, self.batch_size)
        readable = examples.readable(indices)  # or an error that says why not
        num_outputs = model.num_outputs(next(examples.batches(1, readable)).x)
        prior = label_free.as_prior(self.prior, num_outputs)
        infomax = label_free.infomax(prior)
        enough = len(indices) >= SELF_LABELLED_SETS * SET_SIZE and _PER_CLASS * num_outputs <= SET_SIZE
        objectives: Mapping[str, label_free.Objective] = {
            "unlabeled": label_free.unlabeled(prior) if enough else infomax,
            "information": infomax,
            "alignment": label_free.alignment,
            "entropy": label_free.entropy,
            "evalnorm": label_free.evalnorm,
        }
        beside = STANDARD_METRICS if examples.labelled[indices].all() else ()
        objective = objectives[self.metric.name]
        is_self_labelled = enough and self.metric.name == "unlabeled"
        step = label_free.unlabeled_step(prior) if is_self_labelled else objective
        return ByObjective(self.metric, objective, step, model.facts(), beside, num_outputs, self.batch_size)

    def final_judge(self, judge: Judge, examples: Examples, indices: Indices) -> tuple[Judge, list[Metric]]:
        """What gives the verdict on these examples, by labels where there are, and the metrics compared."""
        answers = (CONFIDENCE, PREDICTION)
        if not self.classes:
            return judge, [self.metric]
        if self.needs_labels or examples.labelled[indices].all():
            first = self.metric if self.needs_labels else ACCURACY
            metrics = [first, *(m for m in STANDARD_METRICS if m.name != first.name)]
            return ByMetric(first, [*metrics, *answers], self.batch_size), metrics
        assert isinstance(judge, ByObjective)
        return replace(judge, metrics=answers).sure_of(len(indices)), [self.metric]
