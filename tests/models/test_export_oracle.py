"""Patched files against the original graph in onnx's own evaluator, whose Batch Norm is the oracle.

No code of bnpatch computes what is expected here.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import bnpatch
from bnpatch.core.patch import PatchWeights
from tests import reference
from tests.nn.norms import images, settle

EXPORTERS = {  # with Batch Norm kept
    "torchscript": {"dynamo": False, "opset_version": 17},
    "dynamo": {"dynamo": True, "optimize": False},
}


def network():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4, eps=1e-3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)]
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(),
            nn.Conv2d(4, 6, 3, stride=2, bias=False), norms[1], nn.SiLU(),
            nn.MaxPool2d(2), norms[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )
    )  # fmt: skip


def oracle_of(weights, names):
    """Return Batch Norm for onnx's evaluator, which computes by the weights of its node."""

    class BatchNormalization(OpRun):
        def _run(self, x, scale, bias, mean, var, epsilon=1e-5, **_):
            name = names[self.onnx_node.output[0]]
            alpha, slope = weights.alphas[name], weights.slopes.get(name, 0.0)
            y = reference.weighted_norm(x, mean, var, scale, bias, epsilon, alpha, slope=slope)
            return (y.astype(x.dtype),)

    return BatchNormalization


@pytest.mark.parametrize("exporter", ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_patched_file_computes_the_oracle_in_the_original_graph(exporter, tmp_path):
    path, x = tmp_path / "original.onnx", images(3, 3, 12, 12)
    torch.onnx.export(
        network(), (x,), path, input_names=["x"], verbose=False, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False, **EXPORTERS[exporter],
    )  # fmt: skip
    model = bnpatch.load(path, preprocessing={"img_size": 12})
    norms = model.inventory().norm_layers
    assert len(norms) == 3
    names = {norm.node.outputs[0].name: norm.name for norm in norms}
    alphas = dict(zip(names.values(), (0.3, 1.0, 0.05), strict=True))
    slopes = dict(zip(names.values(), (0.7, 0.0, -0.5), strict=True))
    weights = PatchWeights(alphas, slopes=slopes)
    model.set_weights(weights)
    bnpatch.export_onnx(model, tmp_path / "patched.onnx")
    original = onnx.load(path)
    (expected,) = ReferenceEvaluator(original, new_ops=[oracle_of(weights, names)]).run(
        None, {"x": x.numpy()}
    )
    (plain,) = ReferenceEvaluator(original).run(None, {"x": x.numpy()})
    (found,) = onnxruntime.InferenceSession(tmp_path / "patched.onnx").run(None, {"x": x.numpy()})
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale  # float32, in another order
    assert np.abs(plain - expected).max() > 0.05 * scale
