"""Graphs that are rewritten, and what they must compute."""

from onnx import helper

from bnpatch.core.moments import Moments
from bnpatch.core.patch import PatchWeights
from bnpatch.onnx.rewrite import rewrite
from tests import reference
from tests.onnx.build import PARAMETERS, batch_norm, check, from_proto, model, parameters


def rewritten(proto, alphas, slopes=(), var_offsets=(), **options):
    graph = from_proto(proto)
    weights = PatchWeights(alphas, slopes=dict(slopes), var_offsets=dict(var_offsets))
    result = rewrite(graph, weights, **options)
    return check(graph), result


def two_norms(opset=20, ir_version=8):
    nodes = [
        batch_norm(output="h"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        batch_norm(("r", *(f"bn2.{n}" for n in PARAMETERS))),
    ]
    nodes[0].name, nodes[2].name = "first", "second"
    return model(nodes, parameters() | parameters(prefix="bn2", seed=1), opset=opset, ir_version=ir_version)


def group_norm_model():
    arrays = {n: a for n, a in parameters().items() if n in ("bn.weight", "bn.bias")}
    return model(
        [helper.make_node("GroupNormalization", ["x", *arrays], ["y"], num_groups=2)], arrays, opset=21
    )


def other_moments(seed=9):
    arrays = parameters(seed=seed)
    return Moments(arrays["bn.running_mean"], arrays["bn.running_var"])


def oracle(x, running, alpha, **own):
    arrays = parameters() | own
    return reference.weighted_norm(
        x, running.mean, running.var, arrays["bn.weight"], arrays["bn.bias"], 1e-5, alpha
    )
