"""Objectives without labels, which score weights by the predictions and the moments alone.

Unlike the metrics of labelled examples, these are functions of a set of examples, not means over them. Each
is a scalar with gradients, and lower is better.

None of them knows the true classes. *Self-labelling* and *information maximisation* favour certain
predictions with all classes equally frequent (or as ``prior`` says); on data with other proportions this
biases them. *Entropy* favours certainty alone, which a network under a strong shift also reaches by
predicting one class for everything. *Alignment* and *EvalNorm* do not use the predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import ExampleWeight, Moments, mix_example, pool
from bnpatch.core.text import counted

# Temperature and number of iterations of self-labels. Labels to score weights by are balanced to a few
# percent. Labels to learn from are harder and only partly balanced, which avoids more bad local minima (see
# docs/decisions/0009 for both).
_SCORED, _LEARNED = (0.3, 100), (0.1, 30)

# Weight of the alignment. It is below 1 because the alignment is less informative than the predictions.
_ALIGNMENT = 0.3


@dataclass(frozen=True)
class Seen:
    """The outputs and moments of a model for a set of examples.

    Attributes:
        logits: outputs, (N, K).
        moments: moments of each example at the input of each norm layer, (N, C), by name of norm layer.
        weights: how much the example counts, by name of norm layer, in numbers or 0-dim tensors; not at all
            where it is missing.
        running: running statistics (C,) in use, by name of norm layer, where they are not those of the
            checkpoint.
    """

    logits: Tensor
    moments: Mapping[str, Moments[Tensor]]
    weights: Mapping[str, ExampleWeight]
    running: Mapping[str, Moments[Tensor]]


LabelFreeLoss = Callable[[Seen, Mapping[str, NormFacts]], Tensor]


def entropy(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """Compute the mean entropy of the predictions, in nats (Wang et al. 2021, TENT)."""
    log_p = seen.logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def self_labels(log_p: Tensor, prior: Tensor | None, temperature: float, iterations: int) -> Tensor:
    """Make soft labels that agree with the predictions, with the class frequencies of the prior.

    The labels are the optimal transport plan from examples to classes, with negative log-probabilities as
    costs and entropy regularisation, by Sinkhorn-Knopp iterations (Asano et al. 2020, "Self-labelling via
    simultaneous clustering and representation learning"; Cuturi 2013). If a network predicts one class for
    too many examples, the most certain of them keep it, and the others get their next best class.

    Args:
        log_p: logarithms of the predicted probabilities, (N, K).
        prior: frequencies of the classes, (K,); None for equal frequencies.
        temperature: weight of the entropy, in nats; a low one makes hard labels.
        iterations: number of iterations; with few, classes that are never predicted get too small a share.

    Returns:
        Probabilities (N, K), without gradient.
    """
    count, num_classes = log_p.shape
    with torch.no_grad():
        log_p = (log_p.cpu() if log_p.device.type == "mps" else log_p).double()  # MPS has no float64
        # Relative to the best class of each example, and clamped so that exp() does not underflow.
        scaled = (log_p - log_p.amax(1, keepdim=True)) / temperature
        kernel = scaled.clamp_min(-600).exp()
        share = kernel.new_full((num_classes,), 1 / num_classes) if prior is None else prior.to(kernel)
        by_example = kernel.new_ones(count)
        for _ in range(iterations):
            by_class = count * share / (by_example @ kernel)
            by_example = 1 / (kernel @ by_class)
        return by_example[:, None] * kernel * by_class


def self_labelling(
    seen: Seen, prior: Tensor | None = None, temperature: float = _SCORED[0], iterations: int = _SCORED[1]
) -> Tensor:
    """Compute the mean cross-entropy of the predictions with :func:`self_labels` made of them, in nats."""
    log_p = seen.logits.float().log_softmax(1)
    labels = self_labels(log_p, prior, temperature, iterations)
    return -(labels.to(log_p) * log_p).sum(1).mean()


def information(seen: Seen, prior: Tensor | None = None, balance: float = 1.0) -> Tensor:
    """Compute mean entropy plus the divergence of the mean prediction from the prior, in nats.

    With the uniform prior and ``balance`` 1 this is minus the mutual information of example and
    prediction, up to a constant (information maximisation).

    Args:
        seen: outputs of the model.
        prior: frequencies of the classes, (K,); None for equal frequencies.
        balance: weight of the divergence.
    """
    log_p = seen.logits.float().log_softmax(1)
    certain = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0).clamp_min(1e-12)
    expected = torch.full_like(mean, 1 / len(mean)) if prior is None else prior.to(mean)
    return certain + balance * (mean * (mean.log() - expected.clamp_min(1e-12).log())).sum()


def alignment(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """Compute how far the moments at the norm layers are from the running statistics of the checkpoint.

    This is the mean over channels and norm layers of KL(N(m, v) || N(rm, rv)) in nats, with moments (m, v)
    pooled over the batch. The first norm layer is left out, because its input does not depend on the weights.
    """
    parts = []
    for name in list(seen.moments)[1:]:
        norm_layer = norm_layers[name]
        here = pool(seen.moments[name], axes=0)
        var, rv = here.var[0] + norm_layer.eps, norm_layer.source.var + norm_layer.eps
        distance = (here.mean[0] - norm_layer.source.mean).square()
        parts.append(0.5 * (var / rv + distance / rv - 1 - (var / rv).log()).mean())
    return torch.stack(parts).mean() if parts else torch.zeros(())


def unlabeled(prior: Tensor | None = None) -> LabelFreeLoss:
    """Return self-labelling plus alignment, the best label-free objective for 25 examples per class or more.

    In a smaller set, one class may be twice as frequent as another by chance. Balanced labels are then wrong
    for some examples, and each wrong label costs a certain network more, so better networks score worse.

    Args:
        prior: frequencies of the classes, (K,); None for equal frequencies.
    """
    return lambda seen, norm_layers: self_labelling(seen, prior) + _ALIGNMENT * alignment(seen, norm_layers)


def unlabeled_step(prior: Tensor | None = None) -> LabelFreeLoss:
    """Return the loss for learning by gradient that belongs to :func:`unlabeled`."""
    return lambda seen, norm_layers: (
        self_labelling(seen, prior, *_LEARNED) + _ALIGNMENT * alignment(seen, norm_layers)
    )


def infomax(prior: Tensor | None = None) -> LabelFreeLoss:
    """Return information maximisation plus alignment; ``prior`` is that of :func:`unlabeled`.

    The class frequencies count three times as much as certainty, because a network may predict one class
    with certainty for many images that are shifted in different ways.
    """
    return lambda seen, norm_layers: information(seen, prior, balance=3.0) + alignment(seen, norm_layers)


def evalnorm(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """Compute how far each norm's output is from that in training (after Singh & Shrivastava 2019).

    This is the mean over norm layers of the mean squared difference between the output by the mixture of
    moments, as in inference, and the output by the moments of the batch, in units of gamma^2. Both are affine
    maps of the input x, so that the moments (m, v) of an example's x suffice:
    ``E[(a x + b)^2] = a^2 v + (a m + b)^2``.
    """
    parts = []
    for name, example in seen.moments.items():
        eps = norm_layers[name].eps
        running = seen.running.get(name, norm_layers[name].source)
        used = mix_example(seen.weights.get(name, ExampleWeight(0.0)), example, running, eps)
        batch = pool(example, axes=0)
        here, there = torch.rsqrt(used.total), torch.rsqrt(batch.var + eps)
        a, b = here - there, batch.mean * there - used.mean * here
        parts.append((a.square() * example.var + (a * example.mean + b).square()).mean())
    return torch.stack(parts).mean()


def estimated_prior(predictions: Tensor, iterations: int = 100) -> Tensor:
    """Estimate how often classes occur among examples from the predictions of a model for them.

    This is the maximum-likelihood estimate by the EM algorithm of Saerens et al. ("Adjusting the outputs of a
    classifier to new a priori probabilities", 2002) for a model with calibrated probabilities, trained with
    equally frequent classes. If it was trained with others, the estimate exaggerates them. One more example
    of each class is added, so that few examples of many classes exclude none.

    >>> sure = torch.eye(2).repeat_interleave(torch.tensor([58, 38]), 0)
    >>> estimated_prior(sure).round(decimals=2).tolist()
    [0.6, 0.4]

    Args:
        predictions: probabilities, (N, K).
        iterations: number of iterations.

    Returns:
        Frequencies (K,) that sum to 1, on the CPU.
    """
    found = predictions.cpu().double()
    count, num_classes = found.shape
    prior = found.mean(0)
    for _ in range(iterations):
        weighted = found * prior * num_classes
        prior = (weighted / weighted.sum(1, keepdim=True)).mean(0)
    return (count * prior + 1) / (count + num_classes)


def as_prior(prior: str | Sequence[float] | None, num_classes: int) -> Tensor | None:
    """Return a class prior (K,), scaled to sum to 1, from numbers or from text with commas between them.

    Raises:
        BnpatchError: there are not K numbers, or they are not proportions.
    """
    if prior is None:
        return None
    try:
        values = torch.tensor(
            [float(part) for part in (prior.split(",") if isinstance(prior, str) else prior)]
        )
    except ValueError:
        raise BnpatchError(f"{prior!r} is not a list of numbers", "write --class-prior 0.7,0.2,0.1") from None
    if len(values) != num_classes or bool((values < 0).any()) or not 0 < values.sum() < float("inf"):
        raise BnpatchError(
            f"a class prior of {counted(len(values), 'number')} does not fit {counted(num_classes, 'class')}",
            "give one share per class, in the order of the outputs",
        )
    return values / values.sum()
