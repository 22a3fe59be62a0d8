import numpy as np
from onnx import TensorProto, helper

from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.io import inline_norms
from bnpatch.onnx.rewrite import rewrite
from tests.onnx.build import (
    PARAMETERS,
    batch_norm,
    bn_model,
    check,
    constant,
    example,
    from_proto,
    in_function,
    in_if,
    model,
    parameters,
    run,
)
from tests.onnx.rewritten import rewritten


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
