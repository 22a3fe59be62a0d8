"""An ONNX file gives what the torch model gives that it was exported from."""

import json

import onnx
import pytest
import torch

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.models.export import export_onnx
from tests.models.small import assert_close
from tests.models.test_running_stats import INPUTS, small
from tests.nn.norms import images


def test_an_export_has_the_sites_of_the_checkpoint(checkpoint, exported):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    assert onnx_model.fingerprints() == torch_model.fingerprints()
    assert onnx_model.preprocessing.source == "the file's metadata, as of the checkpoint's training arguments"
    assert onnx_model.class_names == torch_model.class_names
    assert onnx_model.num_outputs() == 10
    assert onnx_model.norm_shapes() == torch_model.norm_shapes()


def test_what_a_file_knows_of_its_model_has_names_that_stay(exported):
    """Files that are out there have them."""
    metadata = {prop.key: json.loads(prop.value) for prop in onnx.load(exported).metadata_props}
    assert metadata["bnpatch.preprocessing"]["mean"] == list(bnpatch.load(exported).preprocessing.mean)
    assert metadata["bnpatch.class_names"] == [str(number) for number in range(10)]


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.6, 1.0])
def test_torch_and_onnxruntime_agree(checkpoint, exported, alpha, clean):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    x = torch.from_numpy(clean[0][:9, None])
    for model in (torch_model, onnx_model):
        model.set_alphas(alpha)
    # More rounding where alpha near 1 divides by small variances.
    assert_close(onnx_model.predict(x), torch_model.predict(x))


def test_a_recipe_of_one_applies_to_the_other(checkpoint, exported):
    torch_model, onnx_model = bnpatch.load(checkpoint), bnpatch.load(exported)
    names = list(torch_model.alphas())
    torch_model.set_alphas({name: 0.01 * index for index, name in enumerate(names)})
    onnx_model.apply(torch_model.recipe())
    assert onnx_model.alphas() == torch_model.alphas()
    x = images(4, 1, 32, 32)
    assert_close(onnx_model.predict(x), torch_model.predict(x))
    back = bnpatch.load(checkpoint)
    back.apply(onnx_model.recipe())
    assert back.alphas() == torch_model.alphas()


@pytest.mark.slow
def test_tuning_the_export_finds_what_tuning_the_checkpoint_finds(checkpoint, exported, foggy):
    """Scores differ by 1e-5 of them at most, those of two weights by 1e-3 at least, over ten seeds."""
    from_torch, from_onnx = (
        bnpatch.tune_alpha(bnpatch.load(p), foggy, granularity="global", metric="cross-entropy")
        for p in (checkpoint, exported)
    )
    assert from_onnx.alpha == from_torch.alpha > 0
    assert [trial.weight for trial in from_onnx.trials] == [trial.weight for trial in from_torch.trials]
    for a, b in zip(from_onnx.trials, from_torch.trials, strict=True):
        assert a.scores["cross-entropy"] == pytest.approx(b.scores["cross-entropy"], rel=1e-4)
    for a, b in zip(from_onnx.comparisons, from_torch.comparisons, strict=True):
        assert a.after.value == pytest.approx(b.after.value, abs=0.01)  # three examples of 300 on the edge


@pytest.mark.slow
def test_few_sessions_serve_the_whole_search(exported, foggy, monkeypatch):
    from bnpatch.models import onnx_model, onnx_sessions

    opened = []
    original = onnx_model.open_session
    for module in (onnx_model, onnx_sessions):
        monkeypatch.setattr(module, "open_session", lambda *args: opened.append(args) or original(*args))
    some = foggy[0][:320], foggy[1][:320]
    run = {"granularity": "stage", "recalibrate": True, "trials": 2, "holdout": 0.5}
    bnpatch.tune_alpha(bnpatch.load(exported), some, **run)
    # The file as it is; with weights as inputs; normalizing by the batch; and returning the moments. Bytes of
    # so little contrast say nothing of the preprocessing, so the moments for that are not asked for.
    assert len(opened) == 4


def test_the_model_is_left_as_it_was(exported, foggy):
    model = bnpatch.load(exported)
    bnpatch.tune_alpha(model, foggy, granularity="global", trials=2)
    assert not any(model.alphas().values())
    with pytest.raises(BnpatchError, match="no norm layer 'nope'"):
        model.set_alphas({"nope": 0.1})
    with pytest.raises(ValueError, match="must lie in"):
        model.set_alphas(2.0)


@pytest.mark.slow
def test_a_torch_export_program(tmp_path):
    torch_model = bnpatch.load(small())
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(torch_model.module, (INPUTS[:2],), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "model.pt2")
    model = bnpatch.load(tmp_path / "model.pt2")
    assert model.fingerprints() == torch_model.fingerprints()
    for alpha in (0.0, 0.2):
        model.set_alphas(alpha)
        torch_model.set_alphas(alpha)
        assert_close(model.predict(INPUTS), torch_model.predict(INPUTS))
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(BnpatchError, match=r"damaged or not a torch.export program"):
        bnpatch.load(tmp_path / "bad.pt2")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_provider_agrees_with_the_cpu(exported):
    x = images(4, 1, 32, 32)
    on_cpu, on_gpu = (bnpatch.load(exported, device=device) for device in ("cpu", "cuda"))
    for alpha in (0.0, 0.3):
        on_cpu.set_alphas(alpha)
        on_gpu.set_alphas(alpha)
        torch.testing.assert_close(on_gpu.predict(x), on_cpu.predict(x), rtol=1e-3, atol=1e-3)


def test_a_patched_file_says_that_it_is_one(exported, tmp_path):
    model = bnpatch.load(exported)
    model.set_alphas({name: 0.1 for name, shape in model.norm_shapes().items() if shape != (1, 1)})
    export_onnx(model, tmp_path / "patched.onnx")
    patched = bnpatch.load(tmp_path / "patched.onnx")
    with pytest.raises(BnpatchError, match=r"no norm layer 'conv1\.1'|belongs to a patch"):
        patched.set_alphas({"conv1.1": 0.1})
    assert "belongs to a patch" in patched.inventory().skipped_norms[0].reason
