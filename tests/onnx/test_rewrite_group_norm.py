import numpy as np
import onnx
import pytest
from onnx import helper

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests import reference
from tests.onnx.build import check, example, from_proto, model, run
from tests.onnx.rewritten import group_norm_model, other_moments, rewritten


def test_group_norm_at_its_baseline_needs_no_moments_and_stays():
    result, report = rewritten(group_norm_model(), {"bn": 1.0})
    assert not report.patched
    assert result.graph.node[0].op_type == "GroupNormalization"


def test_group_norm_needs_moments():
    with pytest.raises(BnpatchError, match=r"'bn' .* has no running statistics; estimate them"):
        rewritten(group_norm_model(), {"bn": 0.5})


EXPORTS = {
    "new exporter": {"dynamo": True, "optimize": False},
    "optimized": {"dynamo": True, "optimize": True},
    "opset 21": {"dynamo": True, "optimize": False, "opset_version": 21},
    "old exporter": {"dynamo": False, "opset_version": 17},
}


@pytest.mark.parametrize(
    ("exporter", "affine"),
    [
        ("new exporter", True),
        pytest.param("optimized", False, marks=pytest.mark.slow),
        ("old exporter", True),
        pytest.param("new exporter", False, marks=pytest.mark.slow),
        pytest.param("optimized", True, marks=pytest.mark.slow),
        pytest.param("opset 21", True, marks=pytest.mark.slow),
        pytest.param("opset 21", False, marks=pytest.mark.slow),
        pytest.param("old exporter", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_group_norm_as_exporters_write_it(exporter, affine, tmp_path):
    import torch

    export = EXPORTS[exporter]
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(4, 8, affine=affine), torch.nn.ReLU()
    )
    if affine:
        torch.nn.init.normal_(layers[1].weight)
        torch.nn.init.normal_(layers[1].bias)
    x = torch.randn(2, 3, 8, 8)
    torch.onnx.export(layers.eval(), (x,), tmp_path / "m.onnx", verbose=False, **export)
    graph = from_proto(onnx.load(tmp_path / "m.onnx"))
    (norm_layer,) = inventory(graph).norm_layers
    assert (norm_layer.kind, norm_layer.num_channels, norm_layer.channels_per_group) == (
        "GroupNormalization",
        8,
        2,
    )
    if export["dynamo"]:  # the other one keeps no names of modules without parameters of their own
        assert norm_layer.name == "1"
    if affine:
        np.testing.assert_allclose(norm_layer.weight, layers[1].weight.detach(), rtol=1e-6)
        np.testing.assert_allclose(norm_layer.bias, layers[1].bias.detach(), rtol=1e-6)
    rng = np.random.default_rng(0)
    running = Moments(rng.normal(size=8), rng.uniform(0.5, 2, 8))
    rewrite(graph, PatchWeights({norm_layer.name: 0.999999}), running={norm_layer.name: running})
    plain = layers(x).detach().numpy()
    result = check(graph)
    assert not [n for n in result.graph.node if n.op_type in ("InstanceNormalization", "GroupNormalization")]
    np.testing.assert_allclose(run(result, x.numpy()), plain, atol=1e-4)  # alpha is 1e-6 from identity


def test_group_norm_of_opset_18_has_its_scale_per_group():
    arrays = {"bn.weight": np.array([0.5, 2], np.float32), "bn.bias": np.array([1, -1], np.float32)}
    proto = model(
        [helper.make_node("GroupNormalization", ["x", *arrays], ["y"], num_groups=2)], arrays, opset=18
    )
    x, running = example(2, 6, 5, 4), other_moments()
    weight, bias = (np.repeat(array, 3) for array in arrays.values())
    for alpha in (0.0, 0.4):
        result, _ = rewritten(proto, {"bn": alpha}, running={"bn": running})
        expected = reference.weighted_norm(x, running.mean, running.var, weight, bias, 1e-5, alpha, 3)
        np.testing.assert_allclose(run(result, x), expected, rtol=1e-4, atol=2e-5)  # float32


def test_a_damaged_group_norm_of_no_groups_is_none():
    arrays = {
        "split": np.array([0, 0, -1]),
        "ones": np.zeros(0, np.float32),
        "zeros": np.zeros(0, np.float32),
    }
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["x", "split"], ["split_x"]),
        helper.make_node("InstanceNormalization", ["split_x", "ones", "zeros"], ["normalized"]),
        helper.make_node("Reshape", ["normalized", "shape"], ["y"]),
    ]
    assert not inventory(from_proto(model(nodes, arrays))).norm_layers
