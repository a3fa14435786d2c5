"""ONNX operators that work on each value alone: arithmetic, activations, comparisons, casts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F

from fgvc.models.onnxnet.convert import Builder
from fgvc.models.onnxnet.payload import FLOATS
from fgvc.models.onnxnet.registry import MICROSOFT, Attributes, Inputs, converts, first, number, text
from fgvc.models.onnxnet.values import Known, Live, Stored, Value

UNARY: dict[str, Callable[..., Tensor]] = {
    "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Neg": torch.neg, "Abs": torch.abs, "Floor": torch.floor, "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign,
    "Reciprocal": torch.reciprocal, "Erf": torch.erf, "Softplus": F.softplus, "Softsign": F.softsign, "Mish": F.mish,
    "HardSwish": F.hardswish, "Sin": torch.sin, "Cos": torch.cos, "Not": torch.logical_not, "IsNaN": torch.isnan,
}  # fmt: skip
BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "Pow": torch.pow, "Equal": torch.eq,
    "Less": torch.lt, "Greater": torch.gt, "LessOrEqual": torch.le, "GreaterOrEqual": torch.ge, "And": torch.logical_and,
    "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip
COMPARISONS = ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
GATES: dict[Any, Callable[..., Tensor]] = {torch.sigmoid: F.silu, F.hardsigmoid: F.hardswish}


@converts(*UNARY)
def unary(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    if node.op_type == "IsNaN":  # of another type than its input
        return [b.call(torch.isnan, b.live(first(inputs)))]
    return [b.elementwise(UNARY[node.op_type], b.live(first(inputs)))]


@converts(*BINARY)
def binary(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    function = BINARY[node.op_type]
    operands = [_operand(b, value, inputs) for value in inputs]
    if node.op_type == "Mul" and (gated := _gated(b, *operands)) is not None:
        return [gated]
    if node.op_type in ("Add", "Sub", "Mul", "Div"):
        function = getattr(operator, {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "truediv"}[node.op_type])
        if all(not isinstance(value, Live) or value.metas[0].is_floating_point() for value in operands):
            result = b.broadcast(function, *operands)
            return [b.elementwise(torch.trunc, result) if node.op_type == "Div" and _of_integers(inputs) else result]
    elif node.op_type != "Pow":  # torch compares with a number on the right alone, and joins no numbers
        operands = [
            operand if isinstance(operand, Live) or (at == 1 and node.op_type in COMPARISONS) else b.live(first([value]))
            for at, (operand, value) in enumerate(zip(operands, inputs, strict=True))
        ]
    return [b.call(function, *operands)]


def _of_integers(inputs: Inputs) -> bool:
    """Whether an operand shows that whole numbers are computed with: those of the image are held as floats."""
    return any(isinstance(value, Known) and np.issubdtype(value.array.dtype, np.integer) for value in inputs)


def _gated(b: Builder, one: Live | float, two: Live | float) -> Live | None:
    """x sigmoid(x) and x hardsigmoid(x) as the activations that they are: in one pass, and with exact derivatives, where that of
    torch's hardsigmoid is 1/6 in single precision for doubles, too."""
    for x, gate in ((one, two), (two, one)):
        if isinstance(x, Live) and isinstance(gate, Live) and gate.node.target in GATES and gate.node.args == (x.node,):
            return b.elementwise(GATES[gate.node.target], x)
    return None


