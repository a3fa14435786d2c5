"""Weights written into a copy of the file that a net was read from: payloads alone differ, and that is proved.

An ONNX file is a protobuf message. Where a tensor's values lie in it as plain numbers (raw, or packed floats), their bytes are
replaced where they are, so that every other byte stays. Half floats in a typed field are packed whole numbers, whose length
depends on their values: there the message is written anew, and the parsed messages are compared instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from fgvc.errors import FgvcError
from fgvc.io.files import write_atomic
from fgvc.io.protobuf import fields, varint
from fgvc.models.onnxnet.payload import (
    FLOATS,
    encoded,
    external_file,
    external_files,
    external_span,
    read_tensor,
    stored_tensors,
    write_tensor,
)  # fmt: skip
from fgvc.models.onnxnet.read import load_model

# Numbers of fields: of ModelProto, GraphProto, NodeProto and AttributeProto; and of TensorProto.
GRAPH, NODE, INITIALIZER, OUTPUT, OP_TYPE, ATTRIBUTE, TENSOR = 7, 1, 5, 2, 4, 5, 5
DATA_TYPE, NAME, RAW, FLOAT_DATA, DOUBLE_DATA = 2, 8, 9, 4, 10
VALUES = ("raw_data", "float_data", "double_data", "int32_data")
Span = tuple[int, int]  # first byte, and the one after the last


@dataclass(frozen=True, slots=True)
class Written:
    """A copy of a file with other weights."""

    path: Path
    moved: tuple[str, ...]  # tensors whose values are others
    kept: tuple[str, ...]  # of those that were given, the ones whose values are not: copied as bytes
    reencoded: bool  # a payload's length changed: the messages are equal, not the bytes
    files: tuple[str, ...] = ()  # external data, beside it


def write_into(source: Path, tensors: Mapping[str, NDArray[np.float64]], out: Path) -> Written:
    """Write `out`, a copy of `source` in which the named tensors hold these values (in the file's shapes), in the types and
    encodings that they had. External data are written to files of the same names beside `out`.

    Raises FgvcError where a value does not fit its type, and where `out` is `source` or external data would land on those of
    the source.
    """
    data = bytearray(source.read_bytes())
    model = onnx.load_from_string(bytes(data))
    beside = out.resolve().parent == source.resolve().parent
    if beside and (out.resolve() == source.resolve() or external_files(model)):
        raise FgvcError(f"{out}: would lie on {source} or its data: choose another folder")
    stored, spans = stored_tensors(model), payload_spans(bytes(data))
    moved = [name for name, values in tensors.items() if _differs(read_tensor(stored[name], source.parent), values)]
    outside: dict[str, bytearray] = {name: bytearray((source.parent / name).read_bytes()) for name in external_files(model)}
    lengthened = False
    for name in moved:
        payload = encoded(stored[name], tensors[name])
        if (file := external_file(stored[name])) is not None:
            offset, length = external_span(stored[name])
            if length != len(payload):
                raise FgvcError(
                    f"{source}: tensor {name!r}: its data in {file} are {length} bytes, {len(payload)} are expected"
                )
            outside[file][offset : offset + length] = payload
        elif name in spans and spans[name][1] - spans[name][0] == len(payload):
            data[slice(*spans[name])] = payload
        else:
            lengthened = True
    if lengthened:
        for name in moved:
            if external_file(stored[name]) is None:
                write_tensor(stored[name], tensors[name])
        data = bytearray(model.SerializeToString())
    for file, content in outside.items():
        write_atomic(out.parent / file, bytes(content))
    write_atomic(out, bytes(data))
    kept = tuple(name for name in tensors if name not in set(moved))
    return Written(out, tuple(moved), kept, lengthened, tuple(outside))


def differences_outside(ours: Path, theirs: Path, payloads: Collection[str] | None = None) -> list[str]:
    """Differences of two files in anything but the values of these stored tensors (None: of all floats), in words; empty: they
    are one graph with two sets of weights. Bytes are compared, and where a typed field has another length, the parsed
    messages."""
    a, b = ours.read_bytes(), theirs.read_bytes()
    one, two = onnx.load_from_string(a), onnx.load_from_string(b)
    files = external_files(one), external_files(two)
    differences = [f"external data: {files[0]} and {files[1]}"] if files[0] != files[1] else []
    if _zeroed(a, payloads) != _zeroed(b, payloads) and _cleared(one, payloads) != _cleared(two, payloads):
        differences.append(_first_difference(a, b, payloads))
    for name in set(files[0]) & set(files[1]):
        contents = [_zeroed_external(path.parent / name, model, payloads) for path, model in ((ours, one), (theirs, two))]
        if contents[0] != contents[1]:
            differences.append(f"{name}: bytes that are no weight's differ")
    return differences


def moved_between(ours: Path, theirs: Path) -> tuple[str, ...]:
    """The stored floats whose values differ between two files of one graph."""
    pairs = [(stored_tensors(load_model(path)), path.parent) for path in (ours, theirs)]
    (mine, here), (others, there) = pairs
    return tuple(
        name
        for name, tensor in mine.items()
        if tensor.data_type in FLOATS and name in others
        and read_tensor(tensor, here).tobytes() != read_tensor(others[name], there).tobytes()
    )  # fmt: skip


def skeleton(path: Path, payloads: Collection[str] | None = None, *, parsed: bool = False) -> str:
    """SHA-256 of a file, and of its external data, with the payloads of these tensors zeroed (None: of all floats). `parsed`: of
    the messages, these payloads taken out, where their lengths differ."""
    data = path.read_bytes()
    model = onnx.load_from_string(data)
    digest = hashlib.sha256()
    for name in external_files(model):
        digest.update(name.encode() + _zeroed_external(path.parent / name, model, payloads))
    body = _cleared(model, payloads).SerializeToString(deterministic=True) if parsed else _zeroed(data, payloads)
    digest.update(body)
    return digest.hexdigest()


def payload_spans(data: bytes) -> dict[str, Span]:
    """Locate the values of each stored tensor of floats in a serialised model, by the name under which nodes read it; those in
    raw, float or double fields alone. Those of subgraphs and functions are left out."""
    spans: dict[str, Span] = {}
    for number, _, start, end in fields(data):
        if number != GRAPH:
            continue
        for kind, _, begin, stop in fields(data, start, end):
            if kind == INITIALIZER:
                _note(data, begin, stop, None, spans)
            elif kind == NODE:
                parts = [(number, a, b) for number, _, a, b in fields(data, begin, stop)]
                output = next((data[a:b].decode() for field_, a, b in parts if field_ == OUTPUT), None)
                constant = any(field_ == OP_TYPE and data[a:b] == b"Constant" for field_, a, b in parts)
                for field_, a, b in parts if constant else ():
                    if field_ == ATTRIBUTE:
                        for inner, _, c, d in fields(data, a, b):
                            if inner == TENSOR:
                                _note(data, c, d, output, spans)
    return spans


def _note(data: bytes, start: int, end: int, name: str | None, spans: dict[str, Span]) -> None:
    payload: Span | None = None
    kind: int = onnx.TensorProto.FLOAT
    for number, _, a, b in fields(data, start, end):
        if number == NAME and name is None:
            name = data[a:b].decode()
        elif number in (RAW, FLOAT_DATA, DOUBLE_DATA):
            payload = (a, b)
        elif number == DATA_TYPE:
            kind = varint(data, a)[0]
    if name is not None and payload is not None and kind in FLOATS:
        spans[name] = payload


def _differs(stored: NDArray[np.generic], values: NDArray[np.float64]) -> bool:
    """Whether the net's values have changed since it read them: it reads and trains in float32."""
    return not np.array_equal(stored.astype(np.float32), values.astype(np.float32), equal_nan=True)


def _zeroed(data: bytes, payloads: Collection[str] | None = None) -> bytes:
    copy = bytearray(data)
    for name, (start, end) in payload_spans(data).items():
        if payloads is None or name in payloads:
            copy[start:end] = bytes(end - start)
    return bytes(copy)


def _zeroed_external(path: Path, model: onnx.ModelProto, payloads: Collection[str] | None = None) -> bytes:
    copy = bytearray(path.read_bytes())
    for name, tensor in stored_tensors(model).items():
        given = payloads is None or name in payloads
        if given and external_file(tensor) == path.name and tensor.data_type in FLOATS:
            offset, length = external_span(tensor)
            copy[offset : offset + length] = bytes(length)
    return bytes(copy)


def _cleared(model: onnx.ModelProto, payloads: Collection[str] | None = None) -> onnx.ModelProto:
    """Take these payloads out of the model, in place."""
    for name, tensor in stored_tensors(model).items():
        if tensor.data_type in FLOATS and (payloads is None or name in payloads):
            for field in VALUES:
                tensor.ClearField(field)
    return model


def _first_difference(a: bytes, b: bytes, payloads: Collection[str] | None = None) -> str:
    if len(a) != len(b):
        return f"their lengths are {len(a)} and {len(b)} bytes"
    a, b = _zeroed(a, payloads), _zeroed(b, payloads)
    at = int(np.flatnonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8))[0])
    return f"the first of them at byte {at}"
