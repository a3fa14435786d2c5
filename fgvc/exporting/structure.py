"""The canonical form of an ONNX graph: what has to agree for one file to be a drop-in replacement of another.

Two files with equal canonical forms compute the same thing by the same nodes. Inside a Graph, references are `i0` for
an input by position, `v7` for a value, `w3` for an initializer, "" for an optional input left out. What no output
depends on has references by content instead (`d:` a node's output, `w:` an initializer), because no walk from the
outputs reaches it to give it a number. Fields marked compare=False are for people and stay out of the hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

FLOATING = frozenset({"float", "float16", "bfloat16", "double"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """A constant tensor. dtype: as ONNX names it, in lower case; digest: SHA-256 of the payload, None where it is blanked."""

    dtype: str
    dims: tuple[int, ...]
    digest: str | None
    preview: str = field(default="", compare=False)  # the values, where there are few: for people only

    @property
    def blankable(self) -> bool:
        """Whether it may be a weight: floating-point, of rank 1 or more."""
        return self.dtype in FLOATING and len(self.dims) >= 1

    def __str__(self) -> str:
        shown = "" if self.digest is None else " = " + (self.preview or f"sha256:{self.digest[:12]}")
        return f"{self.dtype}[{','.join(map(str, self.dims))}]{shown}"


@dataclass(frozen=True, slots=True)
class Initializer:
    """A stored tensor of a graph."""

    name: str  # w0, w1... in the order of first use
    tensor: Tensor
    overridable: bool = False  # also listed as a graph input (files of IR version 3 and older)
    stored_name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph input or output. A dynamic axis is "?k": its name is free, which axes share one is not."""

    name: str  # "" inside subgraphs and functions, where names mean nothing
    dtype: str
    dims: tuple[int | str, ...] | None  # None: rank unknown
    value: str

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}[{'rank unknown' if self.dims is None else ','.join(map(str, self.dims))}]"


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a node: a plain value as text, or tensors or graphs."""

    name: str
    kind: str
    value: str | tuple[Tensor, ...] | tuple[Graph, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """An operator with its tensors by their canonical names; `stored_*`: as the file has it, which does not count."""

    op: str
    attributes: tuple[Attribute, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stored_name: str = field(default="", compare=False)
    stored_index: int = field(default=0, compare=False)
    stored_outputs: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph, or a subgraph of a node, in canonical order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]  # live nodes, inputs before users; then those that no output depends on


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the model's own, which nodes call by its name."""

    name: str
    opset: tuple[tuple[str, int], ...]
    parameters: tuple[str, ...]  # attribute names
    defaults: tuple[Attribute, ...]
    body: Graph


@dataclass(frozen=True)
class Canonical:
    """Canonical form of a model. `initializers` are those of subgraphs too, where they are first used."""

    ir_version: int
    opset: tuple[tuple[str, int], ...]  # (domain, version), sorted; the default domain is "ai.onnx"
    graph: Graph
    initializers: tuple[Initializer, ...]
    functions: tuple[Function, ...]

    @cached_property
    def sha256(self) -> str:
        return digest("fgvc-canonical-1", self)


def digest(*values: object) -> str:
    """SHA-256, in hexadecimal digits, of values as JSON; of dataclasses the fields that count in a comparison."""
    return hashlib.sha256(json.dumps(_plain(values), separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return [_plain(getattr(value, f.name)) for f in fields(value) if f.compare]
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
