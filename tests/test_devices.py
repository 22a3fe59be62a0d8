"""Devices without having one: PyTorch's fake tensors know where they are, and refuse to be mixed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bnpatch
from bnpatch.core.moments import Moments
from bnpatch.core.norm_spec import NormSpec
from bnpatch.core.patch import PatchWeights
from bnpatch.data.preprocessing import Preprocessing
from bnpatch.models.outputs import Output
from bnpatch.models.torch_model import TorchModel
from bnpatch.nn.training_norm import convert_norms
from bnpatch.search import label_free
from bnpatch.search.gradient_search import Learner, Problem, Start
from bnpatch.search.objective import seen_by

DEVICE = torch.device("cuda", 0)
IMAGES = (4, 3, 8, 8)


@pytest.fixture(autouse=True)
def fake():
    with FakeTensorMode():
        yield


@pytest.fixture
def model():
    with DEVICE:
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6),
            nn.Flatten(),
            nn.Linear(96, 10),
        )
    module.to = lambda device: module  # it is there; fake parameters can't be moved
    values = Preprocessing(IMAGES[1:], (0.5, 0.4, 0.3), (0.5, 0.5, 0.5))
    return TorchModel(
        module.eval(), name="fake", preprocessing=values, device=DEVICE, output=Output("", (10,))
    )


def images():
    """Bytes on the host, as data loaders give them."""
    return torch.zeros(IMAGES, dtype=torch.uint8)


def are_there(moments):
    return bool(moments) and all(part.device == DEVICE for m in moments.values() for part in (m.mean, m.var))


def everywhere(model, alpha, lambda_):
    names = [norm_layer.name for norm_layer in model.inventory().norm_layers]
    return PatchWeights(dict.fromkeys(names, alpha), dict.fromkeys(names, lambda_))


def test_fakes_refuse_to_be_mixed():
    with pytest.raises(RuntimeError, match=r"[Dd]evice"):
        torch.zeros(2, device=DEVICE) + torch.zeros(2)


def test_a_patched_model_predicts(model):
    assert model.predict(images()).device == DEVICE
    model.set_alphas(0.3)
    assert model.predict(images()).device == DEVICE
    assert model.predict(torch.zeros(IMAGES)).device == DEVICE


@pytest.mark.parametrize("where", ["host", "device", "numbers"])
def test_moments_may_be_anywhere(model, where):
    outputs, moments = model.observe(images())
    assert outputs.device == DEVICE
    assert are_there(moments)
    found = model.moments_by_batch(images())
    assert are_there(found)
    if where == "host":
        found = {name: Moments(m.mean.cpu(), m.var.cpu()) for name, m in found.items()}
    elif where == "numbers":
        found = {name: Moments([0.0] * len(m.mean), [1.0] * len(m.var)) for name, m in found.items()}
    model.set_state(model.state.with_re_estimated(found))
    model.set_weights(everywhere(model, 0.2, 0.5))
    assert are_there(model.statistics_in_use())
    assert model.predict(images()).device == DEVICE


def test_learned_weights_stay_on_the_device(model):
    names = [norm_layer.name for norm_layer in model.inventory().norm_layers]
    channels = {norm_layer.name: norm_layer.num_channels for norm_layer in model.inventory().norm_layers}
    model.set_state(
        model.state.with_re_estimated(
            {name: Moments(torch.zeros(n), torch.ones(n)) for name, n in channels.items()}
        )
    )
    model.set_weights(everywhere(model, 0.0, 0.0))
    by_name = {name: name for name in names}
    start = Start(
        everywhere(model, 0.3, 0.5),
        {"alpha": by_name, "lambda": dict.fromkeys(names, "all"), "slope": by_name},
    )
    learner = Learner(Problem(model, None, np.arange(4), None, model.state), start, 4, 0.4)
    learner._set_learned()
    assert model.forward(images()).device == DEVICE


@pytest.mark.parametrize(
    "objective",
    ["unlabeled", "unlabeled step", "unlabeled with a prior", "infomax", "alignment", "entropy", "evalnorm"],
)
def test_objectives_stay_on_the_device(model, objective):
    judge = {
        "unlabeled": label_free.unlabeled(),
        "unlabeled step": label_free.unlabeled_step(),
        "infomax": label_free.infomax(),
        "unlabeled with a prior": label_free.unlabeled(torch.full((10,), 0.1)),
    }.get(objective) or getattr(label_free, objective)
    model.set_state(model.state.with_re_estimated(model.moments_by_batch(images())))
    model.set_weights(everywhere(model, 0.2, 0.5))
    assert judge(seen_by(model, *model.observe(images())), model.facts()).device == DEVICE


@pytest.mark.parametrize(
    "spec",
    [
        NormSpec(examples_per_group=2),
        NormSpec(channels_per_group=2),
        NormSpec(channels_per_group=2, examples_per_group=2),
        NormSpec(renorm=bnpatch.core.norm_spec.Renorm()),
    ],
    ids=str,
)
def test_training_stays_on_the_device(model, spec):
    module = convert_norms(model.module, spec).train()
    assert module(torch.zeros(IMAGES, device=DEVICE)).device == DEVICE
    running = [buffer for name, buffer in module.named_buffers() if "running" in name]
    assert running
    assert all(buffer.device == DEVICE for buffer in running)