@converts("Sum", "Min", "Max", "Mean")
def variadic(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    functions: dict[str, Callable[..., Tensor]] = {"Min": torch.minimum, "Max": torch.maximum}
    function = functions.get(node.op_type, operator.add)
    result = b.live(first(inputs))
    for value in inputs[1:]:
        assert value is not None
        result = b.call(function, result, b.live(value))
    return [b.call(operator.truediv, result, len(inputs)) if node.op_type == "Mean" else result]


def _operand(b: Builder, value: Value | None, among: Inputs) -> Live | float | int:
    """A number where it is one that broadcasts to nothing more than the others have."""
    value = first([value])
    rank = max((other.rank for other in among if isinstance(other, Live)), default=0)
    if isinstance(value, Known | Stored):
        array = b.constant(value, "operand") if isinstance(value, Stored) or value.fixed else None
        if array is not None and array.size == 1 and array.ndim <= rank:
            if isinstance(value, Stored):
                b.kept.setdefault(value.name, "a single number")
            single = array.reshape(-1)[0].item()
            return int(single) if isinstance(single, bool) else single
    return b.live(value)


@converts("Identity", "CastLike")
def identity(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [first(inputs)]


@converts("Dropout")
def dropout(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [first(inputs)]  # as at inference; its mask is read by nothing there


@converts("Cast")
def cast(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    """Convert Cast: nothing among floats, since all is trained in one type; whole numbers become that type; to whole numbers by
    truncation."""
    x = b.live(first(inputs))
    if a["to"] in FLOATS:
        return [x if x.metas[0].is_floating_point() else b.call(as_float, x)]
    if a["to"] == TensorProto.BOOL:
        return [b.call(torch.ne, x, 0)]
    if x.metas[0].dtype == torch.bool:  # which torch would not add up
        return [b.call(as_float, x)]
    return [b.call(torch.trunc, x) if x.metas[0].is_floating_point() else x]


def as_float(x: Tensor) -> Tensor:
    """Convert to torch's default floating-point type."""
    return x.to(torch.get_default_dtype())


@converts("Clip")
def clip(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    low, high = (
        number(b, inputs[at] if len(inputs) > at else None, a.get(name), infinite)
        for at, name, infinite in ((1, "min", -math.inf), (2, "max", math.inf))
    )
    if (low, high) == (0, math.inf):
        return [b.elementwise(F.relu, x)]
    if math.isinf(low) or math.isinf(high):
        bounds = {name: value for name, value in (("min", low), ("max", high)) if not math.isinf(value)}
        return [b.call(torch.clamp, x, **bounds) if bounds else x]
    return [b.elementwise(F.hardtanh, x, low, high)]


@converts("HardSigmoid")
def hard_sigmoid(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    alpha, beta = a.get("alpha", 0.2), a.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return [b.elementwise(F.hardsigmoid, b.live(first(inputs)))]
    return [b.elementwise(linear_clamp, b.live(first(inputs)), alpha, beta)]


def linear_clamp(x: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha x + beta, clamped to [0,1]."""
    return (alpha * x + beta).clamp(0, 1)


@converts("LeakyRelu")
def leaky_relu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [b.elementwise(F.leaky_relu, b.live(first(inputs)), a.get("alpha", 0.01))]


@converts("Elu", "Celu")
def elu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [b.elementwise(F.elu if node.op_type == "Elu" else F.celu, b.live(first(inputs)), a.get("alpha", 1.0))]


@converts("Selu")
def selu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    alpha, gamma = a.get("alpha", 1.67326319217681884765625), a.get("gamma", 1.05070102214813232421875)
    return [b.elementwise(scaled_elu, b.live(first(inputs)), alpha, gamma)]


def scaled_elu(x: Tensor, alpha: float, gamma: float) -> Tensor:
    """gamma ELU(x), ELU with `alpha`."""
    return gamma * F.elu(x, alpha)


@converts("ThresholdedRelu")
def thresholded_relu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [b.elementwise(cut_below, b.live(first(inputs)), a.get("alpha", 1.0))]


def cut_below(x: Tensor, alpha: float) -> Tensor:
    """x where it is above alpha, else 0."""
    return F.threshold(x, alpha, 0.0)


@converts("PRelu")
def prelu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    assert inputs[1] is not None
    return [b.call(parametric_relu, b.live(first(inputs)), b.live(inputs[1]))]


def parametric_relu(x: Tensor, slope: Tensor) -> Tensor:
    """relu(x) + slope min(x, 0)."""
    return F.relu(x) + slope * x.clamp(max=0)


@converts("Gelu")
@converts("Gelu", "BiasGelu", "FastGelu", "QuickGelu", domain=MICROSOFT)
def gelu(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    if len(inputs) > 1 and inputs[1] is not None:
        x = b.call(operator.add, x, b.live(inputs[1]))
    if node.op_type == "QuickGelu":
        return [b.elementwise(quick_gelu, x, a.get("alpha", 1.702))]
    approximate = "tanh" if node.op_type == "FastGelu" or text(a.get("approximate", "none")) == "tanh" else "none"
    return [b.elementwise(F.gelu, x, approximate=approximate)]


def quick_gelu(x: Tensor, alpha: float) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


@converts("Softmax", "LogSoftmax")
def softmax(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, function = b.live(first(inputs)), F.softmax if node.op_type == "Softmax" else F.log_softmax
    if b.opsets.get("", 13) >= 13:
        return [b.elementwise(function, x, a.get("axis", -1))]
    axis = a.get("axis", 1) % x.rank  # before opset 13 over all axes from this one on
    if axis == x.rank - 1:
        return [b.elementwise(function, x, -1)]
    return [b.elementwise(flat_softmax, x, axis, node.op_type == "LogSoftmax")]


def flat_softmax(x: Tensor, axis: int, log: bool) -> Tensor:
    flat = x.flatten(axis)
    return (F.log_softmax(flat, -1) if log else F.softmax(flat, -1)).reshape(x.shape)


@converts("Where")
def where(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    assert all(value is not None for value in inputs)
    condition, x, y = (b.live(value) for value in inputs if value is not None)
    return [b.call(torch.where, b.call(torch.ne, condition, 0), x, y)]
