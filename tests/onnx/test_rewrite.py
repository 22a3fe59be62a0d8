import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.io import inline_norms
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests import reference
from tests.onnx.build import (
    batch_norm,
    bn_model,
    check,
    constant,
    example,
    from_proto,
    model,
    parameters,
    run,
    session,
)
from tests.onnx.test_match import PARAMETERS, in_function, in_if


def rewritten(proto, alphas, slopes=(), **options):
    graph = from_proto(proto)
    result = rewrite(graph, PatchWeights(alphas, slopes=dict(slopes)), **options)
    return check(graph), result


def two_norms(opset=20, ir_version=8):
    nodes = [
        batch_norm(output="h"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        batch_norm(("r", *(f"bn2.{n}" for n in PARAMETERS))),
    ]
    nodes[0].name, nodes[2].name = "first", "second"
    return model(nodes, parameters() | parameters(prefix="bn2", seed=1), opset=opset, ir_version=ir_version)


def test_a_norm_layer_at_its_baseline_is_left_exactly_as_it_was():
    proto = two_norms()
    before = ir.to_proto(from_proto(proto))
    result, report = rewritten(proto, {"bn": 0.0, "bn2": 0.0})
    assert result.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)
    assert not report.patched


def test_what_is_kept():
    proto = two_norms()
    proto.doc_string, proto.producer_name, proto.model_version = "docs", "maker", 7
    proto.graph.doc_string = "graph docs"
    proto.metadata_props.add(key="k", value="v")
    proto.graph.node[0].doc_string = "node docs"
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 6, 5, 4]))
    result, report = rewritten(proto, {"bn": 0.2})
    assert report.patched == ("bn",)
    for name in (
        "ir_version",
        "doc_string",
        "producer_name",
        "model_version",
        "opset_import",
        "metadata_props",
    ):
        assert getattr(result, name) == getattr(proto, name)
    assert result.graph.input == proto.graph.input
    assert result.graph.output == proto.graph.output
    assert result.graph.doc_string == "graph docs"
    assert "h" in {info.name for info in result.graph.value_info}
    assert [node.name for node in result.graph.node][-2:] == ["act", "second"]  # in their places
    assert any(output == "h" for node in result.graph.node for output in node.output)


def test_parameters_that_nothing_reads_any_more_are_dropped_and_inputs_stay():
    result, _ = rewritten(bn_model(), {"bn": 0.2})
    assert not result.graph.initializer
    inputs = [helper.make_tensor_value_info(f"bn.{name}", TensorProto.FLOAT, [6]) for name in PARAMETERS]
    old = model([batch_norm()], parameters(), opset=8, ir_version=3, inputs=inputs)
    result, _ = rewritten(old, {"bn": 0.2})
    assert len(result.graph.initializer) == 4
    assert len(result.graph.input) == 5
    x = example(2, 6, 5, 4)
    np.testing.assert_array_equal(run(result, x), run(rewritten(bn_model(opset=8), {"bn": 0.2})[0], x))


def test_parameters_shared_with_a_site_that_stays_are_kept():
    nodes = [batch_norm(output="h"), batch_norm(("h", *(f"bn.{n}" for n in PARAMETERS)))]
    nodes[1].name = "norm2"
    proto = model(nodes, parameters())
    result, _ = rewritten(proto, {"bn#2": 0.3, "bn": 0.0})
    assert {t.name for t in result.graph.initializer} == {f"bn.{n}" for n in PARAMETERS}


def test_the_name_of_a_module_stands_for_all_its_sites():
    nodes = [batch_norm(output="h"), batch_norm(("h", *(f"bn.{n}" for n in PARAMETERS)))]
    nodes[1].name = "norm2"
    assert rewritten(model(nodes, parameters()), {"bn": 0.3})[1].patched == ("bn", "bn#2")


