import math

import pytest
import torch
import torch.nn.functional as F

from bnpatch.core.errors import BnpatchError
from bnpatch.core.inventory import NormFacts
from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.nn.functional import example_moments, weighted_norm
from bnpatch.search.label_free import (
    Seen,
    alignment,
    as_prior,
    entropy,
    evalnorm,
    infomax,
    information,
    self_labelling,
    self_labels,
    unlabeled,
    unlabeled_step,
)


def seen(logits=None, moments=None, weights=None, running=None):
    logits = torch.zeros(4, 3) if logits is None else logits
    return Seen(logits, moments or {}, weights or {}, running or {})


def test_entropy_is_that_of_the_predictions():
    sure, unsure = torch.tensor([[50.0, 0, 0]]), torch.zeros(1, 3)
    assert entropy(seen(sure), {}).item() == pytest.approx(0, abs=1e-6)
    assert entropy(seen(unsure), {}).item() == pytest.approx(math.log(3))


def test_information_wants_certain_and_balanced_predictions():
    balanced = 50 * torch.eye(3)
    collapsed = 50 * torch.eye(3)[[0, 0, 0]]
    unsure = torch.zeros(3, 3)
    values = [information(seen(logits)).item() for logits in (balanced, unsure, collapsed)]
    assert values == pytest.approx([0, math.log(3), math.log(3)], abs=1e-5)


def test_a_prior_says_what_balanced_means():
    logits = 50 * torch.eye(3)[[0, 0, 0, 1]]
    fitting, uniform = torch.tensor([0.75, 0.25, 0.0]), None
    assert information(seen(logits), fitting).item() == pytest.approx(0, abs=1e-5)
    assert information(seen(logits), uniform).item() > 0.5


def by_logarithms(log_p, prior, temperature, iterations):
    """Sinkhorn's iterations in the form that can't underflow."""
    scaled, (n, k) = log_p.double() / temperature, log_p.shape
    u, v = -scaled.amax(1), torch.zeros(k).double()
    for _ in range(iterations):
        v = (n * prior).log() - (scaled + u[:, None]).logsumexp(0)
        u = -(scaled + v).logsumexp(1)
    return (scaled + u[:, None] + v).exp()


@pytest.mark.parametrize("prior", [None, torch.tensor([0.6, 0.3, 0.1])])
def test_self_labels_are_a_transport_plan(prior):
    """Against the plain iterations: probabilities of each example, and classes as often as expected."""
    generator = torch.Generator().manual_seed(0)
    log_p = (torch.randn(40, 3, generator=generator) + torch.tensor([3.0, 0.0, 0.0])).log_softmax(1)
    assert (log_p.argmax(1) == 0).double().mean() > 0.8  # what the network takes for one class
    expected = torch.full((3,), 1 / 3).double() if prior is None else prior.double()
    for temperature, iterations in ((0.3, 100), (0.1, 30)):
        found = self_labels(log_p, prior, temperature, iterations)
        torch.testing.assert_close(found.sum(1), torch.ones(40).double())
        torch.testing.assert_close(found, by_logarithms(log_p, expected, temperature, iterations))
    torch.testing.assert_close(self_labels(log_p, prior, 0.3, 100).mean(0), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mean(0), expected, atol=0.03, rtol=0)


def test_self_labels_leave_a_class_to_the_examples_that_are_surest_of_it():
    logits = torch.tensor([[9.0, 0, 0], [8, 1, 0], [7, 0, 1], [9, 0, 0], [8, 2, 0], [7, 0, 2]])
    labels = self_labels(logits.log_softmax(1), None, 0.3, 100)
    assert labels.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert self_labelling(seen(logits)).item() > 3  # though each prediction is certain
    assert self_labelling(seen(50 * torch.eye(3))).item() == pytest.approx(0, abs=1e-6)


def test_self_labels_of_a_class_that_nobody_predicts_are_finite():
    logits = torch.cat([torch.full((6, 1), 5000.0), torch.zeros(6, 2)], 1).requires_grad_()
    loss = self_labelling(seen(logits))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    absent = self_labels(logits.log_softmax(1), torch.tensor([1.0, 0.0, 0.0]), 0.3, 100)
    assert absent.argmax(1).tolist() == [0] * 6


def test_alignment_is_the_divergence_of_normal_distributions():
    """Against torch.distributions, with moments pooled over the examples; the first norm layer does not
    count.
    """
    x = torch.randn(5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    source = Moments(torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64))
    facts = {"first": NormFacts(source, 1e-5), "second": NormFacts(source, 1e-5)}
    found = alignment(seen(moments={"first": example_moments(x * 100), "second": example_moments(x)}), facts)
    values = x.movedim(1, 0).flatten(1)
    here = torch.distributions.Normal(values.mean(1), (values.var(1, unbiased=False) + 1e-5).sqrt())
    there = torch.distributions.Normal(source.mean, (source.var + 1e-5).sqrt())
    assert found.item() == pytest.approx(
        torch.distributions.kl_divergence(here, there).mean().item(), rel=1e-9
    )


def test_evalnorm_is_the_squared_difference_of_outputs():
    """Against the outputs themselves, at any alpha and running statistics."""
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5 + 2
    running = Moments(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double())
    here = weighted_norm(x, running, None, None, 1e-5, 0.3)
    there = F.batch_norm(x, None, None, training=True, eps=1e-5)
    value = evalnorm(
        seen(
            moments={"site": example_moments(x)},
            weights={"site": ExampleWeight(0.3)},
            running={"site": running},
        ),
        {"site": NormFacts(running, 1e-5)},
    )
    assert value.item() == pytest.approx((here - there).square().mean().item(), rel=1e-9)


def test_the_objectives_are_sums():
    generator = torch.Generator().manual_seed(0)
    moments = {name: example_moments(torch.randn(8, 4, 7, generator=generator) + 1) for name in "ab"}
    state = seen(torch.randn(8, 3, generator=generator), moments)
    facts = dict.fromkeys("ab", NormFacts(Moments(torch.zeros(4), torch.ones(4)), 1e-5))
    aligned = alignment(state, facts).item()
    assert aligned > 0.1
    assert unlabeled()(state, facts).item() == pytest.approx(self_labelling(state).item() + 0.3 * aligned)
    labels = self_labels(state.logits.log_softmax(1), None, 0.1, 30)
    hard = F.cross_entropy(state.logits.double(), labels).item()
    assert unlabeled_step()(state, facts).item() == pytest.approx(hard + 0.3 * aligned)
    informed = information(state, balance=3.0).item()
    assert infomax()(state, facts).item() == pytest.approx(informed + aligned)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ("0.5,x,0.2", "not a list of numbers"),
        ("0.5,0.5", "2 numbers does not fit 3 classes"),
        ([0.5, -0.1, 0.6], "does not fit"),
        ([0, 0, 0], "does not fit"),
    ],
)
def test_bad_priors_are_refused(prior, message):
    with pytest.raises(BnpatchError, match=message):
        as_prior(prior, 3)


def test_a_prior_is_scaled():
    assert as_prior("2,1,1", 3).tolist() == [0.5, 0.25, 0.25]
    assert as_prior(None, 3) is None
