"""What only a CUDA device can show: the same results as on the CPU, in every precision that it has."""

import copy

import numpy as np
import pytest
import torch

import bnpatch
from bnpatch.finetune.config import Augmentation, FineTuneSettings
from bnpatch.finetune.data import RunExamples
from bnpatch.finetune.trainer import train
from bnpatch.models.latency import measure
from tests.closed_form import fog
from tests.search.tiny import classifier, small

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def module(digits):
    images, labels = digits[0]
    return classifier(small(images), labels)


@pytest.fixture(scope="module")
def dim(clean, module):
    """Digits with so little contrast that the classifier knows a third of them."""
    return fog(module, small(clean[0]), clean[1]), clean[1]


@pytest.fixture
def load(module):
    return lambda device="cuda", **options: bnpatch.load(copy.deepcopy(module), device=device, **options)


@pytest.mark.parametrize("metric", ["accuracy", "cross-entropy", "unlabeled"])
def test_a_search_finds_what_it_finds_on_the_cpu(load, dim, metric):
    """Sums are rounded otherwise there, so the search may end at another point of the same quality."""
    on_cpu, on_gpu = (
        bnpatch.tune_alpha(load(device), dim, metric=metric, seed=0) for device in ("cpu", "cuda")
    )
    assert on_gpu.verdict == on_cpu.verdict == "gain"
    first, second = (result.held_out.comparisons[0] for result in (on_cpu, on_gpu))
    assert second.before.value == pytest.approx(first.before.value, rel=1e-3, abs=2e-3)
    assert abs(second.change.value - first.change.value) < 0.1 * abs(first.change.value)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_in_every_precision(load, digits, clean, precision):
    model = load()
    data = [
        bnpatch.open_examples((small(images[:128]), labels[:128]), model)
        for images, labels in (digits[0], clean)
    ]
    settings = FineTuneSettings(
        epochs=2,
        batch_size=32,
        lr=0.01,
        precision=precision,
        augmentation=Augmentation(min_scale=1.0, hflip=0.0),
    )
    result = train(model, RunExamples(*data), settings)
    assert next(model.module.parameters()).device.type == "cuda"
    assert all(np.isfinite(epoch.train_loss) for epoch in result.history)


def test_a_compiled_model_follows_its_alphas(load, dim):
    model = load()
    x = torch.from_numpy(dim[0][:16, None]).float().cuda() / 255 - 0.5
    model.set_alphas(0.2)
    torch._dynamo.reset()
    compiled = torch.compile(model.module, fullgraph=True)
    for alpha in (0.2, 0.6):
        model.set_alphas(alpha)
        with torch.inference_mode():
            eager = model.module(x)
            deviation = (compiled(x) - eager).abs().max() / eager.abs().max()
        assert deviation < 5e-3  # convolutions of the device round to TF32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(load, dim, dtype):
    model, x = load(), torch.from_numpy(dim[0][:64, None]).float().cuda() / 127.5 - 1
    model.set_alphas(0.3)
    with torch.inference_mode():
        full = model.module(x)
        half = model.module.to(dtype)(x.to(dtype)).float()
    agree = (full.argmax(1) == half.argmax(1)).float().mean().item()
    assert agree > 0.9


def test_what_is_exported_agrees_with_the_device(load, dim, tmp_path):
    model = load()
    model.set_alphas(0.3)
    bnpatch.export_onnx(model, tmp_path / "patched.onnx")
    images = torch.from_numpy(dim[0][:16, None])
    exported = bnpatch.load(tmp_path / "patched.onnx", device="cpu")
    torch.testing.assert_close(exported.predict(images), model.predict(images).cpu(), rtol=1e-3, atol=1e-3)


def test_latency_waits_for_the_device(load):
    """Launching kernels takes as long for any batch; what counts is when they are done."""
    model = load()
    one, many = (measure(model, [{}], batch_size=n, seconds=0.5)[0].seconds for n in (1, 2**18))
    assert many > 3 * one


def test_learning_halves_its_batches_where_memory_is_short(load, dim, monkeypatch):
    """The allocator's own error, in the first step."""
    model = load()
    backward, sizes = torch.autograd.backward, []

    def limited(*parts, **options):
        sizes.append(len(sizes))
        if len(sizes) == 1:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        backward(*parts, **options)

    monkeypatch.setattr(torch.autograd, "backward", limited)
    result = bnpatch.tune_alpha(model, dim, metric="cross-entropy", granularity="layer")
    learned = next(candidate for candidate in result.candidates if candidate.name == "alpha per layer")
    assert len(set(learned.weights.alphas.values())) == 3
