"""Patched ONNX files in other runtimes, and quantized."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

import bnpatch
from bnpatch.core.patch import PatchWeights
from tests import closed_form


@pytest.fixture(scope="module")
def patched(checkpoint, tmp_path_factory):
    """The classifier with a weight and a slope in every norm layer, as ONNX."""
    model = bnpatch.load(checkpoint)
    path = tmp_path_factory.mktemp("patched") / "patched.onnx"
    names = model.alphas()
    model.set_weights(PatchWeights(dict.fromkeys(names, 0.3), {}, dict.fromkeys(names, 0.5)))
    bnpatch.export_onnx(model, path)
    return path


def inputs(images):
    return closed_form.as_inputs(images.astype(np.uint8))


def outputs(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs(images).numpy()})[0]


@pytest.mark.slow
def test_openvino_computes_what_onnxruntime_does(patched, foggy):
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(patched, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 7):
        expected = outputs(patched, foggy[0][:count])
        found = compiled(inputs(foggy[0][:count]).numpy())[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_opencv_computes_what_onnxruntime_does(patched, foggy, tmp_path):
    """With a fixed number of images, and what follows from that folded: its importer needs both."""
    cv2 = pytest.importorskip("cv2")
    proto = onnx.load(patched)
    make_dim_param_fixed(proto.graph, proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 3)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "fixed.onnx")
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    network = cv2.dnn.readNetFromONNX(options.optimized_model_filepath)
    network.setInput(inputs(foggy[0][:3]).numpy())
    expected = outputs(patched, foggy[0][:3])
    np.testing.assert_allclose(network.forward(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


class _Images(CalibrationDataReader):
    def __init__(self, name, images):
        self.batches = iter([{name: inputs(images[i : i + 50]).numpy()} for i in range(0, len(images), 50)])

    def get_next(self):
        return next(self.batches, None)


@pytest.mark.slow
def test_convolutions_of_a_patched_file_can_be_quantized(patched, foggy, tmp_path):
    images, labels = foggy
    prepared, quantized = tmp_path / "prepared.onnx", tmp_path / "quantized.onnx"
    quant_pre_process(patched, prepared, skip_symbolic_shape=True)
    reader = _Images(onnxruntime.InferenceSession(patched).get_inputs()[0].name, images[:200])
    quantize_static(
        prepared,
        quantized,
        reader,
        op_types_to_quantize=["Conv"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    labels = labels[200:]
    before, after = (
        (outputs(path, images[200:]).argmax(1) == labels).mean() for path in (patched, quantized)
    )
    assert after > before - 0.05  # ten seeds of the classifier: -1.5 to +1.6 points
