"""ONNX operators with weights: convolutions, linear layers, norms."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.models.onnxnet.convert import Builder, Refused, module_name
from fgvc.models.onnxnet.elementwise import UNARY, cut_below, linear_clamp, scaled_elu
from fgvc.models.onnxnet.registry import MICROSOFT, Attributes, Inputs, converts, first, text
from fgvc.models.onnxnet.values import Known, Live, Size, Stored, Value
from fgvc.models.onnxnet.windows import pad_input, window_pads

CONVS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SMALLEST = 1e-37  # what stands for a length of 0: a vector of zeros stays one
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@converts("Conv")
@converts("FusedConv", domain=MICROSOFT)
def conv(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, weight, bias = b.live(first(inputs)), inputs[1], inputs[2] if len(inputs) > 2 else None
    assert weight is not None
    if isinstance(bias, Known) and bias.fixed and not bias.array.any():
        bias = None
    shape = tuple(weight.shape if isinstance(weight, Stored | Live) else weight.array.shape)
    kernel = tuple(shape[2:])
    strides, dilations = tuple(a.get("strides", (1,) * len(kernel))), tuple(a.get("dilations", (1,) * len(kernel)))
    pads = window_pads(a, x.shape[2:], kernel, strides, dilations)
    groups = a.get("group", 1)
    x, padding = pad_input(b, x, pads, 0.0)
    if isinstance(weight, Stored) and (bias is None or isinstance(bias, Stored)) and len(kernel) in CONVS:
        last = _classified(b, node, a, x, weight, bias, pads)
        if last is not None:
            y = last
        else:
            module = CONVS[len(kernel)](
                shape[1] * groups, shape[0], kernel, strides, padding, dilations, groups, bias=bias is not None, device="meta"
            )
            name = b.add_module(module_name(node, weight.name), module, weight=weight, bias=bias)
            y = b.module(name, x, partial(_convolved, shape[0], kernel, strides, padding, dilations))
    else:
        b.learned = True
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        y = b.call(function, x, b.live(weight), None if bias is None else b.live(bias), strides, padding, dilations, groups)
    if node.op_type == "FusedConv":
        if len(inputs) > 3 and inputs[3] is not None:
            y = b.call(operator.add, y, b.live(inputs[3]))
        y = _activated(b, y, a)
    return [y]


def _convolved(
    channels: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    size: torch.Size,
) -> tuple[int, ...]:
    each = zip(size[2:], kernel, strides, padding, dilations, strict=True)
    return (size[0], channels, *((n + 2 * pad - d * (k - 1) - 1) // step + 1 for n, k, step, pad, d in each))


FUSED_NUMBERS = ("activation_alpha", "activation_beta", "activation_gamma")
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {  # and how many numbers they take
    "Clip": (F.hardtanh, 2), "LeakyRelu": (F.leaky_relu, 1), "HardSigmoid": (linear_clamp, 2), "Elu": (F.elu, 1),
    "Selu": (scaled_elu, 2), "ThresholdedRelu": (cut_below, 1),
}  # fmt: skip


def _activated(b: Builder, y: Live, a: Attributes) -> Live:
    kind, numbers = text(a.get("activation", "")), list(a.get("activation_params", ()))  # those of FusedConv
    numbers = numbers or [a[name] for name in FUSED_NUMBERS if name in a]  # of FusedGemm
    if not kind:
        return y
    if kind in ACTIVATIONS:
        function, expected = ACTIVATIONS[kind]
        if len(numbers) != expected:
            raise Refused(f"its activation is {kind!r} with {len(numbers)} numbers, not {expected}")
        return b.elementwise(function, y, *numbers)
    if kind in UNARY:
        return b.elementwise(UNARY[kind], y)
    raise Refused(f"its activation is {kind!r}, which is not known here")


PASSING = (  # may lie between the last layer and the output
    "Flatten", "Reshape", "Squeeze", "Identity", "Softmax", "LogSoftmax", "Sigmoid", "Cast", "Transpose", "Dropout",
)  # fmt: skip
MEANS = ("GlobalAveragePool", "AveragePool", "ReduceMean")


def _ends_with(b: Builder, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """The nodes between a convolution and the output, where it is the last layer: activations and means, maybe; else None."""
    name, behind = node.output[0], list[onnx.NodeProto]()
    while name not in b.outputs:
        readers = b.consumers.get(name, ())
        if len(readers) != 1 or readers[0].op_type not in (*PASSING, *MEANS, "Relu"):
            return None
        behind.append(readers[0])
        name = readers[0].output[0]
    return behind


def _classified(
    b: Builder, node: onnx.NodeProto, a: Attributes, x: Live, weight: Stored, bias: Stored | None, pads: Sequence[tuple[int, int]]
) -> Live | None:
    """The output of a convolution that is the last layer of a net, a linear layer by another name: on a map of one cell; on the
    mean of a map, where that follows (the mean of a convolution is that of its input, convolved); or in each place of one
    (SqueezeNet, arXiv:1602.07360). None: it is not the last layer."""
    if set(weight.shape[2:]) != {1} or any(map(any, pads)) or a.get("group", 1) != 1 or set(a.get("strides", ())) - {1}:
        return None
    behind = _ends_with(b, node)
    if behind is None:
        return None
    rows, columns = weight.shape[:2]
    spread = len(x.shape) - 2
    module = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    name = b.add_module(module_name(node, weight.name), module, weight=weight.viewed("reshape", (rows, columns)), bias=bias)
    follower = next((after for after in behind if after.op_type not in ("Identity", "Dropout")), None)
    if set(x.shape[2:]) == {1}:
        pooled = b.call(torch.flatten, x, 1)
    elif follower is not None and follower.op_type == "GlobalAveragePool" and not a.get("activation"):
        pooled = b.call(torch.mean, x, tuple(range(2, x.rank)))
    else:
        last = b.call(torch.permute, x, (0, *range(2, x.rank), 1))
        y = b.module(name, last, lambda own: (*own[:-1], rows))
        return b.call(torch.permute, y, (0, x.rank - 1, *range(1, x.rank - 1)))
    return b.call(torch.reshape, b.module(name, pooled, lambda own: (own[0], rows)), (Size(1), rows, *(1,) * spread))


@converts("ConvTranspose")
def conv_transpose(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, weight, bias = b.live(first(inputs)), inputs[1], inputs[2] if len(inputs) > 2 else None
    assert weight is not None
    w = b.live(weight)
    kernel = tuple(w.shape[2:])
    pads = [*a.get("pads", (0,) * 2 * len(kernel))]
    mode = text(a.get("auto_pad", "NOTSET"))
    if mode not in ("NOTSET", "VALID") or "output_shape" in a:
        raise Refused("its padding is computed from the size of its output, which is not known here")
    if pads[: len(kernel)] != pads[len(kernel) :]:
        raise Refused("its padding is not the same on both sides")
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(kernel)]
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    return [
        b.call(
            function, x, w, None if bias is None else b.live(bias), tuple(a.get("strides", ones)), tuple(pads[: len(kernel)]),
            tuple(a.get("output_padding", zeros)), a.get("group", 1), tuple(a.get("dilations", ones)),
        )
    ]  # fmt: skip


@converts("BatchNormalization")
def batch_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, (scale, shift, mean, variance) = b.live(first(inputs)), inputs[1:5]
    eps, statistics = a.get("epsilon", 1e-5), (mean, variance)
    # By its own statistics, as weights are standardised; before opset 14 it is its further outputs that say so.
    if a.get("training_mode", 0) or (b.opsets.get("", 14) < 14 and any(node.output[1:])):
        return [b.call(F.batch_norm, x, None, None, *(b.live(value) for value in (scale, shift) if value), True, 0.0, eps)]
    if all(isinstance(value, Stored) for value in (scale, shift, mean, variance)):
        assert isinstance(scale, Stored)
        module = NORMS[x.rank](scale.shape[0], eps=eps, momentum=1 - a.get("momentum", 0.9), device="meta")
        assert module.num_batches_tracked is not None
        module.num_batches_tracked = torch.tensor(0)
        named = dict(weight=scale, bias=shift, running_mean=mean, running_var=variance)
        name = b.add_module(module_name(node, scale.name), module, **named)  # type: ignore[arg-type]
        return [b.module(name, x, tuple)]
    parts = [b.live(value, trained=False) for value in statistics if value]
    parts += [b.live(value) for value in (scale, shift) if value]
    return [b.elementwise(normalise, x, *(part.node for part in parts), eps)]


def normalise(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """A batch norm by statistics that may be computed, and have gradients."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    mean, variance, scale, shift = (value.reshape(shape) for value in (mean, variance, scale, shift))
    return (x - mean) * torch.rsqrt(variance + eps) * scale + shift


