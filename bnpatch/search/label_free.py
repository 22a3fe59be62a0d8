"""What a setting is judged by where there are no labels: the predictions and the moments alone.

Unlike the metrics of labelled examples these are functions of a set of examples, not means over them. Each
is a scalar of which less is better, and has gradients.

What they can't see: none of them knows the classes. *Self-labelling* and *information maximisation* want
predictions that are certain, and all classes equally often (or as often as ``prior`` says): on data with
other proportions they are wrong by that much. *Entropy* wants certainty alone, which a network under a
strong shift has when it takes everything for one class. *Alignment* and *EvalNorm* never look at the
predictions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import Moments, mix, pool

# Temperature and iterations of self-labels: those that weights are judged by are balanced but for a few
# percent; those to learn from are harder, and balanced halfway, which leads out of more dead ends (see
# docs/decisions/0009 for both).
_JUDGED, _LEARNED = (0.3, 100), (0.1, 30)

# Of the alignment, which says less than the predictions do.
_ALIGNMENT = 0.3


@dataclass(frozen=True)
class Seen:
    """What a model did with a batch.

    Attributes:
        logits: (N, K).
        moments: of each example at the input of each norm layer, (N, C), by name.
        alphas: the weight of the example by name of norm layer; a number or a 0-dim tensor.
        running: running mean and variance (C,) in use, by name of norm layer, where not those of the
            checkpoint.
    """

    logits: Tensor
    moments: Mapping[str, Moments[Tensor]]
    alphas: Mapping[str, float | Tensor]
    running: Mapping[str, Moments[Tensor]]


Objective = Callable[[Seen, Mapping[str, NormFacts]], Tensor]


def entropy(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """Mean entropy of the predictions, in nats (Wang et al. 2021, TENT)."""
    log_p = seen.logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def self_labels(log_p: Tensor, prior: Tensor | None, temperature: float, iterations: int) -> Tensor:
    """Labels that agree with the predictions, though the classes occur as often as they should.

    The plan of optimal transport from examples to classes, at the cost of the negative log-probabilities and
    with a little entropy, by iterations of Sinkhorn and Knopp (Asano et al. 2020, "Self-labelling via
    simultaneous clustering and representation learning"; Cuturi 2013). Of examples that a network takes for
    one class, all with certainty, those keep it that it is surest of; the others get what comes next.

    Args:
        log_p: logarithms of the predicted probabilities, (N, K).
        prior: how often the classes occur, (K,); None for equally often.
        temperature: weight of the entropy, in nats; little makes hard labels.
        iterations: with few of them, classes that nobody predicts get less than their share.

    Returns:
        Probabilities (N, K), without gradient.
    """
    count, num_classes = log_p.shape
    with torch.no_grad():
        log_p = (log_p.cpu() if log_p.device.type == "mps" else log_p).double()  # which Apple's GPUs lack
        # Relative to the best of each example, and no further from it than exp() can tell.
        scaled = (log_p - log_p.amax(1, keepdim=True)) / temperature
        kernel = scaled.clamp_min(-600).exp()
        share = kernel.new_full((num_classes,), 1 / num_classes) if prior is None else prior.to(kernel)
        by_example = kernel.new_ones(count)
        for _ in range(iterations):
            by_class = count * share / (by_example @ kernel)
            by_example = 1 / (kernel @ by_class)
        return by_example[:, None] * kernel * by_class


def self_labelling(
    seen: Seen, prior: Tensor | None = None, temperature: float = _JUDGED[0], iterations: int = _JUDGED[1]
) -> Tensor:
    """Mean cross-entropy of the predictions with :func:`self_labels` made of them, in nats."""
    log_p = seen.logits.float().log_softmax(1)
    labels = self_labels(log_p, prior, temperature, iterations)
    return -(labels.to(log_p) * log_p).sum(1).mean()


def information(seen: Seen, prior: Tensor | None = None, balance: float = 1.0) -> Tensor:
    """Mean entropy of the predictions plus the divergence of the mean prediction from the prior, in nats.

    With the uniform prior and ``balance`` 1 this is minus the mutual information of example and
    prediction, up to a constant (information maximisation).

    Args:
        seen: what the model did.
        prior: how often the classes occur, (K,); None for equally often.
        balance: weight of the divergence.
    """
    log_p = seen.logits.float().log_softmax(1)
    certain = -(log_p.exp() * log_p).sum(1).mean()
    mean = log_p.exp().mean(0).clamp_min(1e-12)
    expected = torch.full_like(mean, 1 / len(mean)) if prior is None else prior.to(mean)
    return certain + balance * (mean * (mean.log() - expected.clamp_min(1e-12).log())).sum()


def alignment(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """How far the inputs of the norms are from what the running moments of the checkpoint describe.

    The mean over channels and norm layers of KL(N(m, v) || N(rm, rv)) in nats, with the moments (m, v) pooled
    over the batch. The first norm layer is left out: what reaches it is the same whatever the weights.
    """
    parts = []
    for name in list(seen.moments)[1:]:
        norm_layer = norm_layers[name]
        here = pool(seen.moments[name], axes=0)
        var, rv = here.var[0] + norm_layer.eps, norm_layer.source.var + norm_layer.eps
        distance = (here.mean[0] - norm_layer.source.mean).square()
        parts.append(0.5 * (var / rv + distance / rv - 1 - (var / rv).log()).mean())
    return torch.stack(parts).mean() if parts else torch.zeros(())


def unlabeled(prior: Tensor | None = None) -> Objective:
    """Self-labelling plus alignment: what tells most without labels, of 25 examples of each class or more.

    Of fewer a set holds one class twice as often as another by chance, and each label that is forced on an
    example then costs the more the surer the network is: better networks would be judged as worse.

    Args:
        prior: how often the classes occur, (K,); None for equally often.
    """
    return lambda seen, norm_layers: self_labelling(seen, prior) + _ALIGNMENT * alignment(seen, norm_layers)


def unlabeled_step(prior: Tensor | None = None) -> Objective:
    """What to go down by gradient for :func:`unlabeled`."""
    return lambda seen, norm_layers: (
        self_labelling(seen, prior, *_LEARNED) + _ALIGNMENT * alignment(seen, norm_layers)
    )


def infomax(prior: Tensor | None = None) -> Objective:
    """Information maximisation plus alignment; ``prior`` as of :func:`unlabeled`.

    Classes in proportion count three times as much as certainty. Where images are shifted in different
    ways, a network is certain of many that it takes for one and the same class.
    """
    return lambda seen, norm_layers: information(seen, prior, balance=3.0) + alignment(seen, norm_layers)


def evalnorm(seen: Seen, norm_layers: Mapping[str, NormFacts]) -> Tensor:
    """How far each norm's output is from what it would be in training (after Singh & Shrivastava 2019).

    The mean over norm layers of the squared difference of the output at inference, by the mixture of moments,
    and the output by the moments of the batch, over all values, in units of gamma^2. Both are affine maps of
    the input x, so that the moments (m, v) of an example's x are enough:
    ``E[(a x + b)^2] = a^2 v + (a m + b)^2``.
    """
    parts = []
    for name, example in seen.moments.items():
        eps = norm_layers[name].eps
        used = mix(seen.alphas.get(name, 0.0), example, seen.running.get(name, norm_layers[name].source))
        batch = pool(example, axes=0)
        here, there = torch.rsqrt(used.var + eps), torch.rsqrt(batch.var + eps)
        a, b = here - there, batch.mean * there - used.mean * here
        parts.append((a.square() * example.var + (a * example.mean + b).square()).mean())
    return torch.stack(parts).mean()


def as_prior(prior: str | Sequence[float] | None, num_classes: int) -> Tensor | None:
    """A class prior (K,), scaled to sum to 1, from numbers or from text with commas between them.

    Raises:
        BnpatchError: there are not K numbers, or they are no proportions.
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
            f"a class prior of {len(values)} numbers does not fit {num_classes} classes",
            "give one share per class, in the order of the outputs",
        )
    return values / values.sum()
