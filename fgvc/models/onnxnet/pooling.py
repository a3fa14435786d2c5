"""ONNX operators that pool and reduce."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.models.onnxnet.convert import Builder, Refused
from fgvc.models.onnxnet.registry import Attributes, Inputs, converts, first, numbers
from fgvc.models.onnxnet.values import Live, Value
from fgvc.models.onnxnet.windows import pad_input, window_pads


@converts("GlobalAveragePool", "GlobalMaxPool")
def global_pool(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    function = torch.mean if node.op_type == "GlobalAveragePool" else torch.amax
    return [_reduced(b, function, x, tuple(range(2, x.rank)), keep=True)]


@converts("AveragePool", "MaxPool", "LpPool")
def pool(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, kernel = b.live(first(inputs)), tuple(a["kernel_shape"])
    strides, dilations = tuple(a.get("strides", (1,) * len(kernel))), tuple(a.get("dilations", (1,) * len(kernel)))
    pads = window_pads(a, x.shape[2:], kernel, strides, dilations)
    ceil = bool(a.get("ceil_mode", 0))
    cut = partial(_without_empty, b, x.shape[2:], pads, strides) if ceil else lambda y: y
    wide = [(dilation * (side - 1) + 1) // 2 for side, dilation in zip(kernel, dilations, strict=True)]  # torch pads no more
    if any(b.consumers.get(name) or name in b.outputs for name in node.output[1:] if name):
        raise Refused("the places of its maxima are read, too")
    if node.op_type == "LpPool":
        raise Refused("LpPool is not known here")
    if node.op_type == "MaxPool":
        x, padding = pad_input(b, x, pads, -math.inf, wide)
        function: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(kernel)]
        return [cut(b.call(function, x, kernel, strides, padding, dilations, ceil))]
    inside = not a.get("count_include_pad", 0)
    if set(dilations) != {1}:
        raise Refused("an average over dilated windows is not known here")
    function = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(kernel)]
    if inside and any(before != after or before > most for (before, after), most in zip(pads, wide, strict=True)):
        ones = b.call(torch.ones_like, x)
        x, padding = pad_input(b, x, pads, 0.0, wide)
        ones, _ = pad_input(b, ones, pads, 0.0, wide)
        over = [b.call(function, value, kernel, strides, padding, ceil) for value in (x, ones)]
        return [cut(b.call(operator.truediv, *over))]
    x, padding = pad_input(b, x, pads, 0.0, wide)
    return [cut(b.call(function, x, kernel, strides, padding, ceil, not inside))]


def _without_empty(b: Builder, sides: Sequence[int], pads: Sequence[tuple[int, int]], strides: Sequence[int], y: Live) -> Live:
    """Drop windows that begin behind the map of `sides`, in its padding: `ceil_mode` makes none of these, and torch does where
    the padding is part of its input."""
    for axis, (side, (before, _), stride) in enumerate(zip(sides, pads, strides, strict=True), start=2):
        most = -(-(side + before) // stride)
        if y.shape[axis] > most:
            y = b.call(torch.narrow, y, axis, 0, most)
    return y


def reduce_l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keep)


def reduce_l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 1, axes, keep)


def reduce_sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.square().sum(axes, keep)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin, "ReduceL2": reduce_l2,
    "ReduceL1": reduce_l1, "ReduceSumSquare": reduce_sum_square, "ReduceLogSumExp": torch.logsumexp,
}  # fmt: skip


@converts(*REDUCTIONS)
def reduce(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    axes = numbers(b, a, "axes", inputs, 1)
    if not axes and a.get("noop_with_empty_axes", 0):
        return [x]
    axes = axes or list(range(x.rank))
    return [
        _reduced(b, REDUCTIONS[node.op_type], x, tuple(axis % x.rank for axis in axes), keep=bool(a.get("keepdims", 1)))
    ]


def _reduced(b: Builder, function: Callable[..., Tensor], x: Live, axes: tuple[int, ...], *, keep: bool) -> Live:
    node = b.graph.call_function(function, (x.node, axes, keep))
    shapes = [[1 if at in axes else n for at, n in enumerate(meta.shape) if keep or at not in axes] for meta in x.metas]
    return Live(node, tuple(torch.empty(shape, device="meta") for shape in shapes))