@converts("InstanceNormalization")
def instance_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, scale, shift = (b.live(value) for value in inputs if value is not None)
    return [b.call(F.instance_norm, x, None, None, scale, shift, True, 0.0, a.get("epsilon", 1e-5))]


@converts("GroupNormalization")
def group_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, scale, shift = (b.live(value) for value in inputs if value is not None)
    groups, eps = a["num_groups"], a.get("epsilon", 1e-5)
    if scale.shape[0] != x.shape[1]:  # opset 18 has a scale for each group
        each = x.shape[1] // groups
        scale, shift = (b.call(torch.repeat_interleave, value, each) for value in (scale, shift))
    return [b.call(F.group_norm, x, groups, scale, shift, eps)]


@converts("LayerNormalization")
def layer_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, scale, shift = b.live(first(inputs)), inputs[1], inputs[2] if len(inputs) > 2 else None
    return [_layer_norm(b, node, x, scale, shift, a.get("axis", -1) % x.rank, a.get("epsilon", 1e-5))]


def _layer_norm(
    b: Builder, node: onnx.NodeProto, x: Live, scale: Value | None, shift: Value | None, axis: int, eps: float
) -> Live:
    shape = tuple(x.shape[axis:])
    if (
        isinstance(scale, Stored)
        and scale.shape == shape
        and (shift is None or (isinstance(shift, Stored) and shift.shape == shape))
    ):
        module = nn.LayerNorm(shape, eps=eps, bias=shift is not None, device="meta")
        name = b.add_module(module_name(node, scale.name), module, weight=scale, bias=shift)
        return b.module(name, x, tuple)
    assert scale is not None
    y = b.call(operator.mul, b.call(F.layer_norm, x, shape, None, None, eps), b.live(scale))
    return y if shift is None else b.call(operator.add, y, b.live(shift))


