"""Graph, torch layer and oracle compute the same numbers, over types, opsets, ranks, groups, alphas."""

import itertools
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from bnpatch.core.moments import ExampleWeight, Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.nn.functional import weighted_norm
from bnpatch.onnx.formulas import append_norm, best_form
from bnpatch.onnx.match import inventory
from bnpatch.onnx.rewrite import rewrite
from tests.nn.pairwise import pairwise
from tests.onnx.build import batch_norm, bn_model, check, example, from_proto, helper, model, parameters, run
from tests.reference import weighted_norm as oracle

SHAPES = [(2, 6, 7), (3, 6, 5, 4), (2, 6, 3, 4, 5)]
# The last step rounds to the type of the model; sums over up to 60 values in float32 before it.
TOLERANCE = {np.float16: 4e-3, np.float32: 1e-5, np.float64: 1e-11}
WEIGHTS = [(0.3, 0.7, 0), (0.3, -0.3, 0), (0.3, 0.01, 0), (0.3, -1.5, 0), (1e-7, 2.4, 2), (1e-12, -2, -8)]
EXTREME = [(1e-7, 4, 8), (1e-30, -4, -8), (1e-30, 2, 0)]  # not for the fused form
FORMS = {form: partial(append_norm, form=form) for form in ("direct", "normalized", "fused")}


def newest_opset():
    """The newest opset that both the installed onnx and onnxruntime know."""
    for opset in range(onnx.defs.onnx_opset_version(), 0, -1):
        try:
            run(bn_model(opset=opset, ir_version=10), example(1, 6, 5, 4))
        except ort.capi.onnxruntime_pybind11_state.Fail:
            continue
        return opset
    raise AssertionError("no opset runs")


def patched(proto, alpha, append=append_norm, slope=0.0, offset=0.0, **options):
    graph = from_proto(proto)
    names = [norm_layer.name for norm_layer in inventory(graph).norm_layers]
    alphas, slopes, offsets = (dict.fromkeys(names, value) for value in (alpha, slope, offset))
    rewrite(graph, PatchWeights(alphas, slopes=slopes, var_offsets=offsets), append=append, **options)
    return check(graph)


def expected(x, alpha, dtype=np.float32, slope=0.0, offset=0.0):
    arrays = parameters(x.shape[1], dtype)
    order = (arrays[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return oracle(x, *order, 1e-5, alpha, slope=slope, var_offset=offset)


def largest(a, b):
    return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


# Half precision is always direct.
TYPES = [(np.float16, "direct"), *itertools.product([np.float32, np.float64], FORMS)]


@pytest.mark.parametrize(
    ("kind", "shape", "alpha", "slope", "offset"),
    pairwise(TYPES, SHAPES, [0.01, 0.3, 0.99, 1.0], [0.0, 0.7, -1.5], [0.0, 2.0, -2.0]),
)
def test_types_ranks_and_weights(kind, shape, alpha, slope, offset):
    dtype, form = kind
    x = example(*shape, dtype=dtype)
    y = run(patched(bn_model(x=("n", *shape[1:]), dtype=dtype), alpha, FORMS[form], slope, offset), x)
    assert y.dtype == dtype
    assert largest(y, expected(x, alpha, dtype, slope, offset)) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "offset"), [(0.05, 3.0), (0.3, -2.0), (0.9, -6.0)])
def test_a_constant_weight_of_the_variance(form, alpha, offset):
    x = example(3, 6, 5, 4)
    y = run(patched(bn_model(), alpha, FORMS[form], offset=offset), x)
    assert largest(y, expected(x, alpha, offset=offset)) < 1e-5  # float32


@pytest.mark.parametrize(
    ("weight", "form"),
    [
        ((0.3, 0, 0), "fused"),
        ((0.992, 0, 0), "normalized"),
        ((0.992, 0, -8), "fused"),
        ((0.003, 0, 8), "normalized"),
        *((weight, "fused") for weight in WEIGHTS),
        *((weight, "normalized") for weight in EXTREME),
    ],
)
def test_the_form_keeps_away_from_differences_of_equal_squares_and_the_ends_of_float32(weight, form):
    norm = inventory(from_proto(bn_model(conv=True))).norm_layers[0]
    running = Moments(norm.running_mean, norm.running_var)
    assert best_form(norm, running, ExampleWeight(*weight)) == form


