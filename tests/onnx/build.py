"""Small graphs for the tests, and what runs them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

TYPES = {
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
}

PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def parameters(channels=6, dtype=np.float32, seed=0, prefix="bn"):
    rng = np.random.default_rng(seed)
    arrays = {
        "weight": rng.uniform(0.5, 1.5, channels),
        "bias": rng.normal(size=channels),
        "running_mean": rng.normal(size=channels),
        "running_var": rng.uniform(0.3, 2, channels),
    }
    return {f"{prefix}.{name}": array.astype(dtype) for name, array in arrays.items()}


def model(
    nodes, arrays=None, *, x=("n", 6, 5, 4), dtype=np.float32, opset=20, ir_version=8, functions=(), **graph
):
    """A model from x to y; ``arrays`` become initializers."""
    kind = TYPES[np.dtype(dtype)]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", kind, x), *graph.get("inputs", ())],
            graph.get("outputs") or [helper.make_tensor_value_info("y", kind, x)],
            [numpy_helper.from_array(array, name) for name, array in (arrays or {}).items()],
        ),
        opset_imports=[
            helper.make_opsetid("", opset),
            *(helper.make_opsetid(f.domain, 1) for f in functions),
        ],
        functions=list(functions),
    )
    proto.ir_version = ir_version
    return proto


def batch_norm(
    inputs=("x", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), output="y", **attributes
):
    return helper.make_node("BatchNormalization", list(inputs), [output], name="norm", **attributes)


def bn_model(*, x=("n", 6, 5, 4), dtype=np.float32, conv=False, **options):
    """One BatchNormalization, after a convolution if asked for."""
    channels = x[1]
    arrays = parameters(channels, dtype)
    nodes = [batch_norm()]
    if conv:
        rank = len(x) - 2
        kernel = np.random.default_rng(5).normal(size=(channels, channels, *(1,) * rank)).astype(dtype)
        arrays["conv.weight"] = kernel
        nodes = [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"], name="conv"),
            batch_norm(("c", *(f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")))),
        ]
    return model(nodes, arrays, x=x, dtype=dtype, **options)


def in_if(node, arrays, opset=20):
    """The node in both branches of an If; its parameters lie in the graph outside."""
    branches = {}
    for branch in ("then_branch", "else_branch"):
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.name, inner.output[0] = f"{branch}_norm", f"{branch}_y"
        out = helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph([inner], branch, [], [out])
    nodes = [constant("yes", np.array(True)), helper.make_node("If", ["yes"], ["y"], **branches)]
    return model(nodes, arrays, opset=opset)


def in_function(opset=20):
    """Two calls of one function, each with its own parameters."""
    body = helper.make_function(
        "local", "Block", ["a", *PARAMETERS], ["b"],
        [helper.make_node("BatchNormalization", ["a", *PARAMETERS], ["b"], name="inner")],
        [helper.make_opsetid("", opset)],
    )  # fmt: skip
    arrays = parameters(prefix="one") | parameters(prefix="two", seed=1)
    calls = [
        helper.make_node("Block", ["x", *(f"one.{n}" for n in PARAMETERS)], ["h"], domain="local", name="c1"),
        helper.make_node("Block", ["h", *(f"two.{n}" for n in PARAMETERS)], ["y"], domain="local", name="c2"),
    ]
    return model(calls, arrays, functions=[body], opset=opset)


def constant(output, array):
    return helper.make_node(
        "Constant", [], [output], value=numpy_helper.from_array(np.asarray(array), output)
    )


def from_proto(proto):
    return ir.from_proto(proto)


def session(proto):
    if isinstance(proto, ir.Model):
        proto = ir.to_proto(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(proto, x, **more):
    s = session(proto)
    feeds = {name: np.asarray(value) for name, value in more.items()}
    return s.run(None, {s.get_inputs()[0].name: x, **feeds})[0]


def check(rewritten):
    """The checker passes, with shape inference, on a rewritten model; returns the proto."""
    proto = ir.to_proto(rewritten)
    onnx.checker.check_model(proto, full_check=True)
    domains = {node.domain for node in proto.graph.node}
    assert domains <= {"", "ai.onnx"}
    return proto


def example(*shape, dtype=np.float32, seed=1):
    return np.random.default_rng(seed).normal(1, 2, shape).astype(dtype)
