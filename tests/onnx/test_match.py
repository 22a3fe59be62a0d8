import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from bnpatch.onnx.io import inline_norms
from bnpatch.onnx.match import _unique, inventory
from tests.onnx.build import (
    PARAMETERS,
    batch_norm,
    bn_model,
    constant,
    from_proto,
    in_function,
    in_if,
    model,
    parameters,
)


def look(proto):
    return inventory(from_proto(proto))


def only_site(proto):
    found = look(proto)
    assert not found.skipped_norms
    (norm_layer,) = found.norm_layers
    return norm_layer


def reason(proto):
    found = look(proto)
    assert not found.norm_layers
    (left,) = found.skipped_norms
    return left.reason


def assert_has_parameters(norm_layer, arrays, prefix="bn"):
    for name in PARAMETERS:
        np.testing.assert_array_equal(getattr(norm_layer, name), arrays[f"{prefix}.{name}"])


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15, 20, 23, onnx.defs.onnx_opset_version()])
def test_batch_norm_of_every_opset(opset):
    norm_layer = only_site(bn_model(opset=opset))
    assert (norm_layer.name, norm_layer.kind, norm_layer.num_channels, norm_layer.baseline_alpha) == (
        "bn",
        "BatchNormalization",
        6,
        0.0,
    )
    assert norm_layer.dims == ("n", 6, 5, 4)
    assert norm_layer.eps == pytest.approx(1e-5)
    assert not norm_layer.needs_calibration
    assert_has_parameters(norm_layer, parameters())


def test_parameters_as_constant_nodes():
    arrays = parameters()
    proto = model([*(constant(name, array) for name, array in arrays.items()), batch_norm()])
    assert_has_parameters(only_site(proto), arrays)


def test_parameters_behind_identity_are_shared_by_equal_tensors():
    arrays = {"a.weight": np.ones(6, np.float32), "a.bias": np.zeros(6, np.float32)}
    nodes = [
        helper.make_node("Identity", ["a.weight"], ["b.weight"]),
        helper.make_node("Identity", ["a.bias"], ["b.running_mean"]),
        helper.make_node("Identity", ["b.weight"], ["b.running_var"]),
        batch_norm(("x", "b.weight", "a.bias", "b.running_mean", "b.running_var")),
    ]
    norm_layer = only_site(model(nodes, arrays))
    assert norm_layer.name == "b"
    np.testing.assert_array_equal(norm_layer.running_var, np.ones(6))


def test_parameters_computed_from_constants_as_the_exporter_leaves_them():
    arrays = parameters() | {"one": np.ones(1, np.float32), "six": np.array([6])}
    nodes = [
        helper.make_node("CastLike", ["one", "x"], ["like"]),
        helper.make_node("Expand", ["like", "six"], ["scale"]),
        batch_norm(("x", "scale", "bn.bias", "bn.running_mean", "bn.running_var")),
    ]
    np.testing.assert_array_equal(only_site(model(nodes, arrays)).weight, np.ones(6))


def test_initializers_listed_as_inputs():
    inputs = [helper.make_tensor_value_info(f"bn.{name}", TensorProto.FLOAT, [6]) for name in PARAMETERS]
    proto = model([batch_norm()], parameters(), opset=8, ir_version=3, inputs=inputs)
    assert_has_parameters(only_site(proto), parameters())


def test_dynamic_parameters_are_left_alone():
    arrays = parameters()
    del arrays["bn.running_mean"]
    inputs = [helper.make_tensor_value_info("bn.running_mean", TensorProto.FLOAT, [6])]
    assert "mean is computed at run time" in reason(model([batch_norm()], arrays, inputs=inputs))


def test_training_mode_is_left_alone():
    assert "training mode" in reason(model([batch_norm(training_mode=1)], parameters()))


def test_weight_standardisation_and_instance_norm_are_left_alone():
    import torch
    from timm.layers import StdConv2d

    layers = torch.nn.Sequential(StdConv2d(3, 4, 3), torch.nn.InstanceNorm2d(4, affine=True))
    program = torch.onnx.export(
        layers.eval(), (torch.zeros(2, 3, 8, 8),), dynamo=True, optimize=False, verbose=False
    )
    found = inventory(program.model)
    assert not found.norm_layers
    assert {left.kind for left in found.skipped_norms} >= {"InstanceNormalization"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bn.bias": np.zeros(5, np.float32)}, "differ in size"),
        ({"bn.weight": np.ones((1, 6), np.float32)}, "shape"),
        ({"bn.running_var": -np.ones(6, np.float32)}, "negative"),
        ({"bn.running_var": np.full(6, np.inf, np.float32)}, "not finite"),
    ],
)
def test_parameters_that_make_no_sense(change, expected):
    assert expected in reason(model([batch_norm()], parameters() | change))


def test_other_reasons():
    assert "spatial" in reason(model([batch_norm(spatial=0)], parameters(), opset=7))
    assert "opset 6" in reason(model([batch_norm()], parameters(), opset=6))
    assert "channels" in reason(bn_model_of_other_width())
    proto = model([batch_norm()], parameters())
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert "rank" in reason(proto)