@pytest.mark.parametrize("opset", [7, 8, 9, 12, 13, 14, 15, 17, 18, 20, 21, newest_opset()])
@pytest.mark.parametrize("form", FORMS)
def test_opsets(opset, form):
    x = example(3, 6, 5, 4)
    for slope, offset in ((0.0, 0.0), (0.7, 1.5)):
        proto = patched(bn_model(opset=opset), 0.3, FORMS[form], slope, offset)
        assert proto.opset_import[0].version == opset
        assert largest(run(proto, x), expected(x, 0.3, slope=slope, offset=offset)) < 1e-5  # float32


@pytest.mark.parametrize("opset", [15, 18, 21])
@pytest.mark.parametrize("form", FORMS)
def test_a_runtime_that_takes_the_specification_by_its_word(form, opset):
    x = example(3, 6, 5, 4)
    proto = patched(bn_model(opset=opset), 0.3, FORMS[form], slope=0.7, offset=1.5)
    (y,) = ReferenceEvaluator(proto).run(None, {"x": x})
    assert largest(y, expected(x, 0.3, slope=0.7, offset=1.5)) < 1e-5  # float32


@pytest.mark.parametrize(
    ("form", "weight"),
    [*itertools.product(FORMS, WEIGHTS), *itertools.product(["direct", "normalized"], EXTREME)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_from_the_smallest_to_beyond_the_largest_distance(form, weight, dtype):
    alpha, slope, offset = weight
    x = np.concatenate([example(1, 6, 5, 4, dtype=dtype) * s for s in (0, 1, 1e2, 1e4, 1e6)])
    y = run(patched(bn_model(dtype=dtype), alpha, FORMS[form], slope, offset), x)
    for mine, one in zip(y, x, strict=True):
        reference = expected(one[None], alpha, dtype, slope, offset)[0]
        assert largest(mine, reference) < 1e-4  # float32, after a difference of large means


@pytest.mark.parametrize(
    ("form", "slope", "offset"),
    [
        *((form, *weight) for form in FORMS for weight in ((-1.5, 0), (-2.4, 2), (2, 0))),
        *((form, 4, -4) for form in ("direct", "normalized")),
    ],
)
@pytest.mark.parametrize("scale", [0, 1e-3, 1e3])
def test_running_variances_of_another_size_than_those_of_the_example(form, slope, offset, scale):
    """The weights of examples that are so far away are near 0 or 1, where 1e-7 is not too little."""
    x, proto = example(3, 6, 5, 4), bn_model()
    (initializer,) = (i for i in proto.graph.initializer if i.name == "bn.running_var")
    arrays = parameters() | {"bn.running_var": parameters()["bn.running_var"] * np.float32(scale**2)}
    initializer.CopyFrom(onnx.numpy_helper.from_array(arrays["bn.running_var"], "bn.running_var"))
    order = (arrays[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    wanted = oracle(x, *order, 1e-5, 0.05, slope=slope, var_offset=offset)
    assert largest(run(patched(proto, 0.05, FORMS[form], slope, offset), x), wanted) < 1e-4  # float32


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize(("slope", "offset"), [(0.0, 0.0), (0.7, 0.0), (0.7, -1.5)])
def test_the_torch_layer(alpha, slope, offset):
    x, arrays = example(3, 6, 5, 4), {n: torch.tensor(v) for n, v in parameters().items()}
    running = Moments(arrays["bn.running_mean"], arrays["bn.running_var"])
    affine, example_weight = (arrays["bn.weight"], arrays["bn.bias"]), ExampleWeight(alpha, slope, offset)
    y = weighted_norm(torch.tensor(x), running, *affine, 1e-5, example_weight)
    found = run(patched(bn_model(), alpha, slope=slope, offset=offset), x)
    assert largest(found, y.numpy()) < 1e-5  # float32


@pytest.mark.parametrize(
    ("groups", "shape", "form"), pairwise([1, 2, 3, 6], SHAPES, ["direct", "normalized"])
)
def test_groups(groups, shape, form):
    arrays = parameters()
    node = helper.make_node(
        "GroupNormalization", ["x", "bn.weight", "bn.bias"], ["y"], num_groups=groups, epsilon=1e-3
    )
    proto = model([node], {n: arrays[n] for n in ("bn.weight", "bn.bias")}, x=("n", *shape[1:]), opset=21)
    x = example(*shape)
    running = Moments(arrays["bn.running_mean"], arrays["bn.running_var"])
    for alpha, slope, offset in ((0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.3, 0.7, 0.0), (0.3, 0.7, 1.5)):
        y = run(patched(proto, alpha, FORMS[form], slope, offset, running={"bn": running}), x)
        args = (running.mean, running.var, arrays["bn.weight"], arrays["bn.bias"])
        assert largest(y, oracle(x, *args, 1e-3, alpha, 6 // groups, slope, offset)) < 1e-5  # float32


def test_other_running_moments_than_the_models_own():
    x, other = example(2, 6, 5, 4), parameters(seed=9)
    running = Moments(other["bn.running_mean"], other["bn.running_var"])
    own = parameters()
    for form in FORMS.values():
        y = run(patched(bn_model(conv=False), 0.2, form, running={"bn": running}), x)
        args = (running.mean, running.var, own["bn.weight"], own["bn.bias"])
        assert largest(y, oracle(x, *args, 1e-5, 0.2)) < 1e-5  # float32


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1, 1)])
def test_single_values_where_they_are_switched_on(shape):
    x = example(*shape)
    proto = bn_model(x=("n", *shape[1:]))
    for form, slope in itertools.product(FORMS.values(), (0.0, 0.7)):
        y = run(patched(proto, 0.3, form, slope, include_1x1=True), x)
        reference = expected(x.reshape(4, 6, 1), 0.3, slope=slope).reshape(shape)
        assert largest(y, reference) < 1e-5  # float32


def test_the_term_between_the_means_is_there():
    """Running N(0, 1), examples near N(5, 2^2), alpha = 0.3: variance 7.15 with the term, 1.9 without."""
    ones, zeros = np.ones(1, np.float32), np.zeros(1, np.float32)
    arrays = {"bn.weight": ones, "bn.bias": zeros, "bn.running_mean": zeros, "bn.running_var": ones}
    values = np.random.default_rng(0).normal(size=(1, 1, 40, 40))
    x = (5 + 2 * (values - values.mean()) / values.std()).astype(np.float32)
    base = model([batch_norm()], arrays, x=("n", 1, 40, 40))
    for form in FORMS.values():
        y = run(patched(base, 0.3, form), x)
        assert y.std() == pytest.approx(2 / np.sqrt(7.15), rel=1e-4)  # float32 and eps
        assert y.std() != pytest.approx(2 / np.sqrt(1.9), rel=0.3)


@pytest.mark.parametrize("slope", [0.0, 0.7])
def test_no_example_depends_on_the_rest_of_the_batch(slope):
    proto = patched(bn_model(conv=True), 0.3, slope=slope)
    x = example(4, 6, 5, 4)
    alone = np.concatenate([run(proto, x[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(run(proto, x), alone, rtol=1e-5, atol=1e-6)  # other loop orders


def test_half_precision_does_not_overflow():
    """Values near 300 have squares beyond float16."""
    x = (example(2, 6, 8, 8) * 20 + 300).astype(np.float16)
    y = run(patched(bn_model(x=("n", 6, 8, 8), dtype=np.float16), 0.5), x)
    # x itself carries 1e-3 * its mean / std of the example; half of a unit in float16 beside it
    assert largest(y, expected(x, 0.5, np.float16)) < 4e-3


def test_normalized_moments_keep_digits_that_direct_ones_lose():
    """Mean 1e3 standard deviations away, and the running mean knows it."""
    x = (1000 + np.random.default_rng(0).normal(size=(1, 6, 32, 32))).astype(np.float32)
    arrays = parameters()
    arrays["bn.running_mean"] = np.full(6, 1000, np.float32)
    arrays["bn.running_var"] = np.ones(6, np.float32)
    proto = model([batch_norm()], arrays, x=("n", 6, 32, 32))
    reference = oracle(
        x, *(arrays[f"bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")), 1e-5, 1.0
    )
    errors = {form: largest(run(patched(proto, 1.0, append), x), reference) for form, append in FORMS.items()}
    assert errors["normalized"] < 1e-4  # x has 7 digits, 3 of them spent on the mean
    assert errors["direct"] > 3 * errors["normalized"]


def test_bfloat16_passes_the_checker_and_stays_bfloat16():
    """No CPU kernel of onnxruntime takes bfloat16 here, so only the types are checked."""
    proto = bn_model(opset=18)
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, onnx.TensorProto.BFLOAT16, array.shape, array))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    result = patched(proto, 0.3)
    casts = [node for node in result.graph.node if node.op_type == "Cast"]
    assert [node.attribute[0].i for node in casts] == [onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16]
