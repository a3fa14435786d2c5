"""ONNX operators that move values and compute shapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.models.onnxnet.convert import Builder, Refused, run_node
from fgvc.models.onnxnet.registry import Attributes, Inputs, converts, first, number, numbers, text
from fgvc.models.onnxnet.values import Known, Live, Size, Stored, Value

EVERY = 2**31 - 1  # or more: the end of a slice that has no end


@converts("Shape")
def shape(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = first(inputs)
    span = slice(a.get("start", 0), a.get("end", None))
    if isinstance(x, Live):
        return [Known(tuple(np.array(meta.shape, np.int64)[span] for meta in x.metas))]
    shapes = [x.shape] * len(b.batches) if isinstance(x, Stored) else [array.shape for array in x.arrays]
    return [Known(tuple(np.array(shape, np.int64)[span] for shape in shapes))]


@converts("Size")
def size(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    return [Known(tuple(np.array(meta.numel(), np.int64) for meta in x.metas))]


@converts("Reshape")
def reshape(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, new_shape = first(inputs), inputs[1] if len(inputs) > 1 else Known((np.array(a["shape"], np.int64),) * len(b.batches))
    assert new_shape is not None
    if isinstance(x, Stored):
        target = _resolved(b.ints(new_shape, "shape"), x.shape, a)
        return [x.viewed("reshape", target)]
    x = b.live(x)
    if not isinstance(new_shape, Known):
        raise Refused("its shape is computed from the images")
    shapes = [
        _resolved(array.reshape(-1).tolist(), meta.shape, a)
        for array, meta in zip(new_shape.arrays, x.metas, strict=True)
    ]
    fits = all(math.prod(target) == meta.numel() for target, meta in zip(shapes, x.metas, strict=True))
    if b.fixed and new_shape.fixed and (not fits or -1 in new_shape.array):
        shapes = _for_batches(b, x, shapes[0])
    return [b.call(torch.reshape, x, tuple(b.size(each) for each in zip(*shapes, strict=True)))]


def _resolved(target: Sequence[int], shape: Sequence[int], a: Attributes) -> tuple[int, ...]:
    """ONNX's target with its 0 (as before) and -1 (the rest) filled in."""
    sizes = [shape[at] if size == 0 and not a.get("allowzero", 0) else int(size) for at, size in enumerate(target)]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(shape) // rest if rest else 0
    return tuple(sizes)


