import numpy as np
import onnx
from onnx import helper

from bnpatch.onnx.fused_conv import find_fused_convs
from tests.onnx.build import batch_norm, from_proto, model, parameters


def convolutions(**change):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(6, 6, 1, 1)).astype(np.float32),
        "a.bias": rng.normal(size=6).astype(np.float32),
        "b.weight": rng.normal(size=(6, 6, 1, 1)).astype(np.float32),
        "b.bias": rng.normal(size=6).astype(np.float32),
    } | parameters()
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["h"], name="a"),
        helper.make_node("Conv", ["h", "b.weight", "b.bias"], ["c"], name="b"),
        batch_norm(("c", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")),
    ]
    return model(nodes, arrays | change)


def names(proto):
    return [candidate.name for candidate in find_fused_convs(from_proto(proto))]


def test_a_bias_and_no_norm_after_it():
    (candidate,) = find_fused_convs(from_proto(convolutions()))
    assert (candidate.name, candidate.channels, candidate.dims) == ("a", 6, ("n", 6, 5, 4))
    assert candidate.node.op_type == "Conv"


def test_no_bias_no_candidate():
    assert names(convolutions(**{"a.bias": np.zeros(6, np.float32)})) == []
    proto = convolutions()
    del proto.graph.node[0].input[2]
    assert names(proto) == []


def test_single_values_are_none():
    proto = convolutions()
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim[2:]:
            dim.dim_value = 1
    assert names(proto) == []


def test_the_exporter_folds_and_every_one_is_found(checkpoint, folded):
    import bnpatch

    model_ = bnpatch.load(checkpoint)
    norms = [name for name, shape in model_.norm_shapes().items() if shape != (1, 1)]
    assert len(norms) == 12
    assert all(model_.module.get_submodule(name).bias.abs().min() > 0 for name in norms)
    assert len(names(onnx.load(folded))) == len(norms)