def test_the_batch_norm_after_a_convolution_stays_one_for_the_runtime_to_fold():
    result, _ = rewritten(bn_model(conv=True), {"bn": 0.2})
    kept = [node for node in result.graph.node if node.op_type == "BatchNormalization"]
    assert [node.name for node in kept] == ["norm"]
    assert list(kept[0].input[3:]) == ["bn.running_mean", "bn.running_var"]
    direct, _ = rewritten(bn_model(), {"bn": 0.2})
    assert not [node for node in direct.graph.node if node.op_type == "BatchNormalization"]


def test_a_patched_model_is_not_patched_twice():
    result, _ = rewritten(bn_model(conv=True), {"bn": 0.2})
    found = inventory(from_proto(result))
    assert not found.norm_layers
    assert "patch the original" in found.skipped_norms[0].reason


@pytest.mark.parametrize("mode", ["global", "per-site"])
@pytest.mark.parametrize("opset", [8, 13, 20])
def test_alpha_as_an_input_with_a_default(mode, opset):
    proto = two_norms(opset)
    result, report = rewritten(proto, {"bn": 0.3, "bn2": 0.3}, alpha_inputs=mode)
    names = ["alpha"] if mode == "global" else ["alpha.bn", "alpha.bn2"]
    assert list(dict.fromkeys(report.alpha_inputs.values())) == names
    assert [i.name for i in result.graph.input] == ["x", *names]
    x = example(3, 6, 5, 4)
    for value in (None, 0.0, 0.1, 1.0):
        feeds = {} if value is None else dict.fromkeys(names, np.float32(value))
        baked, _ = rewritten(proto, dict.fromkeys(("bn", "bn2"), 0.3 if value is None else value))
        # float32 in both, in another order: alpha * (1 - alpha) and the like are computed at run time
        np.testing.assert_allclose(run(result, x, **feeds), run(baked, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["global", "per-site"])
@pytest.mark.parametrize("opset", [8, 20])
def test_a_slope_as_an_input_beside_alpha(mode, opset):
    proto, both = two_norms(opset), ("bn", "bn2")
    result, report = rewritten(
        proto, dict.fromkeys(both, 0.3), slopes=dict.fromkeys(both, 0.5), alpha_inputs=mode
    )
    kinds = [dict.fromkeys(inputs.values()) for inputs in (report.alpha_inputs, report.slope_inputs)]
    assert [i.name for i in result.graph.input] == ["x", *kinds[0], *kinds[1]]
    assert list(kinds[1]) == (["slope"] if mode == "global" else ["slope.bn", "slope.bn2"])
    without, _ = rewritten(proto, dict.fromkeys(both, 0.3), alpha_inputs=mode)
    x = example(3, 6, 5, 4)
    for alpha, slope in ((0.3, 0.5), (0.1, -2.0), (0.0, 3.0), (1.0, -3.0), (0.7, 0.0)):
        alphas = dict.fromkeys(kinds[0], np.float32(alpha))
        y = run(result, x, **alphas, **dict.fromkeys(kinds[1], np.float32(slope)))
        baked, _ = rewritten(proto, dict.fromkeys(both, alpha), slopes=dict.fromkeys(both, slope))
        np.testing.assert_allclose(y, run(baked, x), rtol=2e-5, atol=2e-5)  # float32, in another order
        if slope == 0 or alpha in (0, 1):
            np.testing.assert_array_equal(y, run(without, x, **alphas))
    np.testing.assert_array_equal(run(result, x), run(result, x, **dict.fromkeys(kinds[0], np.float32(0.3))))


@pytest.mark.parametrize("conv", [True, False])
def test_a_slope_reads_the_activation_as_often_as_a_constant_alpha(conv):
    """Only operators on (N, C) and (N, 1) are added; none for a slope of 0, or at an alpha of 0 or 1."""
    plain, _ = rewritten(bn_model(conv=conv), {"bn": 0.2})
    sloped, _ = rewritten(bn_model(conv=conv), {"bn": 0.2}, slopes={"bn": 0.5})
    sizes = []
    for proto in (plain, sloped):
        values = onnx.shape_inference.infer_shapes(proto).graph.value_info
        wide = {v.name for v in values if [d.dim_value for d in v.type.tensor_type.shape.dim][2:] == [5, 4]}
        wide |= {"x"}
        sizes.append(sum(name in wide for node in proto.graph.node for name in node.input))
    assert sizes[0] == sizes[1] > 0
    assert len(sloped.graph.node) > len(plain.graph.node)
    for alpha, slope in ((0.2, 0.0), (1.0, 0.5)):
        result, _ = rewritten(bn_model(conv=conv), {"bn": alpha}, slopes={"bn": slope})
        without, _ = rewritten(bn_model(conv=conv), {"bn": alpha})
        assert result.SerializeToString(deterministic=True) == without.SerializeToString(deterministic=True)


def test_alpha_inputs_are_overridden_one_by_one():
    proto = two_norms()
    result, report = rewritten(proto, {"bn": 0.1, "bn2": 0.7}, alpha_inputs="per-site")
    x = example(2, 6, 5, 4)
    other, _ = rewritten(proto, {"bn": 0.1, "bn2": 0.2})
    y = run(result, x, **{report.alpha_inputs["bn2"]: np.float32(0.2)})
    np.testing.assert_allclose(y, run(other, x), rtol=2e-5, atol=2e-5)  # float32


def test_alpha_input_for_a_double_model_and_a_taken_name():
    proto = bn_model(x=("alpha", 6, 5, 4), dtype=np.float64)
    proto.graph.input[0].name = proto.graph.node[0].input[0] = "alpha"
    result, report = rewritten(proto, {"bn": 0.25}, alpha_inputs="global")
    assert report.alpha_inputs == {"bn": "alpha_"}
    x = example(2, 6, 5, 4, dtype=np.float64)
    baked, _ = rewritten(bn_model(dtype=np.float64), {"bn": 0.25})
    np.testing.assert_allclose(run(result, x), run(baked, x), rtol=1e-12)  # 0.25 is exact in float32


def test_sites_in_subgraphs_read_an_alpha_outside():
    proto = in_if(batch_norm(), parameters())
    for mode in (None, "global"):
        result, report = rewritten(proto, {"bn": 0.3}, alpha_inputs=mode)
        assert len(report.patched) == 2
        x = example(2, 6, 5, 4)
        expected = run(rewritten(bn_model(), {"bn": 0.3})[0], x)
        np.testing.assert_allclose(run(result, x), expected, rtol=2e-5, atol=2e-5)  # float32


def test_a_loop_body():
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            batch_norm(("state", *(f"bn.{n}" for n in PARAMETERS)), output="next"),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", 6, 5, 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", 6, 5, 4]),
        ],
    )
    nodes = [
        constant("two", np.array(2)),
        constant("yes", np.array(True)),
        helper.make_node("Loop", ["two", "yes", "x"], ["y"], body=body),
    ]
    result, _ = rewritten(model(nodes, parameters()), {"bn": 0.3})
    x = example(2, 6, 5, 4)
    once, _ = rewritten(bn_model(), {"bn": 0.3})
    np.testing.assert_allclose(run(result, x), run(once, run(once, x)), rtol=1e-5, atol=1e-5)  # float32


