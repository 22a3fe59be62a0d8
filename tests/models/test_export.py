import numpy as np
import onnx
import onnx_ir as ir
import pytest
import timm
import torch
from onnx import helper
from torch import nn

import bnpatch
from bnpatch.core.errors import BnpatchError
from bnpatch.core.patch import PatchWeights
from bnpatch.models.export import ParityError, export_onnx
from bnpatch.models.onnx_model import OnnxModel
from bnpatch.models.running_stats import re_estimate_statistics
from tests.hostile import classifying
from tests.models.small import INPUTS, assert_close
from tests.nn.norms import images, settle
from tests.nn.test_calibrated_norms import CALIBRATED
from tests.onnx.build import batch_norm


@pytest.fixture(autouse=True)
def _seeded():
    """Models that are made without a seed of their own are the same in every run."""
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "test_efficientnet",
        "test_byobnet",
        "resnet10t",
    ],
)
def test_export_of_timm_models(name, tmp_path):
    module = bnpatch.patch(settle(timm.create_model(name, num_classes=5)), 0.1)
    done = bnpatch.export_onnx(module, tmp_path / "model.onnx", images(2, 3, 96, 96))
    assert done.max_deviation < 1e-4
    assert len(done.patched) > 3
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    graph = onnx.load(tmp_path / "model.onnx").graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    alphas = {norm_layer.alpha for norm_layer in bnpatch.inventory(module).norm_layers}
    assert alphas == {0.1}  # the module is as it was


@pytest.mark.slow
def test_norm_layers_at_their_baseline_stay_as_they_were(checkpoint, exporter, tmp_path):
    model = bnpatch.load(checkpoint)
    names = list(model.alphas())
    model.set_alphas({names[0]: 0.2})
    done = export_onnx(model, tmp_path / "model.onnx")
    assert done.patched == (names[0],)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    # The patched one keeps its own, see bnpatch/onnx/formulas.py.
    assert operators.count("BatchNormalization") == len(names)
    assert operators.count("GlobalAveragePool") == 2


@pytest.mark.parametrize("kind", ["global", "per-site"])
def test_alphas_can_stay_adjustable(checkpoint, exported, tmp_path, kind):
    import onnxruntime

    model = bnpatch.load(exported)
    model.set_alphas(0.1)
    export_onnx(model, tmp_path / "model.onnx", alpha_inputs=kind)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    x = images(2, 1, 32, 32)
    assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model.predict(x))
    model.set_alphas(0.7)
    alphas = {value.name: np.array(0.7, np.float32) for value in session.get_overridable_initializers()}
    assert len(alphas) == (1 if kind == "global" else 12)
    (y,) = session.run(None, {"input": x.numpy(), **alphas})
    assert_close(torch.from_numpy(y), model.predict(x))


