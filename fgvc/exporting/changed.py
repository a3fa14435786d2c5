"""A deployed file with another number of classes: its last layer's tensors and its output are of another shape, nothing else.

The file is written as one message, with all of its weights inside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from fgvc.errors import FgvcError
from fgvc.exporting.into import VALUES, Written
from fgvc.io.files import write_atomic
from fgvc.models.onnxnet.payload import FLOATS, encoded, read_tensor, stored_tensors

RESHAPE = "Reshape"


def write_changed(
    source: Path, tensors: Mapping[str, NDArray[np.float64]], last: Collection[str], out: Path, *, output: str, classes: int
) -> Written:
    """Write `out`, `source` with these values in the named tensors, of which those of the `last` layer may be of another shape,
    and `output` of so many classes. Raises FgvcError where a value does not fit its type."""
    model = onnx.load(str(source))  # external data are read, too
    stored, old = stored_tensors(model), _classes(model, output)
    moved = []
    for name, values in tensors.items():
        before = read_tensor(stored[name], source.parent)
        if name in last or not np.array_equal(before.astype(np.float32), values.astype(np.float32), equal_nan=True):
            moved.append(name)
            _put(stored[name], values)
    for proto in model.graph.output:
        if proto.name == output:
            side = proto.type.tensor_type.shape.dim[-1]
            side.Clear()
            side.dim_value = classes
    _resize_reshapes(model, last, old, classes)
    del model.graph.value_info[:]  # shapes of inner values, some of which are others now
    write_atomic(out, model.SerializeToString())
    kept = tuple(name for name in tensors if name not in set(moved))
    return Written(out, tuple(moved), kept, True)


def shape_free_sha256(path: Path, moved: Collection[str], last: Collection[str], output: str) -> str:
    """SHA-256 of a file's message without the payloads of the tensors that moved, the shapes of the last layer's, that of the
    output, and those that it notes of inner values: equal for a file and what `write_changed` makes of it."""
    model = onnx.load(str(path))
    for name, tensor in stored_tensors(model).items():
        if name in moved and tensor.data_type in FLOATS:
            for field in VALUES:
                tensor.ClearField(field)
        if name in last:
            del tensor.dims[:]
    old = _classes(model, output)
    for proto in model.graph.output:
        if proto.name == output:
            proto.type.tensor_type.shape.dim[-1].Clear()
    _resize_reshapes(model, last, old, -1)
    del model.graph.value_info[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _put(tensor: TensorProto, values: NDArray[np.float64]) -> None:
    del tensor.dims[:]
    tensor.dims.extend(values.shape)
    data = encoded(tensor, values)
    for field in VALUES:
        tensor.ClearField(field)
    tensor.raw_data = data


def _classes(model: onnx.ModelProto, output: str) -> int:
    """Number of classes that the declared output has; -1 where the file leaves it open."""
    dims = [proto.type.tensor_type.shape.dim for proto in model.graph.output if proto.name == output]
    return int(dims[0][-1].dim_value) if dims and len(dims[0]) and dims[0][-1].HasField("dim_value") else -1


def _resize_reshapes(model: onnx.ModelProto, last: Collection[str], old: int, new: int) -> None:
    """Put the new number of classes into constant shapes of Reshape nodes behind the last layer."""
    behind = set(last)
    constants = {tensor.name: tensor for tensor in model.graph.initializer} | stored_tensors(model)
    for node in model.graph.node:
        if not behind.intersection(node.input):
            continue
        behind |= set(node.output)
        if node.op_type != RESHAPE or len(node.input) < 2 or node.input[1] not in constants or old < 0:
            continue
        tensor = constants[node.input[1]]
        shape = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.INT64 and shape.ndim == 1 and (shape == old).sum() == 1:
            resized = numpy_helper.from_array(np.where(shape == old, new, shape).astype(np.int64), tensor.name)
            tensor.CopyFrom(resized)


def refuse_shape(classes: int, expected: int, path: Path) -> None:
    """Raise FgvcError where the written file has another number of classes than it should."""
    if classes != expected:
        raise FgvcError(
            f"{path}: has the number of its classes elsewhere in its graph, too, so that its last layer can't be of {expected}: "
            "train a net of model.backbone in its place"
        )
