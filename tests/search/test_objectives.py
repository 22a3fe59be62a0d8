import math

import pytest
import torch
import torch.nn.functional as F

from bnpatch.errors import BnpatchError
from bnpatch.moments import Moments
from bnpatch.nn.norm import example_moments, weighed_norm
from bnpatch.search.objectives import Seen, alignment, as_prior, entropy, evalnorm, information, unlabeled
from bnpatch.sites import SiteFacts


def seen(logits=None, moments=None, alphas=None, running=None):
    logits = torch.zeros(4, 3) if logits is None else logits
    return Seen(logits, moments or {}, alphas or {}, running or {})


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
    tripled = [information(seen(logits), balance=3).item() for logits in (balanced, unsure, collapsed)]
    assert tripled == pytest.approx([0, math.log(3), 3 * math.log(3)], abs=1e-5)


def test_a_prior_says_what_balanced_means():
    logits = 50 * torch.eye(3)[[0, 0, 0, 1]]
    fitting, uniform = torch.tensor([0.75, 0.25, 0.0]), None
    assert information(seen(logits), fitting).item() == pytest.approx(0, abs=1e-5)
    assert information(seen(logits), uniform).item() > 0.5


def test_alignment_is_the_divergence_of_normal_distributions():
    """Against torch.distributions, with moments pooled over the examples; the first site does not count."""
    x = torch.randn(5, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    source = Moments(torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64))
    facts = {"first": SiteFacts(source, 1e-5), "second": SiteFacts(source, 1e-5)}
    found = alignment(seen(moments={"first": example_moments(x * 100), "second": example_moments(x)}), facts)
    values = x.movedim(1, 0).flatten(1)
    here = torch.distributions.Normal(values.mean(1), (values.var(1, unbiased=False) + 1e-5).sqrt())
    there = torch.distributions.Normal(source.mean, (source.var + 1e-5).sqrt())
    assert found.item() == pytest.approx(
        torch.distributions.kl_divergence(here, there).mean().item(), rel=1e-9
    )


def test_evalnorm_is_the_squared_difference_of_outputs():
    """Against the outputs themselves, at any alpha and running moments."""
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.5 + 2
    running = Moments(torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double())
    here = weighed_norm(x, running, None, None, 1e-5, 0.3)
    there = F.batch_norm(x, None, None, training=True, eps=1e-5)
    value = evalnorm(
        seen(moments={"site": example_moments(x)}, alphas={"site": 0.3}, running={"site": running}),
        {"site": SiteFacts(running, 1e-5)},
    )
    assert value.item() == pytest.approx((here - there).square().mean().item(), rel=1e-9)


def test_unlabeled_is_the_sum():
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    state = seen(logits)
    assert unlabeled(balance=2.0)(state, {}).item() == pytest.approx(information(state, balance=2.0).item())


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
