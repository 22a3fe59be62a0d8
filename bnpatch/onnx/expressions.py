"""Values of an ONNX graph with arithmetic operators, so that ``bnpatch.core.moments`` works on them.

A :class:`Value` has the operators that the formula needs (see :mod:`bnpatch.core.moments`), and a few more
that callers use. Each operator appends an ONNX node. Constants stay Python numbers and NumPy arrays
until they are combined with a value, so NumPy computes what is known beforehand, in float64, and it costs
nothing at run time. All ONNX operators that are used exist from opset 7 on, so the opset never changes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

#: A constant operand, which is known when the graph is written.
Constant = int | float | NDArray[Any] | np.generic

#: The first opset whose reductions take their axes as an input.
_AXES_ARE_AN_INPUT = 18

#: The first opset whose Clip takes its bounds as inputs.
_BOUNDS_ARE_INPUTS = 11

#: The first opset whose Constant can have integers.
_CONSTANTS_ARE_OF_ANY_TYPE = 9


class Tape:
    """The list of new nodes that replace one norm layer, in order.

    Args:
        prefix: prefix of the names of all new nodes and values.
        opset: opset version of the default domain.
        taken: the names that the model uses; new names are added to it.
    """

    def __init__(self, prefix: str, opset: int, taken: set[str]) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._opset = opset
        self._taken = taken
        self._memo: dict[Any, ir.Value] = {}

    def op(
        self,
        op_type: str,
        x: ir.Value,
        *others: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attrs: Any,
    ) -> ir.Value:
        """Append a node with one output, and return the output. An equal node on the tape is reused.

        Args:
            op_type: name of the operator in the default domain.
            x: first input of the node.
            others: its other inputs; None leaves out an optional one.
            dtype: type of the output; that of ``x`` by default.
            attrs: attributes of the node.
        """
        inputs = (x, *others)
        key = (op_type, *(id(value) for value in inputs), *sorted((k, repr(v)) for k, v in attrs.items()))
        if key not in self._memo:
            self._memo[key] = self._append(op_type, inputs, dtype or x.dtype, attrs)
        return self._memo[key]

    def constant(self, value: Constant, dtype: ir.DataType) -> ir.Value:
        """Append a Constant node, which unlike an initializer is valid in subgraphs and every IR version."""
        if dtype == ir.DataType.INT64 and self._opset < _CONSTANTS_ARE_OF_ANY_TYPE:
            return self.op("Cast", self.constant(value, ir.DataType.FLOAT), dtype=dtype, to=int(dtype))
        array = np.asarray(value).astype(dtype.numpy())
        key = ("Constant", dtype, array.shape, array.tobytes())
        if key not in self._memo:
            output = self._append("Constant", (), dtype, {"value": ir.Tensor(array, dtype=dtype)})
            output.shape = ir.Shape(array.shape)
            self._memo[key] = output
        return self._memo[key]

    def reduce(self, op_type: str, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Append a node such as ``ReduceMean`` that keeps the axes with size 1."""
        if self._opset < _AXES_ARE_AN_INPUT:
            return self.op(op_type, x, axes=list(axes), keepdims=1)
        return self.op(op_type, x, self.constant(np.array(axes), ir.DataType.INT64), keepdims=1)

    def clip(self, x: ir.Value, low: float | None, high: float, dtype: ir.DataType) -> ir.Value:
        """Append a ``Clip`` to the range from ``low``, or from minus infinity, to ``high``."""
        if self._opset < _BOUNDS_ARE_INPUTS:
            bounds: dict[str, Any] = {"max": high} if low is None else {"min": low, "max": high}
            return self.op("Clip", x, **bounds)
        lower = None if low is None else self.constant(low, dtype)
        return self.op("Clip", x, lower, self.constant(high, dtype))

    def _append(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        attrs: dict[str, Any],
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attrs, name=self._new_name(op_type))
        output = node.outputs[0]
        output.name = self._new_name(f"{op_type}_output")
        if dtype is not None:
            output.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return output

    def _new_name(self, stem: str) -> str:
        name = plain = f"{self._prefix}/{stem}"
        count = 0
        while name in self._taken:
            count += 1
            name = f"{plain}_{count}"
        self._taken.add(name)
        return name