def test_inlined_functions():
    graph = inline_norms(from_proto(in_function()))
    rewrite(graph, PatchWeights({"one": 0.3, "two": 0.1}))
    result = check(graph)
    x = example(2, 6, 5, 4)
    halves = [
        rewritten(model([batch_norm()], parameters(seed=s)), {"bn": a})[0] for s, a in ((0, 0.3), (1, 0.1))
    ]
    expected = run(halves[1], run(halves[0], x))
    np.testing.assert_allclose(run(result, x), expected, rtol=1e-5, atol=1e-5)  # float32


def test_between_dequantize_and_quantize():
    arrays = parameters() | {"s": np.float32(0.05), "z": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        batch_norm(("d", *(f"bn.{n}" for n in PARAMETERS)), output="h"),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["hq"]),
        helper.make_node("DequantizeLinear", ["hq", "s", "z"], ["y"]),
    ]
    result, report = rewritten(model(nodes, arrays), {"bn": 0.3})
    assert report.patched == ("bn",)
    x = np.clip(example(2, 6, 5, 4), -6, 6)
    x = np.round(x / 0.05) * np.float32(0.05)
    plain = run(rewritten(bn_model(), {"bn": 0.3})[0], x)
    clipped = np.clip(plain, -6.4, 6.35)
    np.testing.assert_allclose(run(result, x), clipped, atol=0.026)  # half a step of 0.05, and rounding


