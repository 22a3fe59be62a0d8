import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnpatch.core.errors import BnpatchError
from bnpatch.core.moments import Moments
from bnpatch.onnx.match import inventory
from tests.onnx.build import (
    PARAMETERS,
    batch_norm,
    bn_model,
    example,
    from_proto,
    model,
    parameters,
    run,
    session,
)
from tests.onnx.rewritten import oracle, other_moments, rewritten, two_norms


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


@pytest.mark.parametrize("conv", [True, False])
def test_slope_and_offset_read_the_activation_as_often_as_a_constant_alpha(conv):
    """Only operators on (N, C) and (N, 1) are added; none for numbers of 0, or at an alpha of 0 or 1."""
    plain, _ = rewritten(bn_model(conv=conv), {"bn": 0.2})
    sloped, _ = rewritten(bn_model(conv=conv), {"bn": 0.2}, slopes={"bn": 0.5})
    apart, _ = rewritten(bn_model(conv=conv), {"bn": 0.2}, slopes={"bn": 0.5}, var_offsets={"bn": 1.0})
    constant, _ = rewritten(bn_model(conv=conv), {"bn": 0.2}, var_offsets={"bn": 1.0})
    sizes = []
    for proto in (plain, sloped, apart, constant):
        values = onnx.shape_inference.infer_shapes(proto).graph.value_info
        wide = {v.name for v in values if [d.dim_value for d in v.type.tensor_type.shape.dim][2:] == [5, 4]}
        wide |= {"x"}
        sizes.append(sum(name in wide for node in proto.graph.node for name in node.input))
    assert len(set(sizes)) == 1
    assert sizes[0] > 0
    assert len(apart.graph.node) > len(sloped.graph.node) > len(plain.graph.node)
    for alpha, slope, offset in ((0.2, 0.0, 0.0), (1.0, 0.5, 1.0)):
        result, _ = rewritten(bn_model(conv=conv), {"bn": alpha}, {"bn": slope}, {"bn": offset})
        without, _ = rewritten(bn_model(conv=conv), {"bn": alpha})
        assert result.SerializeToString(deterministic=True) == without.SerializeToString(deterministic=True)


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


def test_wrong_arguments():
    proto = two_norms()
    with pytest.raises(BnpatchError, match=r"no norm layer 'bn3'; its norm layers are bn, bn2"):
        rewritten(proto, {"bn3": 0.1})
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            rewritten(proto, {"bn": alpha})
    with pytest.raises(BnpatchError, match=r"slope = 5.0 at 'bn' is out of range; it must lie in \[-4, 4\]"):
        rewritten(proto, {"bn": 0.1}, slopes={"bn": 5.0})
    with pytest.raises(BnpatchError, match=r"slopes differ; .* per-site"):
        rewritten(proto, {"bn": 0.1, "bn2": 0.1}, slopes={"bn": 0.1, "bn2": 0.2}, alpha_inputs="global")
    with pytest.raises(BnpatchError, match=r"alphas differ; .* per-site"):
        rewritten(proto, {"bn": 0.1, "bn2": 0.2}, alpha_inputs="global")
    with pytest.raises(ValueError, match="shape"):
        rewritten(proto, {"bn": 0.1}, running={"bn": Moments(np.zeros(5), np.ones(5))})
    with pytest.raises(ValueError, match="negative"):
        rewritten(proto, {"bn": 0.1}, running={"bn": Moments(np.zeros(6), -np.ones(6))})


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