class Value:
    """A value of a graph with the operators of an array; each operator appends a node to the tape."""

    #: Makes ``array + value`` call this class. NumPy would add the value to each element of the array.
    __array_ufunc__ = None

    def __init__(self, tape: Tape, value: ir.Value, dtype: ir.DataType | None = None) -> None:
        dtype = dtype or value.dtype
        if dtype is None:
            raise ValueError(f"the type of {value.name!r} is not known")
        self.tape = tape
        self.value = value
        self.dtype = dtype

    def __add__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 0) else self._op("Add", self, other)

    def __radd__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 0) else self._op("Add", other, self)

    def __sub__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 0) else self._op("Sub", self, other)

    def __rsub__(self, other: Any) -> "Value":
        return self._op("Sub", other, self)

    def __mul__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 1) else self._op("Mul", self, other)

    def __rmul__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 1) else self._op("Mul", other, self)

    def __truediv__(self, other: Any) -> "Value":
        return self if _is_scalar(other, 1) else self._op("Div", self, other)

    def __rtruediv__(self, other: Any) -> "Value":
        return self._op("Div", other, self)

    def __pow__(self, other: Any) -> "Value":
        return self._op("Pow", self, other)

    def mean(self, axes: int | tuple[int, ...], keepdims: bool = True) -> "Value":
        """Return the mean over ``axes``, which stay with size 1."""
        if not keepdims:
            raise ValueError("keepdims must be True")
        axes = (axes,) if isinstance(axes, int) else axes
        return Value(self.tape, self.tape.reduce("ReduceMean", self.value, axes), self.dtype)

    def sum_of_squares(self, axis: int) -> "Value":
        """Return the sum of the squares over ``axis``, which stays with size 1."""
        return Value(self.tape, self.tape.reduce("ReduceSumSquare", self.value, (axis,)), self.dtype)

    def join(self, other: "Value", axis: int) -> "Value":
        """Return these elements and those of ``other``, one after the other on ``axis``."""
        return Value(self.tape, self.tape.op("Concat", self.value, other.value, axis=axis), self.dtype)

    def global_average_pool(self) -> "Value":
        """Return the mean over all axes but the first two; the axes stay with size 1."""
        return self._op("GlobalAveragePool", self)

    def sqrt(self) -> "Value":
        """Return the square root of each element."""
        return self._op("Sqrt", self)

    def log(self) -> "Value":
        """Return the natural logarithm of each element."""
        return self._op("Log", self)

    def exp(self) -> "Value":
        """Return e to the power of each element."""
        return self._op("Exp", self)

    def hard_sigmoid(self, scale: float, shift: float) -> "Value":
        """Return ``min(max(scale x + shift, 0), 1)`` of each element.

        The operator HardSigmoid does it in one node; onnxruntime's CPU provider has it for float32 alone.
        """
        if self.dtype != ir.DataType.FLOAT:
            return (self * scale + shift).clip(0.0, 1.0)
        return Value(self.tape, self.tape.op("HardSigmoid", self.value, alpha=scale, beta=shift), self.dtype)

    def clip(self, low: float | None, high: float) -> "Value":
        """Return the elements, moved into the range from ``low``, or from minus infinity, to ``high``."""
        return Value(self.tape, self.tape.clip(self.value, low, high, self.dtype), self.dtype)

    def clamp_min_0(self) -> "Value":
        """Return ``max(x, 0)``, by the operator Relu because Max does not broadcast before opset 8."""
        return self._op("Relu", self)

    def reshape(self, shape: Sequence[int]) -> "Value":
        """Return the values in another shape; 0 keeps a size, and -1 infers one."""
        target = self.tape.constant(np.array(shape), ir.DataType.INT64)
        return Value(self.tape, self.tape.op("Reshape", self.value, target), self.dtype)

    def cast(self, dtype: ir.DataType) -> "Value":
        """Return the values in another type, or this value if it has that type."""
        if dtype == self.dtype:
            return self
        return Value(self.tape, self.tape.op("Cast", self.value, dtype=dtype, to=int(dtype)), dtype)

    def _op(self, op_type: str, *operands: Any) -> "Value":
        inputs = [
            operand.value if isinstance(operand, Value) else self.tape.constant(operand, self.dtype)
            for operand in operands
        ]
        return Value(self.tape, self.tape.op(op_type, *inputs, dtype=self.dtype), self.dtype)


def _is_scalar(operand: Any, number: int) -> bool:
    return isinstance(operand, (int, float)) and operand == number
