"""Tensors that an ONNX file stores: where they lie, what they hold, and how others are written in their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from fgvc.errors import FgvcError

FLOATS: dict[int, int] = {  # bytes a value
    TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8, TensorProto.BFLOAT16: 2,
}  # fmt: skip
TYPED: dict[int, str] = {  # field of a TensorProto that holds such values where they are not raw
    TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data",
    TensorProto.FLOAT16: "int32_data", TensorProto.BFLOAT16: "int32_data",
}  # fmt: skip


def stored_tensors(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """The tensors of a graph's initializers and Constant nodes, in the file's own messages, by the name under which nodes read
    them. Those of subgraphs and functions are left out."""
    constants = {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx")
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return {tensor.name: tensor for tensor in model.graph.initializer} | constants


def read_tensor(tensor: TensorProto, folder: Path) -> NDArray[np.generic]:
    """Read a tensor's values; bfloat16 as float32. `folder`: where external data lie. Raises FgvcError where they are gone or cut
    short."""
    try:
        array = numpy_helper.to_array(tensor, base_dir=str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise FgvcError(f"{folder}: tensor {tensor.name!r}: {error}") from error
    return array.astype(np.float32) if tensor.data_type == TensorProto.BFLOAT16 else array


def external_file(tensor: TensorProto) -> str | None:
    """The name of the file that holds a tensor's data; None where the model itself does. Raises FgvcError where the name is a
    path: data lie beside the model, nowhere else."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if not name or name != Path(name).name or name in (".", "..") or "\\" in name:
        raise FgvcError(f"tensor {tensor.name!r}: its data lie in {name!r}: a plain file beside the model is expected")
    return name


def external_files(model: onnx.ModelProto) -> list[str]:
    """The names of the files that hold data of a model's stored tensors, sorted."""
    return sorted({name for tensor in stored_tensors(model).values() if (name := external_file(tensor)) is not None})


def encoded(tensor: TensorProto, values: NDArray[np.float64]) -> bytes:
    """Little-endian bytes of values in the tensor's own type, as `raw_data` holds them. Raises FgvcError where one is out of the
    type's range."""
    if list(values.shape) != list(tensor.dims):
        raise ValueError(f"{tensor.name}: {values.shape} for {list(tensor.dims)}")
    with np.errstate(over="ignore"):
        if tensor.data_type == TensorProto.BFLOAT16:
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
            array = rounded.astype("<u2")
            finite = np.isfinite((rounded << 16).astype(np.uint32).view(np.float32))
        else:
            array = values.astype(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<"))
            finite = np.isfinite(array)
    if not finite[np.isfinite(values)].all():
        raise FgvcError(
            f"tensor {tensor.name!r}: a value is out of the range of the file's type; train with a lower optim.lr"
        )
    return array.tobytes()


def write_tensor(tensor: TensorProto, values: NDArray[np.float64]) -> None:
    """Put values in the place of a tensor's own, in its type and encoding. Not for external data."""
    data = encoded(tensor, values)
    if tensor.HasField("raw_data"):
        tensor.raw_data = data
        return
    field = TYPED[tensor.data_type]
    kind = {"float_data": "<f4", "double_data": "<f8", "int32_data": "<u2"}[field]
    del getattr(tensor, field)[:]
    getattr(tensor, field).extend(np.frombuffer(data, kind).tolist())


def external_span(tensor: TensorProto) -> tuple[int, int]:
    """Offset and length in bytes of a tensor's data in its file."""
    entries: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    size = int(np.prod(tensor.dims, dtype=np.int64)) * FLOATS.get(tensor.data_type, 0)
    return int(entries.get("offset", 0)), int(entries.get("length", size))
