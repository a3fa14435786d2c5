"""Rule of spelling that folds the arithmetic on shapes: values that follow from constants and known axes become constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_shapes

from fgvc.exporting.edits import domain_of, is_float, keep, unread

# Of whole numbers and shapes, exact on any machine.
FOLDABLE = {
    "Abs", "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater", "Less", "Max", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
MOVING = {"Concat", "Gather", "Slice", "Squeeze", "Unsqueeze"}  # place numbers elsewhere, and compute none
LARGEST_FOLDED = 1024  # numbers of a constant that is computed
OPEN = -(2**40)  # this and below: open axes, one number a name; no shape has them

Integers = NDArray[Any]  # whole numbers or truth values
Axes = list[int | str]  # a shape: lengths, and the names of open axes; "" for one without a name


def fold_shape_arithmetic(model: ModelProto) -> int:
    """Compute whole numbers and truth values that depend on constants and known shapes alone. A Reshape into a shape with one
    open axis, its input's only open one, gets -1 there."""
    graph = model.graph
    if not any(node.op_type in FOLDABLE for node in graph.node):
        return 0
    dead = unread(graph)
    shapes = _shapes(model)
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not is_float(t) and _is_small(t)}
    outputs = {port.name for port in graph.output}
    names: dict[str, int] = {}
    kept, reshapes = list[bool](), 0
    for node in graph.node:
        result = None
        if node.op_type in FOLDABLE and not domain_of(node.domain) and len(node.output) == 1 and node.output[0] not in outputs:
            result = _computed(node, values, shapes, names, model.opset_import)
        if result is not None:
            values[node.output[0]] = result
        kept.append(result is None or _is_open(result))
        if not kept[-1]:
            assert result is not None
            graph.initializer.append(numpy_helper.from_array(result, node.output[0]))
        elif (target := _free_target(node, values, shapes, names)) is not None:
            stored = f"{node.output[0]} target"
            graph.initializer.append(numpy_helper.from_array(target, stored))
            node.input[1] = stored
            reshapes += 1
    if count := keep(graph.node, kept) + reshapes:
        while left := unread(graph) - dead:  # what only the folded ones read
            keep(graph.node, [not left & set(node.output) for node in graph.node])
            keep(graph.initializer, [tensor.name not in left for tensor in graph.initializer])
    return count


def _computed(
    node: NodeProto,
    values: Mapping[str, Integers],
    shapes: Mapping[str, Axes],
    names: dict[str, int],
    opset: Sequence[onnx.OperatorSetIdProto],
) -> Integers | None:
    """Value of a node, in which open axes may stand; None where it is unknown, of floats, or large."""
    if node.op_type in ("Shape", "Size"):
        if (axes := shapes.get(node.input[0])) is None:
            return None
        ends = {attribute.name: attribute.i for attribute in node.attribute}
        whole = np.array([_number(axis, names) for axis in axes[slice(ends.get("start"), ends.get("end"))]], dtype=np.int64)
        if node.op_type == "Shape":
            return whole
        return None if _is_open(whole) else np.array(whole.prod(), dtype=np.int64)
    inputs = [name for name in node.input if name]
    if not inputs or any(name not in values for name in inputs):
        return None
    movable = inputs if node.op_type == "Concat" else inputs[:1] if node.op_type in MOVING else []
    if any(_is_open(values[name]) for name in inputs if name not in movable):
        return None
    if node.op_type in ("Div", "Mod") and any((values[name] < 0).any() for name in inputs):
        return None  # programs round them in two ways
    return _run(node, values, opset)


def _free_target(
    node: NodeProto, values: Mapping[str, Integers], shapes: Mapping[str, Axes], names: Mapping[str, int]
) -> Integers | None:
    """The shape that a Reshape makes, with -1 for its open axis; None for other nodes, and where -1 could be another length."""
    if node.op_type != "Reshape" or len(node.input) != 2:
        return None
    target, axes = values.get(node.input[1]), shapes.get(node.input[0])
    if target is None or axes is None or not _is_open(target) or np.count_nonzero(target <= 0) != 1:
        return None
    opened = [axis for axis in axes if isinstance(axis, str)]
    if len(opened) != 1 or not opened[0] or names.get(opened[0]) != int(target.min()):
        return None
    if math.prod(axis for axis in axes if not isinstance(axis, str)) != math.prod(target[target > 0].tolist()):
        return None
    return np.where(target > 0, target, -1)


def _shapes(model: ModelProto) -> dict[str, Axes]:
    """Shapes of values, as far as they follow from the inputs'."""
    try:
        graph = infer_shapes(model).graph
    except (InferenceError, RuntimeError, ValueError):
        graph = model.graph
    shapes: dict[str, Axes] = {t.name: list(t.dims) for t in graph.initializer}
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.HasField("shape"):
            dims = port.type.tensor_type.shape.dim
            shapes[port.name] = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]
    return shapes


def _number(axis: int | str, names: dict[str, int]) -> int:
    """A length, or the number in the place of an open axis."""
    if isinstance(axis, int):
        return axis
    return names.setdefault(axis, OPEN - len(names))


def _is_open(value: Integers) -> bool:
    return bool(value.dtype.kind == "i" and (value <= OPEN).any())


def _is_small(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) <= LARGEST_FOLDED and tensor.data_type != TensorProto.STRING


def _run(node: NodeProto, values: Mapping[str, Integers], opset: Sequence[onnx.OperatorSetIdProto]) -> Integers | None:
    tensors = [numpy_helper.from_array(values[name], name) for name in dict.fromkeys(node.input) if name]
    graph = helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=node.output[0])], tensors)
    try:
        (result,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opset))).run(None, {})
    except Exception:  # the evaluator has errors of all kinds for what it can't do: the node stays
        return None
    result = np.asarray(result)
    return result if result.dtype.kind in "iub" and result.size <= LARGEST_FOLDED else None
