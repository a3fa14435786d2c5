"""In-place edits of ONNX graphs, from which the rules of spelling are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx import GraphProto, TensorProto

from fgvc.exporting.structure import FLOATING

DEFAULT_DOMAIN = ("", "ai.onnx")


def domain_of(name: str) -> str:
    """Canonical name of a domain: the default domain of ONNX has two."""
    return "" if name in DEFAULT_DOMAIN else name


def graphs_in(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those inside of its nodes."""
    yield graph
    for inner in _inner(graph):
        yield from graphs_in(inner)


def _inner(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))


def keep(field: Any, kept: Sequence[bool]) -> int:
    """Remove the other elements of a repeated field, in place: copies of weights would be large. Returns how many went."""
    for at in reversed(range(len(kept))):
        if not kept[at]:
            del field[at]
    return len(kept) - sum(kept)


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values wherever they are made or read, in inner graphs, too."""
    if not names:
        return

    def new(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    for node in graph.node:
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for inner in _inner(graph):
        own = {port.name for port in inner.input} | {tensor.name for tensor in inner.initializer}
        own |= {name for node in inner.node for name in node.output}
        rename(inner, {old: name for old, name in names.items() if old not in own})
        for port in inner.output:
            port.name = port.name if port.name in own else new(port.name)


def unread(graph: GraphProto) -> set[str]:
    """Values and initializers that nothing reads."""
    read = {port.name for port in graph.output}
    for inside in graphs_in(graph):
        read |= {name for node in inside.node for name in node.input} | {port.name for port in inside.output}
    made = {name for node in graph.node for name in node.output if name}
    made = {name for node in graph.node for name in node.output if not read & set(node.output)} & made
    return made | {tensor.name for tensor in graph.initializer if tensor.name not in read}


def is_float(tensor: TensorProto) -> bool:
    """Whether a tensor is floating-point."""
    return TensorProto.DataType.Name(tensor.data_type).lower() in FLOATING