@converts("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    total = b.call(operator.add, b.live(first(inputs)), b.live(first(inputs[1:])))
    if len(inputs) > 4 and inputs[4] is not None:
        total = b.call(operator.add, total, b.live(inputs[4]))
    shift = inputs[3] if len(inputs) > 3 else None
    normal = _layer_norm(b, node, total, inputs[2], shift, total.rank - 1, a.get("epsilon", 1e-12))
    if any(b.consumers.get(name) or name in b.outputs for name in node.output[1:3] if name):
        raise Refused("its mean and deviation are read, too")
    return [normal, total, total, total]  # the last is the fourth output


@converts("LRN")
def local_response_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    return [b.call(F.local_response_norm, x, a["size"], a.get("alpha", 1e-4), a.get("beta", 0.75), a.get("bias", 1.0))]


@converts("LpNormalization")
def lp_norm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [b.call(F.normalize, b.live(first(inputs)), float(a.get("p", 2)), a.get("axis", -1), SMALLEST)]


@converts("Gemm")
@converts("FusedGemm", domain=MICROSOFT)
def gemm(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, weight, bias = b.live(first(inputs)), inputs[1], inputs[2] if len(inputs) > 2 else None
    assert weight is not None
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    if (
        isinstance(weight, Stored)
        and (bias is None or (isinstance(bias, Stored) and math.prod(bias.shape) == max(bias.shape, default=1)))
        and (alpha, beta, a.get("transA", 0)) == (1.0, 1.0, 0)
    ):
        y = _linear(b, node, x, weight if a.get("transB", 0) else weight.transposed(), bias)
    else:
        left = b.call(torch.transpose, x, 0, 1) if a.get("transA", 0) else x
        right = b.live(weight)
        right = b.call(torch.transpose, right, 0, 1) if a.get("transB", 0) else right
        y = b.call(torch.matmul, left, right)
        y = b.call(operator.mul, y, alpha) if alpha != 1 else y
        if bias is not None:
            shift = b.live(bias)
            y = b.call(operator.add, y, b.call(operator.mul, shift, beta) if beta != 1 else shift)
    return [_activated(b, y, a)]


@converts("MatMul")
@converts("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def matmul(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    """A linear layer where the right side is a matrix of the file, with the bias that alone follows it."""
    left, right = inputs
    if a.get("transBatchA", 0) or a.get("transBatchB", 0):
        raise Refused("its batch is transposed, which is not known here")
    assert left is not None
    assert right is not None
    plain = not (a.get("transA", 0) or a.get("transB", 0)) and a.get("alpha", 1.0) == 1.0
    if plain and isinstance(left, Live) and isinstance(right, Stored) and len(right.shape) == 2:
        bias, follower = _bias_behind(b, node, right.shape[1])
        y = _linear(b, node, left, right.transposed(), bias)
        if follower is not None:
            b.fused[id(follower)] = node.output[0]
        return [y]
    x, y = b.live(left), b.live(right)
    x = b.call(torch.transpose, x, -1, -2) if a.get("transA", 0) else x
    y = b.call(torch.transpose, y, -1, -2) if a.get("transB", 0) else y
    product = b.call(torch.matmul, x, y)
    return [product if a.get("alpha", 1.0) == 1.0 else b.call(operator.mul, product, a["alpha"])]


def _bias_behind(b: Builder, node: onnx.NodeProto, width: int) -> tuple[Stored | None, onnx.NodeProto | None]:
    readers = b.consumers.get(node.output[0], ())
    if (
        len(readers) != 1
        or readers[0].op_type != "Add"
        or readers[0].domain not in ("", "ai.onnx")
        or node.output[0] in b.outputs
    ):
        return None, None
    other = next((name for name in readers[0].input if name != node.output[0]), None)
    bias = b.values.get(other or "")
    if isinstance(bias, Stored) and bias.shape == (width,):
        return bias, readers[0]
    return None, None


def _linear(b: Builder, node: onnx.NodeProto, x: Live, weight: Stored, bias: Value | None) -> Live:
    """Add a linear layer with `weight` (N,K), as torch has it."""
    rows, columns = weight.shape
    if isinstance(bias, Stored) and bias.shape != (rows,):
        if math.prod(bias.shape) != rows:  # one number for all
            y = _linear(b, node, x, weight, None)
            return b.call(operator.add, y, b.live(bias))
        bias = bias.viewed("reshape", (rows,))
    module = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    assert bias is None or isinstance(bias, Stored)
    name = b.add_module(module_name(node, weight.name), module, weight=weight, bias=bias)
    return b.module(name, x, lambda own: (*own[:-1], rows))


@converts("Einsum")
def einsum(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    return [b.call(torch.einsum, text(a["equation"]), *(b.live(value) for value in inputs if value is not None))]
