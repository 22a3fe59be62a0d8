"""Real graphs: those that the onnx package ships, and exports of timm's test models."""

from pathlib import Path

import numpy as np
import onnx.backend.test
import onnx_ir as ir
import pytest

from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.io import load
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import check, session

LIGHT = Path(onnx.backend.test.__file__).parent / "data" / "light"
SITES = {"densenet121": 121, "inception_v2": 69, "resnet50": 53, "shufflenet": 49}


def output(proto, x):
    s = session(proto)
    return s.run(None, {s.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize(
    "name", [name if name == "shufflenet" else pytest.param(name, marks=pytest.mark.slow) for name in SITES]
)
def test_light_graphs(name):
    graph = load(LIGHT / f"light_{name}.onnx")
    found = inventory(graph)
    assert len(found.norm_layers) == SITES[name]
    assert not found.skipped_norms
    original = ir.to_proto(graph)
    x = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    for alpha in (0.0, 1e-9, 0.1):
        patched = graph.clone()
        report = rewrite(patched, PatchWeights({norm_layer.name: alpha for norm_layer in found.norm_layers}))
        assert len(report.patched) == (SITES[name] if alpha else 0)
        proto = check(patched)
        if alpha < 0.1:
            expected, y = output(original, x), output(proto, x)
            assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
        else:
            session(proto)  # it loads


@pytest.fixture(
    scope="module",
    params=[
        "the classifier of the other tests",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("test_efficientnet", "test_byobnet")),
    ],
)
def case(request):
    """A model, its example, its export; moments are random, so that they matter."""
    import timm
    import torch

    import bnpatch

    torch.manual_seed(0)
    if not request.param.startswith("test_"):
        model = bnpatch.load(request.getfixturevalue("checkpoint")).module
        return model, torch.randn(2, 1, 32, 32), load(request.getfixturevalue("exported"))
    model = timm.create_model(request.param, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 64, 64)
    program = torch.onnx.export(
        model, (x,), dynamo=True, optimize=False, dynamic_shapes=({0: "batch"},), verbose=False
    )
    return model, x, program.model


def test_identity_in_the_limit(case):
    _, x, graph = case
    norm_layers = inventory(graph).norm_layers
    patched = graph.clone()
    rewrite(patched, PatchWeights({norm_layer.name: 1e-9 for norm_layer in norm_layers}), include_1x1=True)
    expected = output(ir.to_proto(graph), x.numpy())
    deviation = np.abs(output(check(patched), x.numpy()) - expected).max() / np.abs(expected).max()
    assert deviation < 1e-5


def test_alpha_0_from_an_input_is_the_original(case):
    _, x, graph = case
    patched = graph.clone()
    zeros = PatchWeights({norm_layer.name: 0.0 for norm_layer in inventory(graph).norm_layers})
    rewrite(patched, zeros, alpha_inputs="global")
    expected = output(ir.to_proto(graph), x.numpy())
    deviation = np.abs(output(check(patched), x.numpy()) - expected).max() / np.abs(expected).max()
    assert deviation < 1e-5


def test_patched_torch_and_patched_graph_agree_by_name(case):
    """The names of norm layers are those of torch's modules, so one mapping of alphas serves both."""
    import torch

    from bnpatch.nn import surgery

    model, x, graph = case
    names = [norm_layer.name for norm_layer in surgery.inventory(model).norm_layers]
    assert {norm_layer.name for norm_layer in inventory(graph).norm_layers} == set(names)
    alphas = {name: float(a) for name, a in zip(names, np.linspace(0, 0.5, len(names)), strict=True)}
    patched = graph.clone()
    rewrite(patched, PatchWeights(alphas))
    model = surgery.patch(model, alphas)
    try:
        with torch.no_grad():
            expected = model(x).numpy()
    finally:
        surgery.unpatch(model)
    y = output(check(patched), x.numpy())
    # float32 through some fifteen layers, in another order of operations
    np.testing.assert_allclose(y, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(y - output(ir.to_proto(graph), x.numpy())).max() > 0.01 * np.abs(expected).max()