def bn_model_of_other_width():
    return model([batch_norm()], parameters(6), x=("n", 7, 2, 2))


def test_what_is_no_norm_of_onnx_is_not_listed():
    node = helper.make_node("BatchNormalization", ["x"], ["y"], domain="other.company")
    proto = model([node])
    proto.opset_import.append(helper.make_opsetid("other.company", 1))
    found = look(proto)
    assert not found.norm_layers
    assert not found.skipped_norms
    layer_norm = helper.make_node("LayerNormalization", ["x", "w"], ["y"])
    assert not look(model([layer_norm], {"w": np.ones(4, np.float32)})).norm_layers


@pytest.mark.parametrize("dims", [("n", 6, "h", "w"), (None, 6, None, None), ("?", 6, 5, 5), (0, 6, 4, 4)])
def test_dimensions_of_all_kinds(dims):
    assert only_site(bn_model(x=dims)).dims[0] == dims[0]


def test_dimension_minus_one_counts_as_unknown():
    assert only_site(bn_model(x=(-1, 6, -1, 4))).dims == (None, 6, None, 4)


def test_single_values():
    assert only_site(bn_model(x=("n", 6))).single_value
    assert only_site(bn_model(x=("n", 6, 1, 1))).single_value
    assert not only_site(bn_model(x=("n", 6, 1, "w"))).single_value


def test_names_are_unique_and_remember_the_module():
    nodes = [
        batch_norm(output="a"),
        batch_norm(("a", *(f"bn.{name}" for name in PARAMETERS)), output="y"),
    ]
    found = look(model(nodes, parameters()))
    assert [norm_layer.name for norm_layer in found.norm_layers] == ["bn", "bn#2"]
    assert [norm_layer.module_name for norm_layer in found.norm_layers] == ["bn", "bn"]


def test_the_names_of_many_calls_are_found_without_counting_from_one():
    class Counting(dict):
        lookups = 0

        def __contains__(self, key):
            self.lookups += 1
            return super().__contains__(key)

    used = Counting()
    names = [_unique(name, used) for name in ("bn", "bn#3", *["bn"] * 500)]
    assert names[:5] == ["bn", "bn#3", "bn#2", "bn#4", "bn#5"]
    assert len(set(names)) == len(names)
    assert used.lookups <= 3 * len(names)


def test_names_fall_back_to_the_node_and_to_the_output():
    arrays = {name.replace("bn.", "p_"): array for name, array in parameters().items()}
    node = batch_norm(("x", *arrays))
    assert only_site(model([node], arrays)).name == "norm"
    node.name = ""
    assert only_site(model([node], arrays)).name == "y"


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_group_normalization_per_group_and_per_channel(opset):
    size = 3 if opset < 21 else 6
    arrays = {"gn.weight": np.arange(1, size + 1, dtype=np.float32), "gn.bias": np.zeros(size, np.float32)}
    node = helper.make_node("GroupNormalization", ["x", *arrays], ["y"], num_groups=3)
    norm_layer = only_site(model([node], arrays, opset=opset))
    assert (norm_layer.name, norm_layer.kind, norm_layer.channels_per_group) == (
        "gn",
        "GroupNormalization",
        2,
    )
    assert norm_layer.needs_calibration
    assert norm_layer.baseline_alpha == 1.0
    expected = [1, 1, 2, 2, 3, 3] if opset < 21 else [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(norm_layer.weight, expected)


def test_group_norm_that_divides_no_channels_is_left_alone():
    arrays = {"w": np.ones(6, np.float32), "b": np.zeros(6, np.float32)}
    node = helper.make_node("GroupNormalization", ["x", "w", "b"], ["y"], num_groups=4)
    assert "can't be divided into 4 groups" in reason(model([node], arrays, opset=21))


def test_batch_norm_in_subgraphs():
    found = look(in_if(batch_norm(), parameters()))
    assert [norm_layer.name for norm_layer in found.norm_layers] == ["bn", "bn#2"]
    assert all(
        norm_layer.node.graph.name in ("then_branch", "else_branch") for norm_layer in found.norm_layers
    )


def test_batch_norm_in_functions_is_found_once_they_are_inlined():
    proto = in_function()
    assert "model-local function 'Block'" in reason(proto)
    inlined = inline_norms(from_proto(proto))
    found = inventory(inlined)
    assert [norm_layer.name for norm_layer in found.norm_layers] == ["one", "two"]
    assert_has_parameters(found.norm_layers[1], parameters(seed=1), prefix="bn")
    onnx.checker.check_model(ir.to_proto(inlined), full_check=True)


def test_functions_without_norms_stay():
    body = helper.make_function(
        "local", "Act", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    call = helper.make_node("Act", ["x"], ["h"], domain="local")
    proto = model([call, batch_norm(("h", *(f"bn.{n}" for n in PARAMETERS)))], parameters(), functions=[body])
    assert len(inline_norms(from_proto(proto)).functions) == 1


def test_a_survey_changes_nothing():
    proto = in_if(batch_norm(), parameters())
    graph = from_proto(proto)
    before = ir.to_proto(graph).SerializeToString()
    inventory(graph)
    assert ir.to_proto(graph).SerializeToString() == before
