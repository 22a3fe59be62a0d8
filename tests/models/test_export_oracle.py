"""Patched files against the original graph in onnx's own evaluator, whose Batch Norm is the oracle.

No code of bnpatch computes what is expected here. Then: the check at export notices a rewrite that is wrong.
"""

from dataclasses import replace

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
from bnpatch.models.export import ParityError
from bnpatch.models.running_stats import calibrate
from bnpatch.onnx import match
from bnpatch.onnx.formulas import append_norm
from bnpatch.onnx.rewrite import rewrite
from tests import reference
from tests.nn.norms import images, settle
from tests.onnx.build import batch_norm, bn_model, in_if, parameters
from tests.onnx.rewritten import group_norm_model, two_norms

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


def of_other_eps(norm):
    return replace(norm, eps=norm.eps + 0.1)


def appends_by_another_formula(patch):
    """The fault is in all that a search runs and in all that an export writes."""
    patch.setitem(
        rewrite.__kwdefaults__, "append", lambda tape, norm, *rest, **given: append_norm(
            tape, of_other_eps(norm), *rest, **given
        )
    )  # fmt: skip


def reads_another_eps(patch):
    right = match._norm_layer
    patch.setattr(match, "_norm_layer", lambda *args: of_other_eps(right(*args)))


def bends_the_rest_of_the_graph(patch):
    def wrong(tape, norm, *rest, **given):
        for use in norm.output.uses():
            if use.node.op_type == "Relu":
                use.node.op_type = "Abs"
        return append_norm(tape, norm, *rest, **given)

    patch.setitem(rewrite.__kwdefaults__, "append", wrong)


def exported(proto, folder):
    """Patch a graph that takes (N, 6, *spatial), and export it."""
    path = folder / "original.onnx"
    path.write_bytes(proto.SerializeToString())
    model, x = bnpatch.load(path, preprocessing={"img_size": 8}), images(4, 6, 5, 4)
    if model.uncalibrated():
        calibrate(model, x)
    names = model.baseline_alphas()
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.3), slopes=dict.fromkeys(names, 0.7)))
    return bnpatch.export_onnx(model, folder / "patched.onnx", x)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (appends_by_another_formula, "^norm layer bn deviates"),
        (reads_another_eps, "^what was read of norm layer bn deviates"),
        (bends_the_rest_of_the_graph, "^norm layer bn2 deviates"),
    ],
)
def test_a_wrong_rewrite_of_a_graph_is_noticed(fault, part, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(ParityError, match=part):
            exported(two_norms(), tmp_path)
    assert exported(two_norms(), tmp_path).patched == ("bn", "bn2")


@pytest.mark.parametrize(
    "proto",
    [
        group_norm_model(),
        bn_model(dtype=np.float16, conv=True),
        bn_model(x=(3, 6, 5, 4)),
        in_if(batch_norm(), parameters()),
    ],
    ids=["groups", "half", "three at a time", "branches"],
)
def test_a_right_one_passes(proto, tmp_path):
    assert exported(proto, tmp_path).patched