def test_a_file_that_deviates_does_not_stay(checkpoint, exporter, tmp_path, monkeypatch):
    from bnpatch.models import torch_export

    def spoil(module, x, names):
        made = exporter(module, x, names)
        for value in made.graph.initializers.values():
            if value.name.endswith("running_var"):
                value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
        return made

    monkeypatch.setattr(torch_export, "module_to_graph", spoil)
    model = bnpatch.load(checkpoint)
    model.set_alphas(0.1)
    (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ParityError, match=r"deviates by .* more than rounding"):
        export_onnx(model, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


def not_finite(tmp_path):
    """A graph that returns nan for some random images, and the path of its file."""
    nodes = [batch_norm(output="n"), helper.make_node("Sqrt", ["n"], ["h"])]
    (tmp_path / "in.onnx").write_bytes(classifying(nodes).SerializeToString())
    return bnpatch.load(tmp_path / "in.onnx")


def test_a_model_that_returns_nan_is_exported(tmp_path):
    model = not_finite(tmp_path)
    model.set_alphas(0.3)
    x = images(2, 3, 8, 8)
    assert model.predict(x).isnan().any()
    export_onnx(model, tmp_path / "model.onnx")
    assert bnpatch.load(tmp_path / "model.onnx").predict(x).isnan().any()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_file_that_alone_returns_nan_does_not_stay(tmp_path, monkeypatch, batch):
    """In any of the batches that are compared."""
    model = not_finite(tmp_path)
    predict = OnnxModel.predict

    def spoiled(self, x):
        y = predict(self, x).nan_to_num(1.0)
        return y * float("nan") if self is not model and len(x) == batch else y

    monkeypatch.setattr(OnnxModel, "predict", spoiled)
    with pytest.raises(ParityError, match="deviates by nan"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_a_checkpoint_of_a_model_that_returns_nan_needs_no_trust(checkpoint, tmp_path):
    model = bnpatch.load(checkpoint)
    with torch.no_grad():
        model.module.fc.weight.copy_(torch.tensor([3e38, -3e38]).repeat(480).view(10, 96))
    x = images(2, 1, 32, 32)
    assert not model.predict(x).isfinite().all()
    assert model.save(tmp_path / "model.pt", model.recipe())  # by the name of its architecture, not pickled
    assert torch.equal(bnpatch.load(tmp_path / "model.pt").predict(x).isnan(), model.predict(x).isnan())


def test_a_model_that_torch_cannot_export_is_said(tmp_path, capfd):
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) if x.sum().item() > 0 else x

    with pytest.raises(BnpatchError, match=r"torch can't export the model: .*data-dependent"):
        bnpatch.export_onnx(bnpatch.patch(Branches(), 0.1), tmp_path / "model.onnx", images(2, 3, 4, 4))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_large_models_keep_their_tensors_beside_the_file(checkpoint, exporter, tmp_path):
    model = bnpatch.load(checkpoint)
    model.set_alphas(0.1)
    export_onnx(model, tmp_path / "model.onnx", external_data_threshold=1000)
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    x = images(2, 1, 32, 32)
    assert_close(bnpatch.load(tmp_path / "model.onnx").predict(x), model.predict(x))


@pytest.mark.slow
def test_lambda_costs_nothing_in_the_file(checkpoint, exporter, tmp_path, clean):
    """Other running statistics at alpha = 0: the same operators as before, and the outputs of the model."""
    model = bnpatch.load(checkpoint)
    export_onnx(model, tmp_path / "plain.onnx")
    examples = bnpatch.open_examples(clean, model)
    model.set_state(model.state.with_re_estimated(re_estimate_statistics(model, examples)))
    names = list(model.alphas())
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.7)))
    done = export_onnx(model, tmp_path / "moved.onnx")
    assert set(done.patched) == set(names)
    plain, moved = (onnx.load(tmp_path / f"{n}.onnx").graph.node for n in ("plain", "moved"))
    assert [n.op_type for n in moved if n.op_type != "Constant"] == [
        n.op_type for n in plain if n.op_type != "Constant"
    ]
    x = torch.from_numpy(clean[0][:8, None])
    again = bnpatch.load(tmp_path / "moved.onnx")
    assert_close(again.predict(x), model.predict(x))
    from_file = bnpatch.load(tmp_path / "plain.onnx")
    from_file.apply(model.recipe())
    export_onnx(from_file, tmp_path / "again.onnx")
    assert_close(bnpatch.load(tmp_path / "again.onnx").predict(x), model.predict(x))


