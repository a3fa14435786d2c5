"""Operators of ONNX, one at a time in a small classifier: the net's answers are onnxruntime's, or the error names the node.

A case is text of onnx's parser that computes `m` from a map `a` (n,6,5,4), behind a convolution of the image and before a
linear layer. Written for short: `{1,2}` is a tensor of int64, `{1.5}` one of floats, `$6x1x1` one of random floats.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fgvc.errors import FgvcError
from fgvc.models.onnxnet.net import open_onnx

HEIGHT, WIDTH, CLASSES = 9, 8, 4
MICROSOFT = "com.microsoft"


def literals(text: str) -> tuple[str, list[onnx.TensorProto]]:
    """The text with its literal tensors named, and these."""
    rng, tensors = np.random.default_rng(7), list[onnx.TensorProto]()

    def name(match: re.Match[str]) -> str:
        word = match.group()
        if word.startswith("$"):
            value = rng.normal(0.3, 0.5, [int(side) for side in word[1:].split("x")]).astype(np.float32)
        else:
            numbers = [number for number in word[1:-1].split(",") if number]
            value = np.array(numbers, np.float32 if "." in word else np.int64)
        tensors.append(numpy_helper.from_array(value, f"t{len(tensors)}"))
        return tensors[-1].name

    return re.sub(r"(?<!\] )\{[^}]*\}|\$[\dx]+", name, text), tensors


def classifier(text: str, opset: int, shape: tuple[int, ...] | None = None) -> onnx.ModelProto:
    """A classifier around the nodes of a case, the last of which gives `m`. `shape`: of `m`; None: onnxruntime says it."""
    rng = np.random.default_rng(1)
    body, tensors = literals(text)
    tensors += [
        numpy_helper.from_array(rng.normal(0, 0.4, (6, 3, 3, 3)).astype(np.float32), "stem.weight"),
        numpy_helper.from_array(rng.normal(0, 0.4, 6).astype(np.float32), "stem.bias"),
    ]
    parsed = onnx.parser.parse_graph(f"g (float[n] a) => (float[n] m) {{ {body} }}").node
    nodes = [
        helper.make_node("Conv", ["image", "stem.weight", "stem.bias"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        *parsed,
    ]
    for node in parsed:
        node.name = f"the/{node.output[0]}"
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, HEIGHT, WIDTH))

    def model(output: str, sides: tuple[int | str, ...] | None) -> onnx.ModelProto:
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, sides)]
        return helper.make_model(helper.make_graph(nodes, "g", [image], outputs, tensors), opset_imports=imports, ir_version=8)

    shape = by_onnxruntime(model("m", None), images(1))[0].shape if shape is None else shape
    wide, last = int(np.prod(shape)), "m"
    if len(shape) != 2:
        nodes.append(helper.make_node("Flatten", ["m"], [last := "flat"]))
    nodes.append(helper.make_node("Gemm", [last, "head.weight", "head.bias"], ["scores"], transB=1))
    tensors += [
        numpy_helper.from_array(rng.normal(0, wide**-0.5, (CLASSES, wide)).astype(np.float32), "head.weight"),
        numpy_helper.from_array(rng.normal(0, 0.4, CLASSES).astype(np.float32), "head.bias"),
    ]
    return model("scores", ("n", CLASSES))


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def by_onnxruntime(model: onnx.ModelProto, x: torch.Tensor) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x.numpy()})


def check(model: onnx.ModelProto, folder: Path) -> None:
    """In single and in double precision the net gives what onnxruntime does, and gradients are finite."""
    file = folder / "net.onnx"
    file.write_bytes(model.SerializeToString())
    net, x = open_onnx(file), images(3)
    (expected,) = by_onnxruntime(model, x)
    assert np.isfinite(expected).all()
    tolerance = 1e-5 * np.abs(expected).max()
    scores = net(x)
    np.testing.assert_allclose(scores.detach().numpy(), expected, rtol=0, atol=tolerance)
    scores.square().sum().backward()
    gradients = {name: value.grad for name, value in net.named_parameters() if value.requires_grad}
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            np.testing.assert_allclose(net.double()(x.double()).numpy(), expected, rtol=0, atol=tolerance)
    finally:
        torch.set_default_dtype(torch.float32)


TAKEN: list[tuple[int, str]] = [  # opset, nodes
    # windows
    *((17, f'm = Conv<auto_pad="{pad}", strides=[2,2], dilations=[{d},{d}]>(a, $4x6x2x2)')
      for pad in ("SAME_UPPER", "SAME_LOWER", "VALID") for d in (1, 2) if pad == "VALID" or d == 1),
    (17, "m = Conv<group=3, pads=[0,1,2,0], strides=[1,2]>(a, $9x2x2x3, $9)"),
    (17, "m = Conv<pads=[1,1,1,1]>(a, $4x6x3x3, {0.,0.,0.,0.})"),
    (17, "s = Reshape(a, {0,6,20})  m = Conv<pads=[2,1]>(s, $4x6x3)"),
    (17, "s = Reshape(a, {0,2,3,5,4})  m = Conv<pads=[1,1,1,1,1,1]>(s, $4x2x3x3x3, $4)"),
    (17, "w = Mul($4x6x3x3, $4x1x1x1)  m = Conv<pads=[1,1,1,1]>(a, w, $4)"),
    (17, "m = ConvTranspose<strides=[2,2], pads=[1,0,1,0], output_padding=[1,0], group=2>(a, $6x2x3x2, $4)"),
    (17, "m = ConvTranspose<dilations=[2,1]>(a, $6x2x2x2)"),
    (17, 'm = ConvTranspose<auto_pad="VALID">(a, $6x2x2x2)'),
    (17, "s = Reshape(a, {0,6,20})  m = ConvTranspose<strides=[2]>(s, $6x2x3)"),
    *((17, f'm = com.microsoft.FusedConv<pads=[1,1,1,1], activation="{kind}"{numbers}>(a, $6x6x3x3, $6{z})')
      for kind, numbers, z in (("Clip", ", activation_params=[-0.2,0.7]", ""), ("LeakyRelu", ", activation_params=[0.3]", ""),
                               ("HardSigmoid", ", activation_params=[0.3,0.4]", ""), ("Tanh", "", ""), ("Relu", "", ", a"))),
    *((op, f"p = {kind}<kernel_shape=[3,2], strides=[2,2], pads=[{pads}], ceil_mode={ceil}{more}>(a)  m = ReduceSum(p, {{3}})")
      for op, kind, more in ((17, "MaxPool", ""), (19, "AveragePool", ""), (19, "AveragePool", ", count_include_pad=1"))
      for pads in ("0,0,0,0", "1,1,1,1", "0,0,1,1", "2,0,1,1") for ceil in (0, 1)),
    *((17, f'm = {kind}<kernel_shape=[3,2], strides=[2,3], auto_pad="{pad}">(a)')
      for kind in ("MaxPool", "AveragePool") for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    (17, "m = MaxPool<kernel_shape=[3,3], dilations=[1,1], pads=[2,2,2,2]>(a)"),
    (17, "m = MaxPool<kernel_shape=[2,2], dilations=[2,1], strides=[1,2]>(a)"),
    (17, "m, unread = MaxPool<kernel_shape=[2,2]>(a)"),
    (17, "m = AveragePool<kernel_shape=[3,3], pads=[2,2,2,2]>(a)"),
    (17, "s = Reshape(a, {0,6,20})  m = AveragePool<kernel_shape=[3], strides=[2]>(s)"),
    (17, "s = Reshape(a, {0,6,20})  m = MaxPool<kernel_shape=[3], strides=[2], ceil_mode=1>(s)"),
    (17, "m = GlobalMaxPool(a)"),
    # reductions
    *((op, f"m = Reduce{kind}<axes=[{axes}], keepdims={keep}>(a)") for op in (11,) for axes in ("-1,2", "1")
      for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp") for keep in (0, 1)),
    *((18, f"m = Reduce{kind}<keepdims={keep}>(a, {{-1,1}})")
      for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare", "LogSumExp") for keep in (0, 1)),
    (13, "m = ReduceSum<noop_with_empty_axes=1>(a)"),
    # arithmetic
    *((20, f"m = {kind}(a)") for kind in (
        "Sigmoid", "Tanh", "Exp", "Neg", "Abs", "Floor", "Ceil", "Round", "Sign", "Erf", "Softplus", "Softsign", "Mish",
        "HardSwish", "Sin", "Cos", "Gelu", "Elu<alpha=0.7>", "Celu<alpha=0.7>", "Selu", "Selu<alpha=1.2, gamma=0.8>",
        "ThresholdedRelu<alpha=0.3>", "LeakyRelu", "LeakyRelu<alpha=0.3>", "HardSigmoid", "HardSigmoid<alpha=0.4, beta=0.3>",
        'Gelu<approximate="tanh">', "com.microsoft.Gelu", "com.microsoft.QuickGelu<alpha=1.3>", "com.microsoft.FastGelu",
        "Identity", "Dropout", "Softmax<axis=1>", "LogSoftmax<axis=-2>", "Softmax",
        "LpNormalization<axis=1, p=1>", "LpNormalization",
        "LRN<size=3, alpha=0.2, beta=0.6, bias=1.5>", "LRN<size=5>")),
    (17, "s = Abs(a)  t = Add(s, {0.5})  u = Log(t)  v = Sqrt(t)  w = Reciprocal(t)  m = Sum(u, v, w)"),
    (17, "r = Relu(a)  b = Relu(r)  c = Sub(b, {0.6})  s = Relu(c)  m = LpNormalization<axis=1>(s)"),
    *((11, f"m = {kind}<axis={axis}>(a)") for kind in ("Softmax", "LogSoftmax") for axis in (1, 2, -1, -2)),
    *((17, f"m = {kind}({names})")
      for kind in ("Sum", "Mean", "Min", "Max") for names in ("a, $6x1x1, $1x6x5x1", "a, {0.2}", "a")),
    (17, "m = com.microsoft.BiasGelu(a, $4)"), (17, "m = com.microsoft.FastGelu(a, $4)"),
    (17, "m = PRelu(a, $6x1x1)"), (17, "m = PRelu(a, {0.3})"), (17, "m = PRelu(a, $4)"),
    (9, "m = Clip<min=-0.3>(a)"), (9, "m = Clip<max=0.3>(a)"), (9, "m = Clip<min=-0.3, max=0.3>(a)"), (9, "m = Clip(a)"),
    (13, "m = Clip(a, , {0.4})"), (13, "m = Clip(a, {-0.4})"), (13, "m = Clip(a, {0.})"), (13, "m = Clip(a, {0.}, {6.})"),
    (13, "m = Clip(a)"),
    (17, "s = Abs(a)  m = Pow(s, {1.5})"), (17, "m = Pow({2.0}, a)"),
    (17, "s = Abs(a)  t = Add({0.5}, s)  m = Div({1.0}, t)"), (17, "m = Sub({1.0}, a)"),
    *((17, f"c = {kind}(a, {{0.1}})  m = Where(c, a, $4)") for kind in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    *((17, f"c = {kind}({{0.1}}, a)  m = Where(c, a, {{0.5}})") for kind in ("Less", "Greater", "LessOrEqual", "GreaterOrEqual")),
    *((17, f"c = Less(a, $4)  d = Greater(a, {{0.2}})  e = {kind}(c, d)  f = Not(e)  g = Cast<to=1>(f)  m = Mul(g, a)")
      for kind in ("And", "Or", "Xor")),
    (17, "c = Less(a, $4)  d = Greater(a, {0.2})  e = Cast<to=7>(c)  f = Cast<to=7>(d)"
         "  g = Add(e, f)  h = Cast<to=1>(g)  m = Mul(h, a)"),
    (17, "f = Floor(a)  c = Equal(f, {0.})  m = Where(c, {2.5}, a)"),
    (17, "f = Floor(a)  c = Equal({0.}, f)  m = Where(c, $4, a)"),
    (17, "s = Mul(a, {9.0})  i = Cast<to=7>(s)  j = Div(i, {2})  f = Cast<to=1>(j)  m = Mul(f, a)"),
    (17, "f = Floor(a)  c = Cast<to=9>(f)  m = Where(c, a, $4)"), (17, "h = Cast<to=11>(a)  m = Cast<to=1>(h)"),
    (17, "c = IsNaN(a)  d = Cast<to=1>(c)  m = Sub(a, d)"), (17, "s = CastLike(a, $1x1)  m = Neg(s)"),
    # shapes
    (14, "m = Reshape<allowzero=1>(a, {-1,20,6})"), (14, "m = Reshape(a, {0,-1,4})"), (17, "m = Flatten<axis=-3>(a)"),
    (17, "s = Transpose<perm=[0,2,3,1]>(a)  m = Relu(s)"), (17, "s = Transpose(a)  m = Transpose<perm=[3,1,0,2]>(s)"),
    (17, "s = Flatten<axis=2>(a)  t = Reshape(s, {-1,6,20})  m = Relu(t)"),
    (17, "s = Flatten<axis=-1>(a)  m = Reshape(s, {-1,120})"),
    (17, "s = Flatten<axis=0>(a)  m = Reshape(s, {-1,6,5,4})"),
    (11, "p = GlobalAveragePool(a)  m = Squeeze<axes=[2,-1]>(p)"), (13, "p = GlobalAveragePool(a)  m = Squeeze(p, {2,3})"),
    (13, "p = GlobalAveragePool(a)  s = Squeeze(p, {-1})  m = Relu(s)"),
    (11, "s = Unsqueeze<axes=[1,-1]>(a)  m = Squeeze<axes=[1,5]>(s)"), (13, "s = Unsqueeze(a, {-1,1})  m = Squeeze(s, {1,-1})"),
    (13, "w = Unsqueeze($6x4x1, {-1})  v = Squeeze(w, {2,3})  u = Unsqueeze(v, {0})  x = Unsqueeze(u, {2})  m = Add(a, x)"),
    (13, "w = Reshape($24, {1,6,1,4})  m = Mul(a, w)"),
    (13, "w = Transpose<perm=[2,0,1]>($1x4x6)  x = Squeeze(w)  y = Unsqueeze(x, {1})  m = Add(a, y)"),
    (13, "m = Concat<axis=-1>(a, a)"), (13, "m = Concat<axis=1>(a, a, a)"),
    (11, "x, y = Split<axis=1, split=[2,4]>(a)  m = Concat<axis=1>(y, x)"), (11, "x, y, z = Split<axis=-3>(a)  m = Sub(z, x)"),
    (13, "x, y = Split<axis=-2>(a, {1,4})  m = Mul(x, y)"), (13, "x, y = Split<axis=-1>(a)  m = Mul(x, y)"),
    (18, "x, y, z = Split<axis=2, num_outputs=3>(a)  m = Concat<axis=2>(z, x, y)"),
    (9, "m = Slice<starts=[1,-3], ends=[100,-1], axes=[1,3]>(a)"),
    (9, "m = Slice<starts=[0,1], ends=[9223372036854775807,4]>(a)"),
    (13, "m = Slice(a, {1,0}, {9,-1}, {-2,-1}, {2,2})"), (13, "m = Slice(a, {-1}, {-99}, {2}, {-2})"),
    (13, "m = Slice(a, {3}, {0}, {-1}, {-1})"), (13, "m = Slice(a, {0,2,0}, {2147483647,5,99}, {0,1,2})"),
    (13, "m = Slice(a, {4,-2}, {-9223372036854775807,0}, {2,1}, {-1,-2})"),
    (13, "m = Slice(a, {3}, {-2}, {-1}, {-1})"), (13, "m = Slice(a, {-99}, {3}, {-1})"),
    (17, "m = Gather<axis=2>(a, {-1,0,2})"), (17, "i = Reshape({0,-1,3,1}, {2,2})  m = Gather<axis=-1>(a, i)"),
    (17, "i = Squeeze({-2})  m = Gather<axis=1>(a, i)"),
    (13, "p = ReduceMean<axes=[3]>(a)  m = Expand(p, {1,1,1,3})"), (13, "p = ReduceMean<axes=[3]>(a)  m = Expand(p, {2})"),
    (13, "s = Unsqueeze(a, {1})  m = Expand(s, {2,1,1,1})"),
    (13, "s = Shape(a)  p = ReduceMean<axes=[1,2]>(a)  m = Expand(p, s)"), (13, "m = Tile(a, {1,2,1,3})"),
    (15, "s = Shape<start=-2>(a)  t = Concat<axis=0>({0,-1,1}, s)  m = Reshape(a, t)"),
    (15, "s = Shape<end=1>(a)  t = Concat<axis=0>(s, {6,5,4})  z = ConstantOfShape<value=float[1] {0.7}>(t)  m = Add(a, z)"),
    (15, "s = Shape(a)  z = ConstantOfShape(s)  m = Sub(z, a)"),
    (15, "s = Size(a)  t = Shape<end=1>(a)  u = Div(s, t)  v = Concat<axis=0>(t, u)  m = Reshape(a, v)"),
    (15, "s = Shape($6x4)  m = Reshape(a, {-1,6,5,4})"),
    (9, 'm = Pad<mode="constant", pads=[0,0,1,0,0,0,0,2], value=0.7>(a)'), (13, "m = Pad(a, {0,1,1,0,0,0,-1,2})"),
    (13, "m = Pad(a, {0,0,1,0,0,2,0,2}, {0.6})"), (13, "m = Pad(a, {0,0,0,0,0,0,0,0})"), (18, "m = Pad(a, {1,2}, {0.6}, {-1})"),
    (18, "m = Pad(a, {1,0,2,0}, , {2,1})"),
    *((19, f'm = Pad<mode="{mode}">(a, {{0,{amounts}}})') for mode in ("reflect", "edge", "wrap")
      for amounts in ("0,1,2,0,0,0,1", "0,0,2,0,0,0,1", "0,2,0,0,0,1,0", "2,0,0,0,1,0,0", "1,1,1,0,0,2,2")),
    *((13, f's = Slice(a, {{0,0}}, {{4,4}}, {{1,2}})  m = {kind}(s)') for kind in (
        'DepthToSpace<blocksize=2, mode="DCR">', 'DepthToSpace<blocksize=2, mode="CRD">', "DepthToSpace<blocksize=2>",
        "SpaceToDepth<blocksize=2>")),
    # sizes
    (9, 'm = Upsample<mode="nearest">(a, {1.,1.,2.,3.})'), (9, 'm = Upsample<mode="linear">(a, {1.,1.,2.,2.})'),
    (10, 'm = Resize<mode="nearest">(a, {1.,1.,2.,1.5})'), (10, 'm = Resize<mode="nearest">(a, {1.,1.,0.6,0.75})'),
    (10, 'm = Resize<mode="linear">(a, {1.,1.,1.6,0.75})'),
    *((15, f's = Shape<end=2>(a)  t = Concat<axis=0>(s, {{7,{wide}}})  '
           f'm = Resize<mode="{mode}", coordinate_transformation_mode="{where}">(a, , , t)')
      for mode, wide in (("nearest", 3), ("linear", 3), ("cubic", 6))
      for where in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")),
    *((13, f'm = Resize<mode="nearest", nearest_mode="{how}">(a, , {{1.,1.,1.7,0.55}})')
      for how in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    (13, 'm = Resize<mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1>(a, , {1.,1.,1.6,1.5})'),
    (13, 'p = Resize<mode="linear">(a, , {1.,1.,1.4,1.5})  m = ReduceSum(p, {2})'),
    (18, 'm = Resize<mode="linear", antialias=1, axes=[2,3]>(a, , {0.6,0.75})'),
    (18, 'm = Resize<mode="linear", axes=[3,2]>(a, , , {7,3})'), (18, 'm = Resize<mode="linear", axes=[-1]>(a, , , {7})'),
    (18, 'm = Resize<mode="linear", axes=[2,3], keep_aspect_ratio_policy="not_larger">(a, , , {10,9})'),
    (18, 'm = Resize<mode="nearest", axes=[2,3], keep_aspect_ratio_policy="not_smaller">(a, , , {10,6})'),
    (19, 'm = Resize<mode="linear", coordinate_transformation_mode="half_pixel_symmetric">(a, , {1.,1.,1.3,0.8})'),
    # norms
    (13, "v = Abs($6)  m = BatchNormalization<epsilon=0.01>(a, $6, $6, $6, v)"),
    (13, "s = Reshape(a, {0,6,20})  m = BatchNormalization(s, $6, $6, $6, {1.,2.,1.,3.,0.5,0.7})"),
    (13, "s = Reshape(a, {-1,120})  t = MatMul(s, $120x3)  m = BatchNormalization(t, $3, $3, $3, {1.,2.,1.5})"),
    (17, "m = InstanceNormalization<epsilon=0.01>(a, $6, $6)"),
    (18, "m = GroupNormalization<num_groups=3>(a, $3, $3)"),
    (21, "m = GroupNormalization<num_groups=3, epsilon=0.01>(a, $6, $6)"),
    (17, "m = LayerNormalization(a, $4, $4)"), (17, "m = LayerNormalization<axis=-2, epsilon=0.01>(a, $5x4)"),
    (17, "m = LayerNormalization<axis=1>(a, $6x5x4, $6x5x4)"), (17, "m = LayerNormalization<axis=2>(a, $4, $4)"),
    *((17, f"s = Reshape(a, {{0,6,20}})  t = Neg(s)  {given}") for given in (
        "u = Exp(t)  m = com.microsoft.SkipLayerNormalization(s, u, $20)",
        "u = Exp(s)  m = com.microsoft.SkipLayerNormalization<epsilon=0.01>(s, u, $20, $20)",
        "u = Exp(s)  x, , , y = com.microsoft.SkipLayerNormalization(s, u, $20, $20, $20)  m = Mul(x, y)",
        "u = Exp(s)  m, unread = com.microsoft.SkipLayerNormalization(s, u, $20, $20)")),
    # linear layers
    *((13, f"s = Reshape(a, {{-1,120}})  m = {kind}") for kind in (
        "Gemm(s, $120x3, $3)", "Gemm<transB=1>(s, $3x120)", "Gemm<alpha=0.5, beta=1.5>(s, $120x3, $3)",
        "Gemm<alpha=0.5, transB=1>(s, $3x120, $1x3)", "Gemm(s, $120x3, {0.3})", "Gemm<transB=1>(s, $3x120, $1x3)",
        'com.microsoft.FusedGemm<activation="Tanh">(s, $120x3, $3)',
        'com.microsoft.FusedGemm<activation="LeakyRelu", activation_alpha=0.3>(s, $120x3, $3)',
        'com.microsoft.FusedGemm<activation="Selu", activation_alpha=1.2, activation_gamma=0.8>(s, $120x3, $3)',
        'com.microsoft.FusedGemm<activation="Elu", activation_alpha=0.6>(s, $120x3, $3)',
        'com.microsoft.FusedGemm<activation="ThresholdedRelu", activation_alpha=0.6>(s, $120x3, $3)',
        'com.microsoft.FusedGemm<activation="HardSigmoid", activation_alpha=0.3, activation_beta=0.4>(s, $120x3, $3)',
        "com.microsoft.FusedMatMul<alpha=0.5>(s, $120x3)", "com.microsoft.FusedMatMul<transB=1>(s, $3x120)",
        "MatMul(s, $120x3)")),
    (13, "s = Reshape(a, {-1,120})  t = Transpose<perm=[1,0]>(s)  m = Gemm<transA=1>(t, $120x3, $3)"),
    (13, "t = MatMul(a, $4x3)  m = Add($3, t)"), (13, "t = MatMul(a, $4x3)  m = Add(t, $5x3)"), (13, "m = MatMul($7x5, a)"),
    (13, "t = Transpose<perm=[0,1,3,2]>(a)  m = MatMul(a, t)"), (13, "m = com.microsoft.FusedMatMul<transA=1, alpha=0.3>(a, a)"),
    (13, "m = com.microsoft.FusedMatMul<transB=1>(a, a)"), (13, "m = com.microsoft.TransposeMatMul<transA=1>(a, a)"),
    (13, 'm = Einsum<equation="bchw,cd->bdhw">(a, $6x3)'), (13, 'm = Einsum<equation="...hw, ...kw -> ...hk">(a, a)'),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "text"), TAKEN, ids=[f"{opset}-{text}" for opset, text in TAKEN])
def test_answers_are_onnxruntimes(opset: int, text: str, tmp_path: Path) -> None:
    check(classifier(text, opset), tmp_path)


REFUSED: list[tuple[int, str, str]] = [  # opset, nodes, what the error says beside the node's name
    (17, "m = ConvTranspose<pads=[1,0,0,0]>(a, $6x2x2x2)", "ConvTranspose.*same on both sides"),
    (17, 'm = ConvTranspose<auto_pad="SAME_UPPER">(a, $6x2x2x2)', "ConvTranspose.*size of its output"),
    (17, "m = ConvTranspose<output_shape=[8,7], strides=[2,2]>(a, $6x2x2x2)", "ConvTranspose.*size of its output"),
    (17, "p, q = MaxPool<kernel_shape=[2,2]>(a)  f = Cast<to=1>(q)  m = Add(p, f)", "MaxPool.*maxima"),
    (17, "m = LpPool<kernel_shape=[2,2]>(a)", "LpPool"),
    (19, "m = AveragePool<kernel_shape=[2,2], dilations=[2,1]>(a)", "AveragePool.*dilated"),
    (17, "m = ReduceProd<axes=[1]>(a)", "ReduceProd.*not known"),
    (17, "m = GlobalLpPool(a)", "GlobalLpPool.*not known"),
    (17, "i = Cast<to=7>(a)  m = GatherElements<axis=1>(a, i)", "GatherElements.*not known"),
    (13, "m = Slice(a, {0}, {1}, {0})", "Slice.*some images"),
    (13, "m = Slice(a, {-1}, {-99}, {0}, {-1})", "Slice.*some images"),
    (13, "m = Pad(a, {0,0,0,0,1,0,0,0})", "Pad.*batch"),
    (13, "s = ReduceMax<keepdims=0>(a)  t = Cast<to=7>(s)  u = Abs(t)  v = Clip(u, {1}, {1})  w = Reshape(v, {1})"
         "  x = Concat<axis=0>({-1}, {6,20}, w)  m = Reshape(a, x)", "Reshape.*computed from the images"),
    (13, "s = ReduceMax<keepdims=0>(a)  m = Clip(a, , s)", "Clip.*computed from the images"),
    (13, 'm = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">'
         "(a, {0.,0.,0.1,0.1,1.,1.,0.9,0.9}, {1.,1.,2.,2.})", "Resize.*tf_crop_and_resize"),
    (18, 'm = Resize<mode="linear", axes=[2,3], keep_aspect_ratio_policy="not_larger">(a, , , {10,7})', "Resize.*not_larger"),
    (17, "s = Reshape(a, {0,6,20})  t = Exp(s)  x, y = com.microsoft.SkipLayerNormalization(s, t, $20, $20)  m = Add(x, y)",
     "SkipLayerNormalization.*mean and deviation"),
    (13, "m = com.microsoft.FusedMatMul<transBatchA=1>(a, a)", "FusedMatMul.*batch"),
    (17, 'm = com.microsoft.FusedConv<pads=[1,1,1,1], activation="Other">(a, $6x6x3x3, $6)', "FusedConv.*'Other'"),
    (17, 'm = com.microsoft.FusedConv<pads=[1,1,1,1], activation="Clip">(a, $6x6x3x3, $6)', "FusedConv.*0 numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "text", "message"), REFUSED, ids=[f"{opset}-{text}" for opset, text, _ in REFUSED])
def test_what_is_not_known_is_refused_by_the_nodes_name(opset: int, text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(classifier(text, opset, (1, 120)).SerializeToString())
    with pytest.raises(FgvcError, match=rf"net\.onnx: node 'the/\w+' \([\w.]*{message}"):
        open_onnx(file)
