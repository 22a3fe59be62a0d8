"""In inference mode on a CPU, NumPy computes the formula: what must not change with that."""

import copy
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from bnpatch.core.moments import ExampleWeight
from bnpatch.nn import functional
from bnpatch.nn.norm import ExampleWeightedNorm
from tests.nn.norms import batch_norm, sample


@pytest.fixture
def layer():
    return ExampleWeightedNorm.take_over(batch_norm(6).requires_grad_(False), ExampleWeight(0.3, 0.7, 1.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_inference_mode_computes_what_other_modes_do(layer, dtype):
    layer, x = copy.deepcopy(layer).to(dtype), sample((3, 6, 4, 4), dtype)
    with torch.inference_mode():
        found = layer(x)
    assert found.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x))


def test_code_that_is_recorded_depends_on_its_input(layer):
    x = sample((3, 6, 4, 4), torch.float32)

    def run(x):  # a tracer of modules would read the running variance, which warns
        return layer(x)

    with torch.inference_mode():
        for recorded in (make_fx(run)(x), torch.jit.trace(run, x), torch.compile(run, backend="eager")):
            torch.testing.assert_close(recorded(3 * x + 1), layer(3 * x + 1))
        each = torch.func.vmap(lambda one: layer(one[None])[0])(x)
        torch.testing.assert_close(each, layer(x))


def test_slope_zero_is_the_constant_alpha_bit_for_bit(layer):
    x = sample((3, 6, 4, 4), torch.float32)
    running, (weight, bias) = layer._moments(), (layer.weight.detach(), layer.bias.detach())
    with torch.inference_mode():
        y = [
            functional.weighted_norm(x, running, weight, bias, 1e-5, ExampleWeight(0.3, slope))
            for slope in (0.0, torch.tensor(0.0), torch.tensor(0.7))
        ]
    assert torch.equal(y[0], y[1])
    assert not torch.equal(y[0], y[2])


def test_infinite_examples_warn_no_one_and_leave_others_as_they_are(layer):
    x = sample((3, 6, 4, 4), torch.float32)
    strange = x.clone()
    strange[0], strange[1] = float("inf"), float("nan")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(strange)[2], layer(x)[2])
        assert layer(strange)[:2].isnan().all()
