"""An ONNX graph as a torch module, for the gradients that onnxruntime does not have.

The package onnx2torch converts the graph. It knows the operators of opset 16 and some newer ones, so a newer
graph is converted to an older opset first, and not every graph can be converted. The torch model is used only
where it computes what onnxruntime computes, and only to learn weights: onnxruntime scores them.
"""

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from onnx import version_converter
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from torch import Tensor, fx

from bnpatch.core.patch import PatchWeights
from bnpatch.models.base import Model
from bnpatch.models.torch_model import TorchModel
from bnpatch.onnx.match import inventory

# A graph with a newer opset than this is converted to it.
_OPSET = 17

# The largest difference of an output, as a fraction of the largest output. Rounding gives 1e-6.
_TOLERANCE = 1e-3

# The outputs are compared twice: at the baseline, and with this alpha, slope and offset at every norm layer.
_EVERYWHERE = 0.3, 0.5, 1.0


def as_torch(model: Model[Any], graph: ir.Model, x: Tensor) -> TorchModel | None:
    """Convert the graph of a model to a torch model whose norm layers have the same names.

    Args:
        model: the model, which runs on onnxruntime.
        graph: its graph; it is not changed.
        x: a batch, for which both must return the same.

    Returns:
        The torch model; None where the graph can't be converted, and where norm layers or outputs differ.
    """
    output = model.output_for(x)
    try:
        converted = TorchModel(
            module=_module(graph.clone()),
            name=model.name,
            preprocessing=model.preprocessing,
            device=model.device,
            wanted_output=None if output.is_only else str(output.position),
        )
        return converted if _agrees(converted, model, x) else None
    except Exception:  # converters raise errors of many types, and so do modules that they get wrong
        return None


def _module(graph: ir.Model) -> fx.GraphModule:
    """Convert a graph, which is changed; Batch Norm gets the name of its norm layer."""
    import onnx2torch  # imported here because it is slow, and because bnpatch must work if its import fails

    names = {}
    for number, norm in enumerate(inventory(graph).norm_layers):
        norm.node.name = f"norm_layer_{number}"
        names[norm.node.name] = norm.module_name
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    for node in graph.graph:
        if node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)  # unknown to onnx2torch; it matters for empty tensors only
    proto = ir.to_proto(graph)
    if graph.opset_imports[""] > _OPSET:
        proto = version_converter.convert_version(proto, _OPSET)
    module: fx.GraphModule = onnx2torch.convert(proto).eval()
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in names:
            module.add_submodule(names[node.target], module.get_submodule(node.target))
            node.target = names[node.target]
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _agrees(converted: TorchModel, model: Model[Any], x: Tensor) -> bool:
    """Tell whether both models have the same norm layers, and the same outputs with a patch and without."""
    alphas = model.baseline_alphas()
    if converted.baseline_alphas() != alphas:
        return False
    alphas, slopes, var_offsets = (dict.fromkeys(alphas, value) for value in _EVERYWHERE)
    everywhere = PatchWeights(alphas, slopes=slopes, var_offsets=var_offsets)
    return all(_same(converted, model, x, weights) for weights in (PatchWeights(), everywhere))


def _same(converted: TorchModel, model: Model[Any], x: Tensor, weights: PatchWeights) -> bool:
    state = model.baseline().with_weights(weights)
    with model.in_state(state), converted.in_state(replace(state, running={})):
        expected, found = model.predict(x), converted.predict(x)
    largest = expected.abs().max()
    return (
        bool(torch.isfinite(largest))
        and expected.shape == found.shape
        and bool((found.to(expected) - expected).abs().max() <= _TOLERANCE * largest)
    )
