import onnx2torch
import pytest
import torch

import bnpatch
from bnpatch.core.patch import PatchWeights
from bnpatch.models.running_stats import re_estimate_statistics, recover_fused
from bnpatch.models.torch_model import TorchModel
from tests.nn.norms import images

X = images(6, 1, 32, 32) * torch.tensor([0.2, 0.5, 1, 2, 3, 4]).view(-1, 1, 1, 1)  # at many distances


def assert_agree(copy, model):
    """Rounding grows with the largest output: single outputs near 0 have errors of the size of that."""
    expected = model.predict(X)
    torch.testing.assert_close(copy.predict(X), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_copy_in_torch_computes_the_same_and_has_gradients(exported):
    model = bnpatch.load(exported)
    copy = model.with_gradients(X)
    assert isinstance(copy, TorchModel)
    names = list(model.alphas())
    assert list(copy.alphas()) == names
    model.set_state(
        model.state.with_re_estimated(
            re_estimate_statistics(model, bnpatch.open_examples((X.numpy(), [0] * len(X)), model))
        )
    )
    weights = PatchWeights(*(dict.fromkeys(names, value) for value in (0.2, 0.5, 1.5)))
    copy.set_state(model.state)
    for one in (model, copy):
        one.set_weights(weights)
    assert_agree(copy, model)
    layer = copy.module.get_submodule(names[1])
    layer.alpha = torch.tensor(0.2, requires_grad=True)
    copy.forward(X).square().sum().backward()
    assert layer.alpha.grad.abs() > 0


@pytest.mark.slow
def test_norm_layers_that_were_recovered_are_in_the_copy(folded):
    model = bnpatch.load(folded)
    recover_fused(model, (X.numpy(), [0] * len(X)))
    copy = model.with_gradients(X)
    for one in (model, copy):
        one.set_alphas(0.3)
    assert_agree(copy, model)


@pytest.mark.parametrize("problem", ["cannot", "other outputs", "other norm layers"])
def test_no_copy_is_better_than_a_wrong_one(exported, monkeypatch, problem):
    model, convert = bnpatch.load(exported), onnx2torch.convert
    assert model.with_gradients(X) is not None

    def wrong(proto):
        module = convert(proto)
        if problem == "cannot":
            raise NotImplementedError
        norm = next(m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d))
        if problem == "other outputs":
            norm.bias.data += 0.1
        else:
            norm.__class__ = type("Other", (torch.nn.BatchNorm2d,), {})
        return module

    monkeypatch.setattr(onnx2torch, "convert", wrong)
    assert model.with_gradients(X) is None