def _for_batches(b: Builder, x: Live, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A shape that holds for the file's own batch alone, for each of the batches: the axis in which the batch lies grows."""
    axis = x.batch_axis
    if axis is None:
        return [shape] * len(b.batches)
    before = math.prod(x.shape[:axis])
    at = next(
        (at for at in range(len(shape)) if math.prod(shape[:at]) == before and shape[at] % b.batches[0] == 0 and shape[at]),
        None,
    )
    if at is None:
        raise Refused(f"the file's batch is fixed, and where it goes in a shape of {list(shape)} can't be told")
    return [(*shape[:at], shape[at] // b.batches[0] * batch, *shape[at + 1 :]) for batch in b.batches]


@converts("Flatten")
def flatten(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, axis = b.live(first(inputs)), a.get("axis", 1)
    axis += x.rank * (axis < 0)
    if axis == 1:
        return [b.call(torch.flatten, x, 1)]
    shapes = [(math.prod(meta.shape[:axis]), math.prod(meta.shape[axis:])) for meta in x.metas]
    return [b.call(torch.reshape, x, tuple(b.size(each) for each in zip(*shapes, strict=True)))]


@converts("Transpose")
def transpose(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = first(inputs)
    rank = len(x.shape if isinstance(x, Stored | Live) else x.array.shape)
    order = tuple(a.get("perm", range(rank - 1, -1, -1)))
    if isinstance(x, Stored):
        return [x.transposed() if order == (1, 0) else x.viewed("permute", order)]
    return [b.call(torch.permute, b.live(x), order)]


@converts("Squeeze", "Unsqueeze")
def squeeze(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = first(inputs)
    axes = numbers(b, a, "axes", inputs, 1)
    before = list(x.shape) if isinstance(x, Stored | Live) else list(x.array.shape)
    if node.op_type == "Unsqueeze":
        assert axes is not None
        after = len(before) + len(axes)
        places = sorted(axis % after for axis in axes)
        if isinstance(x, Live):
            for place in places:
                x = b.call(torch.unsqueeze, x, place)
            return [x]
        for place in places:
            before.insert(place, 1)
    else:
        places = sorted((axis % len(before) for axis in axes), reverse=True) if axes is not None else [
            at for at in range(len(before) - 1, -1, -1) if before[at] == 1 and at > 0
        ]  # fmt: skip
        if isinstance(x, Live):
            for place in places:
                x = b.call(torch.squeeze, x, place)
            return [x]
        before = [length for at, length in enumerate(before) if at not in places]
    assert isinstance(x, Stored)
    return [x.viewed("reshape", tuple(before))]


@converts("Concat")
def concat(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    values = [b.live(value) for value in inputs if value is not None]
    batched = [value for value in values if value.batch_axis is not None]
    if batched and len(batched) < len(values):  # such as a class token, which the file holds once for a batch of one
        axis = a["axis"] % values[0].rank
        at = batched[0].batch_axis
        if at is not None and at != axis:
            values = [value if value in batched else _spread(b, value, at) for value in values]
    return [b.call(torch.cat, values, a["axis"])]


def _spread(b: Builder, value: Live, axis: int) -> Live:
    """A constant of the file's own batch for any batch."""
    if value.shape[axis] not in (1, b.batches[0]):
        raise Refused("a constant has another batch than the images")
    one = b.call(torch.narrow, value, axis, 0, 1) if value.shape[axis] > 1 else value
    return b.call(
        torch.Tensor.expand, one, tuple(Size(1) if at == axis else length for at, length in enumerate(value.shape))
    )


@converts("Split")
def split(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, axis = b.live(first(inputs)), a.get("axis", 0)
    sizes = numbers(b, a, "split", inputs, 1)
    if not sizes:
        each = math.ceil(x.shape[axis] / len(node.output))
        sizes = [min(each, x.shape[axis] - at * each) for at in range(len(node.output))]
    starts = np.cumsum([0, *sizes])
    return [b.call(torch.narrow, x, axis, int(start), length) for start, length in zip(starts, sizes, strict=False)]


@converts("Slice")
def slice_(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    starts, ends = numbers(b, a, "starts", inputs, 1), numbers(b, a, "ends", inputs, 2)
    assert starts is not None
    assert ends is not None
    axes = numbers(b, a, "axes", inputs, 3) or range(len(starts))
    steps = numbers(b, a, "steps", inputs, 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        length = x.shape[axis]
        grows = x.metas[0].shape[axis] != x.metas[1].shape[axis]  # it is the batch's
        if step < 0 and not grows:
            rows = list(range(length))[slice(start, end if end >= -length else None, step)]
            x = b.call(torch.index_select, x, axis % x.rank, b.live(Known((np.array(rows, np.int64),) * len(b.batches))))
            continue
        if start == 0 and end >= (length if b.fixed or not grows else EVERY) and step == 1:
            continue
        if grows:
            raise Refused("it takes some images of a batch")
        cut = (*(slice(None),) * (axis % x.rank), slice(start, end, step))
        x = b.call(operator.getitem, x, cut)
    return [x]


@converts("Gather")
def gather(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, axis, places = b.live(first(inputs)), a.get("axis", 0), inputs[1]
    index = b.constant(places, "index").astype(np.int64)
    axis %= x.rank
    index = np.where(index < 0, index + x.shape[axis], index)
    if index.ndim == 0:
        return [b.call(torch.select, x, axis, int(index))]
    y = b.call(torch.index_select, x, axis, b.live(Known((index.reshape(-1),) * len(b.batches))))
    if index.ndim == 1:
        return [y]
    shapes = [(*meta.shape[:axis], *index.shape, *meta.shape[axis + 1 :]) for meta in x.metas]
    return [b.call(torch.reshape, y, tuple(b.size(each) for each in zip(*shapes, strict=True)))]


@converts("Expand")
def expand(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    assert inputs[1] is not None
    sizes: list[int | Size] = b.sizes(inputs[1])
    if b.fixed and x.batch_axis is not None:
        place = x.batch_axis + len(sizes) - x.rank
        if place >= 0 and sizes[place] == b.batches[0]:
            sizes[place] = Size(1)
    sizes = [*[1] * (x.rank - len(sizes)), *sizes]
    target = tuple(-1 if size == 1 and at >= len(sizes) - x.rank else size for at, size in enumerate(sizes))
    return [b.call(torch.Tensor.expand, x, target)]


@converts("Tile")
def tile(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    assert inputs[1] is not None
    return [b.call(torch.Tensor.repeat, b.live(first(inputs)), tuple(b.sizes(inputs[1])))]


@converts("ConstantOfShape")
def constant_of_shape(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    value = onnx.numpy_helper.to_array(a["value"]).reshape(-1)[0] if "value" in a else np.float32(0)
    assert inputs[0] is not None
    return [b.call(torch.full, tuple(b.sizes(inputs[0])), value.item())]


@converts("Pad")
def pad(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x = b.live(first(inputs))
    amounts = numbers(b, a, "pads", inputs, 1)
    assert amounts is not None
    value = float(a.get("value", 0.0))
    if len(inputs) > 2 and inputs[2] is not None:
        value = number(b, inputs[2], None, 0.0)
    axes = numbers(b, a, "axes", inputs, 3) or range(x.rank)
    half = len(amounts) // 2
    sides = {axis % x.rank: (amounts[at], amounts[at + half]) for at, axis in enumerate(axes)}
    if sides.get(0, (0, 0)) != (0, 0):
        raise Refused("it pads the batch")
    if not any(map(any, sides.values())):
        return [x]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        text(a.get("mode", "constant"))
    ]
    outermost = min(axis for axis, pair in sides.items() if any(pair))
    if mode != "constant" and x.rank > 2:  # torch pads all places of a map in these modes, or its channels, too
        outermost = min(outermost, 2)
    flat = [side for axis in range(x.rank - 1, outermost - 1, -1) for side in sides.get(axis, (0, 0))]
    if mode != "constant":
        return [b.call(F.pad, x, flat, mode)]
    return [b.call(F.pad, x, flat, mode, value)]


@converts("Resize", "Upsample")
def resize(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    """Convert Resize: a product with a matrix along each axis, which is found by onnx's reference implementation from unit
    vectors."""
    x = b.live(first(inputs))
    shape = tuple(x.shape)
    for axis in range(1, x.rank):
        matrix = _resizing(b, node, a, inputs, shape, axis)
        if matrix is not None:
            x = b.call(along, x, b.live(Known((matrix,) * len(b.batches)), name="resize"), axis)
    return [x]


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Multiply one axis of x by `matrix` (new, old)."""
    return torch.movedim(torch.movedim(x, axis, -1) @ matrix.to(x.dtype).T, -1, axis)


def _resizing(
    b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs, shape: Sequence[int], axis: int
) -> np.ndarray | None:
    """Matrix (new, old) float32 of the resizing along an axis of a map of this shape; None: that axis stays."""
    length, rank = shape[axis], len(shape)
    old = node.op_type == "Upsample" or b.opsets.get("", 13) < 11  # inputs: x, scales (an attribute before opset 9)
    stated = inputs[1 if old else 2] if len(inputs) > (1 if old else 2) else None
    scales = np.array(a["scales"]) if "scales" in a else None if stated is None else b.constant(stated, "scale")
    sizes = b.sizes(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else None
    axes = [each % rank for each in a.get("axes", range(rank))]
    if text(a.get("coordinate_transformation_mode", "")) == "tf_crop_and_resize":
        raise Refused("tf_crop_and_resize is not known here")
    if axis not in axes:
        return None
    at = axes.index(axis)
    if scales is not None and scales.size:
        scale = float(scales[at])
        new = math.floor(np.float32(length) * np.float32(scale))  # in single precision: 5 x 1.4 is 7, not 6.9999999
    elif sizes is not None and isinstance(sizes[at], int):
        new = int(sizes[at])  # type: ignore[arg-type]
        scale = new / length
        policy = text(a.get("keep_aspect_ratio_policy", "stretch"))
        if policy != "stretch":
            each = [size / shape[place] for size, place in zip(sizes, axes, strict=True) if isinstance(size, int)]
            scale = min(each) if policy == "not_larger" else max(each)
            new = round(scale * length)
            if abs(scale * length - new) > 1e-6:
                raise Refused(f"by {policy} it has a side of {scale * length:.2f}, which is rounded")
    else:
        raise Refused("its size is computed from the images")
    if new == length and scale == 1:
        return None
    kept = {
        key: value
        for key, value in a.items()
        if key
        in ("coordinate_transformation_mode", "cubic_coeff_a", "exclude_outside", "nearest_mode", "antialias", "mode")
    }
    if old:
        nearest = "ceil" if node.op_type == "Resize" and scale < 1 else "floor"  # as onnxruntime has it for opset 10
        kept = {"mode": a.get("mode", "nearest"), "coordinate_transformation_mode": "asymmetric", "nearest_mode": nearest}
    kept = {key: text(value) if isinstance(value, bytes) else value for key, value in kept.items()}
    by_scale = scales is not None and scales.size > 0 and math.floor(length * scale) == new
    single = onnx.helper.make_node(
        "Resize", ["x", "", "scales"] if by_scale else ["x", "", "", "sizes"], ["y"], **kept
    )
    feed = {
        "x": np.eye(length, dtype=np.float32),
        "sizes": np.array([length, new]),
        "scales": np.array([1.0, scale], np.float32),
    }
    (rows,) = run_node(single, {name: feed[name] for name in single.input if name}, {"": 19})
    return np.ascontiguousarray(np.asarray(rows).T.astype(np.float32))


@converts("DepthToSpace", "SpaceToDepth")
def depth_to_space(b: Builder, node: onnx.NodeProto, a: Attributes, inputs: Inputs) -> list[Value]:
    x, block = b.live(first(inputs)), a["blocksize"]
    if node.op_type == "SpaceToDepth":
        return [b.call(space_to_depth, x, block)]
    if text(a.get("mode", "DCR")) == "CRD":
        return [b.call(F.pixel_shuffle, x, block)]
    return [b.call(depth_first, x, block)]


def space_to_depth(x: Tensor, block: int) -> Tensor:
    """Move blocks of cells into channels: (N,C,H,W) to (N, C block^2, H/block, W/block)."""
    n, c, h, w = x.shape
    cells = x.reshape(n, c, h // block, block, w // block, block)
    return cells.permute(0, 3, 5, 1, 2, 4).reshape(n, c * block * block, h // block, w // block)


def depth_first(x: Tensor, block: int) -> Tensor:
    """Move channels into blocks of cells, the block's axes before the channels (DepthToSpace, mode DCR): (N,C,H,W) to (N,
    C/block^2, H block, W block)."""
    n, c, h, w = x.shape
    cells = x.reshape(n, block, block, c // block**2, h, w)
    return cells.permute(0, 3, 4, 1, 5, 2).reshape(n, c // block**2, h * block, w * block)