class SideBySide(nn.Module):
    """Every kind of norm that waits for moments, each with a convolution before it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList(make() for make, _ in CALIBRATED.values())

    def forward(self, x):
        x = self.conv(x)
        return torch.cat([norm(x).tanh().mean(3) for norm in self.norms], 1).flatten(1)


@pytest.mark.slow
def test_calibrated_norms_are_exported(tmp_path):
    module = SideBySide().eval()
    bnpatch.calibrate(module, INPUTS)
    names = {f"norms.{i}" for i in range(len(CALIBRATED))}
    identities = {
        norm_layer.name: norm_layer.baseline_alpha for norm_layer in bnpatch.inventory(module).norm_layers
    }
    assert identities.keys() == names
    for alphas in (identities, 0.4):
        bnpatch.patch(module, alphas)
        done = bnpatch.export_onnx(module, tmp_path / "model.onnx", INPUTS[:2])
        assert done.max_deviation < 1e-4
    assert set(done.patched) == names
    bnpatch.unpatch(module)
    for norm, (make, _) in zip(module.norms, CALIBRATED.values(), strict=True):
        assert type(norm) is type(make())
        assert getattr(norm, "running_mean", None) is None


def test_a_checkpoint_keeps_lambda_and_calibrated_moments(tmp_path):
    module = timm.create_model("test_efficientnet_gn", num_classes=5).eval()
    model = bnpatch.load(module, preprocessing={"img_size": 32})
    x = images(12, 3, 32, 32)
    bnpatch.calibrate(model, x)
    model.set_state(
        model.state.with_re_estimated(
            re_estimate_statistics(model, bnpatch.open_examples((2 * x, np.zeros(12, int)), model))
        )
    )
    names = list(model.alphas())
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.8), dict.fromkeys(names[:3], 0.3)))
    model.save(tmp_path / "model.pt", model.recipe())
    again = bnpatch.load(tmp_path / "model.pt", unsafe_load=True)
    assert torch.equal(again.predict(x), model.predict(x))
    assert again.recipe().to_json() == model.recipe().to_json()


@pytest.mark.slow
def test_single_values_are_weighed_where_asked(checkpoint, exporter, tmp_path):
    """By the model, its recipe, its export, and the export with the recipe alike; not by default."""
    x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model = bnpatch.load(checkpoint, include_1x1=True)
    assert (1, 1) in model.norm_shapes().values()
    exported = bnpatch.export_onnx(model, tmp_path / "plain.onnx").path
    model.set_alphas(0.5)
    weighed, recipe = model.predict(x), bnpatch.Recipe.from_json(model.recipe().to_json())
    assert len(bnpatch.export_onnx(model, tmp_path / "weighed.onnx").patched) == 15
    other = bnpatch.load(checkpoint)
    other.set_alphas(0.5)
    assert (other.predict(x) - weighed).abs().max() > 0.1
    for fresh in (bnpatch.load(checkpoint), bnpatch.load(exported)):
        fresh.apply(recipe)
        assert_close(fresh.predict(x), weighed)


def test_what_only_training_reaches_is_not_exported(tmp_path):
    """Inception and GoogLeNet have classifiers beside the last one, which serve in training alone."""

    class WithAuxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.auxiliary = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.body(x)
            if self.training:
                x = x + self.auxiliary(x)
            return self.head(x.mean((2, 3)))

    model = bnpatch.patch(settle(WithAuxiliary()), alpha=0.2)
    assert len(bnpatch.inventory(model).norm_layers) == 2
    done = export_onnx(model, tmp_path / "m.onnx", images(2, 3, 16, 16))
    assert done.patched == ("body.1",)


def of_axes(axes, seed=0):
    """A small classifier of inputs (N, 3, *spatial) with so many spatial axes."""
    torch.manual_seed(seed)
    conv, norm = (getattr(nn, f"{name}{axes}d") for name in ("Conv", "BatchNorm"))
    return settle(nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 4, 3), norm(4), nn.Flatten()))


@pytest.mark.parametrize(
    "axes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_signals_images_and_volumes_are_exported(axes, tmp_path):
    x = images(2, 3, *(6,) * axes)
    done = bnpatch.export_onnx(bnpatch.patch(of_axes(axes), 0.2), tmp_path / "model.onnx", x)
    assert len(done.patched) == 2
    assert bnpatch.load(tmp_path / "model.onnx").predict(x).shape == (2, 4 * 2**axes)


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float16, True),
        (torch.bfloat16, False),
        pytest.param(torch.float64, True, marks=pytest.mark.slow),
        pytest.param(torch.float64, False, marks=pytest.mark.slow),
        pytest.param(torch.float16, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_a_module_of_any_precision_is_exported(dtype, given, tmp_path):
    """In float32, or in float16 if the inputs are: onnxruntime has no other convolutions on a CPU."""
    module = bnpatch.patch(of_axes(2), 0.2).to(dtype)
    x = images(2, 3, 6, 6)
    bnpatch.export_onnx(module, tmp_path / "model.onnx", x.to(dtype) if given else x)
    file = bnpatch.load(tmp_path / "model.onnx")
    assert file.dtype == (dtype if given and dtype == torch.float16 else torch.float32)
    expected = module(x.to(dtype)).float()
    # Half of a unit of the eight bits of bfloat16, in each of a few layers.
    assert_close(file.predict(x).float(), expected, 2e-2)
    assert {p.dtype for p in module.parameters()} == {dtype}