def test_a_batch_norm_that_is_the_output_keeps_its_name_and_dynamic_dimensions():
    proto = bn_model(x=("batch", 6, "height", "width"))
    result, _ = rewritten(proto, {"bn": 0.3})
    assert result.graph.output[0].name == "y"
    assert [d.dim_param or d.dim_value for d in result.graph.input[0].type.tensor_type.shape.dim] == [
        "batch", 6, "height", "width",
    ]  # fmt: skip
    s = session(result)
    for shape in ((1, 6, 3, 9), (4, 6, 8, 2)):
        assert s.run(None, {"x": example(*shape)})[0].shape == shape


def test_no_examples_at_all():
    result, _ = rewritten(bn_model(), {"bn": 0.3})
    assert run(result, np.zeros((0, 6, 5, 4), np.float32)).shape == (0, 6, 5, 4)


def test_single_values_are_left_alone_by_default():
    _, report = rewritten(bn_model(x=("n", 6)), {"bn": 0.3})
    assert not report.patched


def test_norm_layers_without_an_alpha_are_kept():
    _, report = rewritten(two_norms(), {"bn2": 0.3})
    assert report.patched == ("bn2",)


def group_norm_model():
    arrays = {n: a for n, a in parameters().items() if n in ("bn.weight", "bn.bias")}
    return model(
        [helper.make_node("GroupNormalization", ["x", *arrays], ["y"], num_groups=2)], arrays, opset=21
    )


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
        ("optimized", False),
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


def test_wrong_arguments():
    proto = two_norms()
    with pytest.raises(BnpatchError, match=r"no norm layer 'bn3'; its norm layers are bn, bn2"):
        rewritten(proto, {"bn3": 0.1})
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            rewritten(proto, {"bn": alpha})
    with pytest.raises(BnpatchError, match=r"slope = 5.0 at 'bn' is too steep; it must lie in \[-4, 4\]"):
        rewritten(proto, {"bn": 0.1}, slopes={"bn": 5.0})
    with pytest.raises(BnpatchError, match=r"slopes differ; .* per-site"):
        rewritten(proto, {"bn": 0.1, "bn2": 0.1}, slopes={"bn": 0.1, "bn2": 0.2}, alpha_inputs="global")
    with pytest.raises(BnpatchError, match=r"alphas differ; .* per-site"):
        rewritten(proto, {"bn": 0.1, "bn2": 0.2}, alpha_inputs="global")
    with pytest.raises(ValueError, match="shape"):
        rewritten(proto, {"bn": 0.1}, running={"bn": Moments(np.zeros(5), np.ones(5))})
    with pytest.raises(ValueError, match="negative"):
        rewritten(proto, {"bn": 0.1}, running={"bn": Moments(np.zeros(6), -np.ones(6))})


def other_moments(seed=9):
    arrays = parameters(seed=seed)
    return Moments(arrays["bn.running_mean"], arrays["bn.running_var"])


def oracle(x, running, alpha, **own):
    arrays = parameters() | own
    return reference.weighted_norm(
        x, running.mean, running.var, arrays["bn.weight"], arrays["bn.bias"], 1e-5, alpha
    )


