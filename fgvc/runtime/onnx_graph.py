"""Parsing of an ONNX file's graph, as far as its ends are needed: nodes, small constants, inputs and outputs.

Read from the file's own bytes, since what runs in production has onnxruntime and no onnx, and onnxruntime tells nothing of a
graph but its inputs and outputs. Numbers of fields are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fgvc.io.protobuf import LENGTH, fields, signed, varint, varints

Span = tuple[int, int]  # first byte, and the one after the last
Message = dict[int, list[tuple[int, Span]]]  # by the field's number: wire type and place of each of its values

KINDS: Mapping[int, str] = {  # TensorProto.DataType, as numpy names them
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
}  # fmt: skip
FIELD_OF_KIND = {"float32": (4, "<f4"), "float64": (10, "<f8")}  # packed as they are; else varints, in field 5 or 7
LARGEST = 4096  # values: what is larger is a weight


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph."""

    name: str
    kind: str  # numpy's name of its type; "" where it is no tensor
    shape: tuple[int | None, ...] | None  # None: free; as a whole: not declared


@dataclass(frozen=True, slots=True)
class Node:
    """An operator of the graph."""

    op: str
    domain: str  # "" for ai.onnx
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """A file's graph; calls of its own functions are replaced by their bodies."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, NDArray[Any]]  # initializers of at most LARGEST values that lie in the file
    stored: frozenset[str]  # names of all initializers
    inputs: tuple[Port, ...]  # without initializers, which older files list there, too
    outputs: tuple[Port, ...]
    opset: int  # of ai.onnx


def read_onnx_graph(data: bytes) -> OnnxGraph:
    """Read a serialised model. Raises ValueError where it is none, or cut short."""
    try:
        return _Reader(data).model()
    except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
        raise ValueError(f"not an ONNX model ({error})") from error


@dataclass(frozen=True, slots=True)
class _Function:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class _Reference:
    """An attribute of a function's node that is one of the call's."""

    name: str


class _Reader:
    """Messages of one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def model(self) -> OnnxGraph:
        model = self._message((0, len(self.data)))
        if not model.get(7):
            raise ValueError("it has no graph")
        graph = self._message(model[7][-1][1])
        functions = dict(self._function(span) for _, span in model.get(25, ()))
        nodes = tuple(self._node(span) for _, span in graph.get(1, ()))
        tensors = dict(self._tensor(span) for _, span in graph.get(5, ()))
        opsets = [self._message(span) for _, span in model.get(8, ())]
        opset = next((self._int(each, 2) for each in opsets if self._text(each, 1) in ("", "ai.onnx")), 0)
        inputs = tuple(self._port(span) for _, span in graph.get(11, ()))
        return OnnxGraph(
            nodes=tuple(_inlined(nodes, functions)),
            constants={name: values for name, values in tensors.items() if values is not None},
            stored=frozenset(tensors),
            inputs=tuple(port for port in inputs if port.name not in tensors),
            outputs=tuple(self._port(span) for _, span in graph.get(12, ())),
            opset=opset,
        )

    def _function(self, span: Span) -> tuple[tuple[str, str], _Function]:
        message = self._message(span)
        key = self._text(message, 10), self._text(message, 1)
        nodes = tuple(self._node(each) for _, each in message.get(7, ()))
        return key, _Function(self._texts(message, 4), self._texts(message, 5), nodes)

    def _node(self, span: Span) -> Node:
        message = self._message(span)
        domain = self._text(message, 7)
        return Node(
            self._text(message, 4), "" if domain == "ai.onnx" else domain, self._texts(message, 1), self._texts(message, 2),
            dict(self._attribute(each) for _, each in message.get(5, ())),
        )  # fmt: skip

    def _attribute(self, span: Span) -> tuple[str, Any]:
        message = self._message(span)
        name, value = self._text(message, 1), cast(Any, None)
        if 21 in message:
            value = _Reference(self._text(message, 21))
        elif 5 in message:
            value = self._tensor(message[5][-1][1])[1]
        elif 2 in message:
            value = self._floats(message, 2)[-1]
        elif 3 in message:
            value = self._int(message, 3)
        elif 4 in message:
            value = self._text(message, 4)
        elif 7 in message:
            value = self._floats(message, 7)
        elif 8 in message:
            value = self._ints(message, 8)
        return name, value

    def _tensor(self, span: Span) -> tuple[str, NDArray[Any] | None]:
        """Name and values; None where they are many, in another file, or of a type that numpy has not."""
        message = self._message(span)
        name, shape = self._text(message, 8), self._ints(message, 1)
        kind, count = KINDS.get(self._int(message, 2), ""), int(np.prod(shape))
        if count > LARGEST or kind in ("", "string", "bfloat16") or self._int(message, 14):
            return name, None
        if 9 in message:
            start, end = message[9][-1][1]
            values = np.frombuffer(self.data[start:end], np.dtype(kind).newbyteorder("<"))
        elif kind in FIELD_OF_KIND:
            number, code = FIELD_OF_KIND[kind]
            places = [self.data[start:end] for _, (start, end) in message.get(number, ())]  # packed, or one by one
            values = np.frombuffer(b"".join(places), code)
        else:
            numbers = self._ints(message, 7 if kind == "int64" else 11 if kind in ("uint32", "uint64") else 5)
            bits = np.array(numbers, np.int64)
            values = bits.astype(np.uint16).view(np.float16) if kind == "float16" else bits.astype(kind)
        return name, values.reshape(shape) if values.size == count else None

    def _port(self, span: Span) -> Port:
        message = self._message(span)
        kinds = [self._message(each) for _, each in message.get(2, ())]
        tensors = [self._message(each) for kind in kinds for _, each in kind.get(1, ())]
        if not tensors:
            return Port(self._text(message, 1), "", None)
        tensor, shape = tensors[-1], None
        if 2 in tensor:
            dims = [self._message(each) for _, each in self._message(tensor[2][-1][1]).get(1, ())]
            sizes = [self._int(dim, 1) for dim in dims]
            shape = tuple(size if size > 0 else None for size in sizes)
        return Port(self._text(message, 1), KINDS.get(self._int(tensor, 1), "an unknown type"), shape)

    def _message(self, span: Span) -> Message:
        message: Message = {}
        for number, wire, start, end in fields(self.data, *span):
            message.setdefault(number, []).append((wire, (start, end)))
        return message

    def _text(self, message: Message, number: int) -> str:
        return (self._texts(message, number) or ("",))[-1]

    def _texts(self, message: Message, number: int) -> tuple[str, ...]:
        return tuple(self.data[start:end].decode() for _, (start, end) in message.get(number, ()))

    def _int(self, message: Message, number: int) -> int:
        return (self._ints(message, number) or [0])[-1]

    def _ints(self, message: Message, number: int) -> list[int]:
        numbers: list[int] = []
        for wire, (start, end) in message.get(number, ()):
            numbers += varints(self.data, start, end) if wire == LENGTH else [signed(varint(self.data, start)[0])]
        return numbers

    def _floats(self, message: Message, number: int) -> list[float]:
        return [
            value
            for _, (start, end) in message.get(number, ())
            for (value,) in struct.iter_unpack("<f", self.data[start:end])
        ]


def _inlined(
    nodes: tuple[Node, ...], functions: Mapping[tuple[str, str], _Function], depth: int = 0, prefix: str = ""
) -> Iterator[Node]:
    """The nodes, with the body of a function in the place of each call of one."""
    for at, node in enumerate(nodes):
        function = functions.get((node.domain, node.op))
        if function is None or depth > 20:  # functions don't call themselves, in a valid file
            yield node
            continue
        inner = f"{prefix}{at}/"
        names = dict(zip(function.inputs, node.inputs, strict=False)) | dict(
            zip(function.outputs, node.outputs, strict=False)
        )
        body = []
        for each in function.nodes:
            attributes = {
                name: node.attributes[value.name] if isinstance(value, _Reference) else value
                for name, value in each.attributes.items()
                if not isinstance(value, _Reference) or value.name in node.attributes
            }
            inputs, outputs = (
                tuple(name and names.setdefault(name, inner + name) for name in side)
                for side in (each.inputs, each.outputs)
            )
            body.append(replace(each, inputs=inputs, outputs=outputs, attributes=attributes))
        yield from _inlined(tuple(body), functions, depth + 1, inner)
