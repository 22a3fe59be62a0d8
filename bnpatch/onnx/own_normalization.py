"""Find out whether a graph normalizes images itself, before its first layer."""

import numpy as np
import onnx_ir as ir

from bnpatch.onnx.inference import constant_of

_COPIES = ("Cast", "Transpose", "Identity")
_CHANNELS = (1, 3)
_BYTES = 255.0
_DEVIATIONS = (0.05, 1.0)  # of images, as a share of their largest value; and no scale at all


def largest_value(graph: ir.Model, name: str) -> float | None:
    """Return the largest value of the images that a graph takes, 1 or 255, if it normalizes them itself.

    It does if it first shifts and scales its input by numbers, one for all values or one per channel, which
    are the mean and the deviation of images with values in [0, 1] or of bytes.

    Args:
        graph: the graph.
        name: name of the input.

    Returns:
        The largest value; None if the graph takes images that are normalized already.
    """
    value = next(value for value in graph.graph.inputs if value.name == name)
    scale, shift = np.ones(1), np.zeros(1)  # of the input so far
    while len(uses := [use for use in value.uses() if use.node.op_type != "Shape"]) == 1:
        node, place = uses[0].node, uses[0].idx
        value = node.outputs[0]
        if node.op_type in _COPIES:
            continue
        is_arithmetic = len(node.inputs) == 2 and (
            node.op_type in ("Mul", "Add") or (node.op_type in ("Sub", "Div") and place == 0)
        )
        number = constant_of(node.inputs[1 - place]) if is_arithmetic else None
        if number is None or number.size not in _CHANNELS:
            break
        number = number.reshape(-1).astype(np.float64)
        if node.op_type in ("Mul", "Div"):
            factor = number if node.op_type == "Mul" else 1 / np.where(number == 0, np.nan, number)
            scale, shift = scale * factor, shift * factor
        else:
            shift = shift + (number if node.op_type == "Add" else -number)
    with np.errstate(all="ignore"):  # numbers that are not finite fit no images
        return _largest(-shift / scale, 1 / scale)


def _largest(mean: np.ndarray, deviation: np.ndarray) -> float | None:
    """Return the largest value of images of this mean and deviation; None if no images have them."""
    for largest in (1.0, _BYTES):
        low, high = (share * largest for share in _DEVIATIONS)
        is_deviation = np.all((deviation >= low) & (deviation < high)) or (
            largest == _BYTES and np.allclose(deviation, largest)
        )
        if is_deviation and np.all((mean >= 0) & (mean <= largest)):
            return largest
    return None