def test_other_running_moments_without_a_weight_leave_one_batch_norm_node():
    """Alpha 0, lambda above it: runtimes fold it as they did the original."""
    proto, x = bn_model(conv=True), example(2, 6, 5, 4)
    running = other_moments()
    result, report = rewritten(proto, {"bn": 0.0}, running={"bn": running})
    assert report.patched == ("bn",)
    assert [node.op_type for node in result.graph.node if node.op_type != "Constant"] == [
        "Conv",
        "BatchNormalization",
    ]
    assert [node.name for node in result.graph.node if node.op_type == "BatchNormalization"] == ["norm"]
    conv = onnx.numpy_helper.to_array(proto.graph.initializer[-1])[:, :, 0, 0]
    expected = oracle(np.einsum("nihw,oi->nohw", x, conv), running, 0.0)
    np.testing.assert_allclose(run(result, x), expected, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1, 1)])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_single_values_take_other_running_moments_too(shape, alpha):
    """And the example has no say there."""
    running, x = other_moments(), example(*shape)
    result, report = rewritten(bn_model(x=("n", *shape[1:])), {"bn": alpha}, running={"bn": running})
    assert report.patched == ("bn",)
    np.testing.assert_allclose(run(result, x), oracle(x, running, 0.0), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("opset", [8, 13, 20])
def test_running_moments_as_inputs_with_defaults(conv, opset):
    proto, x = bn_model(conv=conv, opset=opset), example(3, 6, 5, 4)
    for default in (None, other_moments(3)):
        options = {} if default is None else {"running": {"bn": default}}
        result, report = rewritten(
            proto, {"bn": 0.3}, alpha_inputs="per-site", running_inputs=True, **options
        )
        mean, var = report.running_inputs["bn"]
        assert [i.name for i in result.graph.input] == ["x", report.alpha_inputs["bn"], mean, var]
        baked, _ = rewritten(proto, {"bn": 0.3}, **options)
        np.testing.assert_allclose(run(result, x), run(baked, x), rtol=2e-5, atol=2e-5)  # float32
        running = other_moments()
        for alpha in (0.0, 0.3, 1.0):
            baked, _ = rewritten(proto, {"bn": alpha}, running={"bn": running})
            feeds = {report.alpha_inputs["bn"]: np.float32(alpha), mean: running.mean, var: running.var}
            np.testing.assert_allclose(
                run(result, x, **feeds), run(baked, x), rtol=5e-5, atol=5e-5
            )  # float32


def test_running_moments_as_inputs_of_single_values_and_of_sites_without_an_alpha_input():
    x = example(4, 6)
    running = other_moments()
    for mode in (None, "per-site"):
        result, report = rewritten(bn_model(x=("n", 6)), {"bn": 0.0}, alpha_inputs=mode, running_inputs=True)
        mean, var = report.running_inputs["bn"]
        y = run(result, x, **{mean: running.mean, var: running.var})
        np.testing.assert_allclose(y, oracle(x, running, 0.0), rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_running_moments_of_other_types(dtype, alpha):
    x, running = example(2, 6, 5, 4, dtype=dtype), other_moments()
    result, report = rewritten(
        bn_model(dtype=dtype), {"bn": alpha}, alpha_inputs="per-site", running_inputs=True
    )
    mean, var = report.running_inputs["bn"]
    y = run(result, x, **{mean: running.mean, var: running.var})
    assert y.dtype == dtype
    arrays = parameters(dtype=dtype)
    expected = oracle(x, running, alpha, **arrays)
    tolerance = 4e-3 if dtype == np.float16 else 1e-6  # alpha and the moments come in float32
    assert np.abs(y.astype(np.float64) - expected).max() < tolerance * np.abs(expected).max()


def test_group_norm_takes_running_moments_as_inputs():
    proto, x, running = group_norm_model(), example(2, 6, 5, 4), other_moments()
    result, report = rewritten(
        proto, {"bn": 1.0}, running={"bn": other_moments(3)}, alpha_inputs="per-site", running_inputs=True
    )
    mean, var = report.running_inputs["bn"]
    arrays = parameters()
    for alpha in (0.0, 0.4, 1.0):
        feeds = {report.alpha_inputs["bn"]: np.float32(alpha), mean: running.mean, var: running.var}
        expected = reference.weighted_norm(
            x, running.mean, running.var, arrays["bn.weight"], arrays["bn.bias"], 1e-5, alpha, 3
        )
        np.testing.assert_allclose(run(result, x, **feeds), expected, rtol=1e-4, atol=2e-5)  # float32


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
