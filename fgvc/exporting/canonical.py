"""Canonical form (structure.py) of an ONNX file, and finding weights by comparing two canonical forms.

Inner tensors are renamed by order of first use, walking from the graph's outputs, so neither names nor the order of
storage matter. Metadata, node names and value_info are dropped, and so are the payloads of weights: nothing else.
Constants hidden among the initializers, such as the bounds of a Clip or the axes of a ReduceMean, stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx import numpy_helper as onnx_numpy

from fgvc.errors import FgvcError
from fgvc.exporting.structure import (
    Attribute,
    Canonical,
    Function,
    Graph,
    Initializer,
    Node,
    Tensor,
    TensorSpec,
    digest,
)

_PREVIEW = 8  # tensors up to this size are shown by value

# A field in neither table is refused, so that no content of a file escapes the comparison.
_COMPARED = {
    ModelProto: {"ir_version", "opset_import", "graph", "functions"},
    GraphProto: {"node", "initializer", "input", "output"},
    NodeProto: {"input", "output", "op_type", "domain", "overload", "attribute"},
    FunctionProto: {"name", "domain", "overload", "input", "output", "attribute", "attribute_proto", "node"}
    | {"opset_import"},
}
_IGNORED = {
    "name", "doc_string", "metadata_props", "value_info",
    "producer_name", "producer_version", "model_version", "domain",
}  # fmt: skip


def canonicalise(model: ModelProto, *, weights: Collection[int] | None) -> Canonical:
    """Canonical form of `model`.

    weights: positions, among `Canonical.initializers`, of those whose payload is blanked; None: every one that may be.
    Only floating-point initializers of rank >= 1 may be, whatever `weights` has.
    Raises FgvcError for external data, for what isn't a graph (a cycle, a tensor that no node produces, or two)
    and for what this comparison does not cover (sparse initializers, quantization annotations, training graphs).
    """
    _refuse_unknown(model)
    build = _Build(weights)
    graph = build.graph(model.graph, None)
    return Canonical(
        ir_version=model.ir_version,
        opset=_opset(model.opset_import),
        graph=graph,
        initializers=tuple(build.initializers),
        functions=tuple(sorted((_function(f) for f in model.functions), key=lambda f: f.name)),
    )


def weight_positions(a: ModelProto, b: ModelProto) -> frozenset[int]:
    """Positions of the weights among the initializers, from two exports of one plain network with two draws of random weights:
    the floating-point ones of rank >= 1 whose payloads differ. Equal ones are constants of the graph.

    Raises FgvcError if the two exports differ in anything else.
    """
    if canonicalise(a, weights=None).sha256 != canonicalise(b, weights=None).sha256:
        raise FgvcError(
            "two exports of the plain network with different random weights have different graphs, so they can't say "
            "which initializers are weights: a weight is a scalar, or the draws were degenerate (equal or zero rows "
            "make the exporter merge or drop initializers). Look at compare_graphs() of the two"
        )
    pairs = zip(canonicalise(a, weights=()).initializers, canonicalise(b, weights=()).initializers, strict=True)
    return frozenset(k for k, (x, y) in enumerate(pairs) if x.tensor.digest != y.tensor.digest)


@dataclass(frozen=True, slots=True)
class Merged:
    """Initializers that the exporter merged, or dropped, because a weight is degenerate.

    `references` are those of the plain export (stored names), with their `positions`; `candidate` is the initializer that
    replaces them all, or None where the exporter dropped a bias.
    """

    candidate: str | None
    references: tuple[str, ...]
    positions: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(self.references)
        return f"dropped: {names}" if self.candidate is None else f"merged into {self.candidate}: {names}"


def shared_initializers(candidate: Canonical, reference: Canonical) -> list[Merged]:
    """Initializers that the exporter merged or dropped in `candidate` because of equal or zero payloads (dead channels).

    Walks both graphs in parallel from the outputs, through the Identity nodes that the TorchScript exporter puts
    between a merged initializer and its second user. Where the two graphs differ for another reason the walk ends.
    """
    producers = [_producers(c.graph) for c in (candidate, reference)]
    served: dict[str | None, set[str]] = {}
    todo = [(c.value, r.value) for c, r in zip(candidate.graph.outputs, reference.graph.outputs, strict=False)]
    visited: set[tuple[str, str]] = set()
    while todo:
        pair = todo.pop()
        if pair in visited:
            continue
        visited.add(pair)
        c, r = (_through_identity(ref, by_ref) for ref, by_ref in zip(pair, producers, strict=True))
        if r in producers[1] and c in producers[0]:
            (node_c, slot_c), (node_r, slot_r) = producers[0][c], producers[1][r]
            if node_c.op == node_r.op and slot_c == slot_r:
                absent = [""] * (len(node_r.inputs) - len(node_c.inputs))
                todo.extend(zip([*node_c.inputs, *absent], node_r.inputs, strict=False))
        elif r.startswith("w") and (c == "" or c.startswith("w")):
            served.setdefault(c or None, set()).add(r)
    stored = [{w.name: (k, w.stored_name) for k, w in enumerate(c.initializers)} for c in (candidate, reference)]
    merged = []
    for c_ref, r_refs in served.items():
        if c_ref is None or len(r_refs) > 1:
            places = sorted(stored[1][ref] for ref in r_refs)
            name = None if c_ref is None else stored[0][c_ref][1]
            merged.append(Merged(name, tuple(n for _, n in places), tuple(k for k, _ in places)))
    return sorted(merged, key=lambda m: m.positions)


def _producers(graph: Graph) -> dict[str, tuple[Node, int]]:
    return {ref: (node, slot) for node in graph.nodes for slot, ref in enumerate(node.outputs) if ref}


def _through_identity(ref: str, producers: Mapping[str, tuple[Node, int]]) -> str:
    """Initializer behind a chain of Identity nodes, or `ref` itself."""
    end = ref
    while end in producers and producers[end][0].op == "Identity":
        end = producers[end][0].inputs[0]
    return end if end.startswith("w") else ref


class _Scope:
    """Names that a graph's nodes can read: those of the graph, then those of the graphs around it."""

    def __init__(self, graph: GraphProto | FunctionProto, parent: _Scope | None) -> None:
        self.parent = parent
        self.refs: dict[str, str] = {}
        self.stored: dict[str, TensorProto] = {}
        self.overridable: set[str] = set()
        if isinstance(graph, GraphProto):
            self.stored = {t.name: t for t in graph.initializer}
            if len(self.stored) != len(graph.initializer):
                raise FgvcError("two initializers have the same name: the file is not a valid graph")
            self.overridable = {port.name for port in graph.input if port.name in self.stored}

    def find(self, name: str) -> _Scope:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.refs or name in scope.stored:
                return scope
            scope = scope.parent
        raise FgvcError(f"tensor {name!r} is read but nothing produces it: the file is not a valid graph")


class _Build:
    """One pass over a model or function, which assigns canonical names in the order of first use."""

    def __init__(self, weights: Collection[int] | None) -> None:
        self.weights = weights
        self.initializers: list[Initializer] = []
        self.values = count()
        self.symbols: dict[object, str] = {}

    def graph(self, graph: GraphProto | FunctionProto, parent: _Scope | None) -> Graph:
        _refuse_unknown(graph)
        scope = _Scope(graph, parent)
        top = isinstance(graph, GraphProto) and parent is None
        inputs = [p for p in graph.input if _name(p) not in scope.stored]
        for k, port in enumerate(inputs):
            self.define(scope, _name(port), f"i{k}" if parent is None else f"v{next(self.values)}")
        in_ports = [self.port(p, scope.refs[_name(p)], named=top) for p in inputs]
        # Types come before the nodes, so that the symbols of dynamic axes count from the graph's own inputs.
        typed = [self.port(p, "", named=top) for p in graph.output]
        live, dead = _order(graph)
        nodes = [self.node(graph.node[k], k, scope) for k in live]
        values = [self.ref(_name(p), scope) for p in graph.output]
        self.unused(scope)
        nodes += sorted((self.dead_node(graph.node[k], k, scope) for k in dead), key=lambda node: node.outputs)
        out_ports = [TensorSpec(p.name, p.dtype, p.dims, value) for p, value in zip(typed, values, strict=True)]
        return Graph(tuple(in_ports), tuple(out_ports), tuple(nodes))

    def define(self, scope: _Scope, name: str, ref: str) -> None:
        if name in scope.refs or name in scope.stored:
            raise FgvcError(f"tensor {name!r} is defined twice: the file is not a valid graph")
        scope.refs[name] = ref

    def ref(self, name: str, scope: _Scope) -> str:
        if not name:
            return ""
        owner = scope.find(name)
        if name not in owner.refs:
            owner.refs[name] = self.initializer(owner.stored[name], name in owner.overridable).name
        return owner.refs[name]

    def initializer(self, stored: TensorProto, overridable: bool) -> Initializer:
        position = len(self.initializers)
        blank = self.weights is None or position in self.weights
        initializer = Initializer(f"w{position}", _tensor(stored, blank=blank), overridable, stored.name)
        self.initializers.append(initializer)
        return initializer

    def unused(self, scope: _Scope) -> None:
        """Add the initializers that no output depends on. Shape before payload, so that the order is that of any weights."""
        tensors = {name: _tensor(t, blank=False) for name, t in scope.stored.items() if name not in scope.refs}
        for name in sorted(tensors, key=lambda n: (tensors[n].dtype, tensors[n].dims, tensors[n].digest)):
            initializer = self.initializer(scope.stored[name], name in scope.overridable)
            scope.refs[name] = f"w:{initializer.tensor.dtype}{list(initializer.tensor.dims)}:{initializer.tensor.digest}"

    def node(self, node: NodeProto, index: int, scope: _Scope) -> Node:
        op, inputs = _op(node), tuple(self.ref(name, scope) for name in node.input)
        attributes = self.attributes(node.attribute, scope)
        for name in filter(None, node.output):
            self.define(scope, name, f"v{next(self.values)}")
        outputs = tuple(scope.refs[name] if name else "" for name in node.output)
        return Node(op, attributes, inputs, outputs, node.name, index, tuple(node.output))

    def dead_node(self, node: NodeProto, index: int, scope: _Scope) -> Node:
        """Canonical form of a dead node, named by its content: it has no first use that every order of storage agrees on."""
        if any(_subgraphs(a) for a in node.attribute):
            raise FgvcError(f"node {node.name!r} ({node.op_type}) has subgraphs and no output depends on it: remove it")
        op, inputs = _op(node), tuple(self.ref(name, scope) for name in node.input)
        attributes = self.attributes(node.attribute, scope)
        mark = digest(op, attributes, inputs, [bool(name) for name in node.output])[:24]
        for slot, name in enumerate(node.output):
            if name:
                self.define(scope, name, f"d:{mark}.{slot}")
        outputs = tuple(scope.refs[name] if name else "" for name in node.output)
        return Node(op, attributes, inputs, outputs or (f"d:{mark}",), node.name, index, tuple(node.output))

    def attributes(self, stored: Iterable[AttributeProto], scope: _Scope | None) -> tuple[Attribute, ...]:
        return tuple(self.attribute(a, scope) for a in sorted(stored, key=lambda a: a.name))

    def attribute(self, stored: AttributeProto, scope: _Scope | None) -> Attribute:
        kind = AttributeProto.AttributeType.Name(stored.type).lower()
        value: str | tuple[Tensor, ...] | tuple[Graph, ...]
        if stored.ref_attr_name:
            value = f"@{stored.ref_attr_name}"
        elif kind in {"tensor", "tensors"}:
            value = tuple(_tensor(t, blank=False) for t in ([stored.t] if kind == "tensor" else stored.tensors))
        elif kind in {"graph", "graphs"} and scope is not None:
            value = tuple(self.graph(g, scope) for g in _subgraphs(stored))
        elif kind in {"int", "float", "string"}:
            scalars: dict[str, Any] = {"int": stored.i, "float": stored.f, "string": stored.s}
            value = _text(scalars[kind])
        elif kind in {"ints", "floats", "strings"}:
            elements: Sequence[Any] = {"ints": stored.ints, "floats": stored.floats, "strings": stored.strings}[kind]
            value = "[" + ", ".join(map(_text, elements)) + "]"
        else:
            raise FgvcError(f"attribute {stored.name!r} has the type {kind}, which can't be compared")
        return Attribute(stored.name, kind, value)

    def port(self, stored: ValueInfoProto | str, ref: str, *, named: bool) -> TensorSpec:
        if isinstance(stored, str) or (not named and not stored.HasField("type")):
            return TensorSpec("", "?", None, ref)
        if not stored.type.HasField("tensor_type"):
            raise FgvcError(f"{stored.name!r} is not a tensor: only tensors can be inputs and outputs")
        kind = stored.type.tensor_type
        dims = tuple(self.dim(d) for d in kind.shape.dim) if kind.HasField("shape") else None
        return TensorSpec(stored.name if named else "", _dtype(kind.elem_type), dims, ref)

    def dim(self, dim: onnx.TensorShapeProto.Dimension) -> int | str:
        if dim.HasField("dim_value"):
            return dim.dim_value
        # An axis without a name is equal to no other.
        return self.symbols.setdefault(dim.dim_param or object(), f"?{len(self.symbols)}")


def _order(graph: GraphProto | FunctionProto) -> tuple[list[int], list[int]]:
    """Positions of the nodes that outputs depend on, depth first from the outputs through the inputs in their order,
    every node after what it reads; then the others, also after what they read."""
    producer: dict[str, int] = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    done: dict[int, bool] = {}  # False while the walk is still below the node
    order: list[int] = []

    def visit(root: int) -> None:
        stack: list[tuple[int, Iterator[str]]] = [(root, iter(_reads(graph.node[root])))]
        done[root] = False
        while stack:
            k, names = stack[-1]
            for name in names:
                below = producer.get(name)
                if below is None or done.get(below):
                    continue
                if below in done:
                    raise FgvcError(f"the graph has a cycle through tensor {name!r}: the file is not a valid graph")
                done[below] = False
                stack.append((below, iter(_reads(graph.node[below]))))
                break
            else:
                done[k] = True
                order.append(k)
                stack.pop()

    for port in graph.output:
        root = producer.get(_name(port))
        if root is not None and root not in done:
            visit(root)
    live = len(order)
    for k in range(len(graph.node)):
        if k not in done:
            visit(k)
    return order[:live], order[live:]


def _reads(node: NodeProto) -> list[str]:
    """Names that a node reads: its inputs, then those that its subgraphs read from outside of them, by order of first use."""
    names = [name for name in node.input if name]
    for attribute in sorted(node.attribute, key=lambda a: a.name):
        for graph in _subgraphs(attribute):
            local = {p.name for p in graph.input} | {t.name for t in graph.initializer}
            local |= {name for inner in graph.node for name in inner.output}
            inner_reads = (name for order in _order(graph) for k in order for name in _reads(graph.node[k]))
            names += [name for name in inner_reads if name not in local]
            names += [port.name for port in graph.output if port.name not in local]
    return names


def _subgraphs(attribute: AttributeProto) -> list[GraphProto]:
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _function(stored: FunctionProto) -> Function:
    build = _Build(())
    return Function(
        name=f"{stored.domain}::{stored.name}" + (f":{stored.overload}" if stored.overload else ""),
        opset=_opset(stored.opset_import),
        parameters=tuple(sorted(stored.attribute)),
        defaults=build.attributes(stored.attribute_proto, None),
        body=build.graph(stored, None),
    )


def _tensor(stored: TensorProto, *, blank: bool) -> Tensor:
    """Canonical tensor, read through numpy, so that raw and typed storage of the same values agree."""
    if stored.data_location == TensorProto.EXTERNAL or stored.external_data:
        raise FgvcError(
            f"tensor {stored.name!r} keeps its values in another file, which can't be compared: load the model with "
            "onnx.load(path), which reads them in, or save it as one file"
        )
    shape = Tensor(_dtype(stored.data_type), tuple(stored.dims), None)
    if blank and shape.blankable:
        return shape
    try:
        array = onnx_numpy.to_array(stored)
    except (ValueError, TypeError) as error:
        raise FgvcError(f"tensor {stored.name!r} ({shape}) can't be read: {error}") from error
    if array.dtype == np.object_:
        payload = json.dumps([repr(value) for value in array.ravel().tolist()]).encode()
    else:
        payload = np.ascontiguousarray(array).tobytes()
    preview = str(array.tolist()) if array.size <= _PREVIEW else ""
    return Tensor(shape.dtype, shape.dims, hashlib.sha256(payload).hexdigest(), preview)


def _refuse_unknown(message: ModelProto | GraphProto | NodeProto | FunctionProto) -> None:
    for field, _ in message.ListFields():
        if field.name not in _COMPARED[type(message)] | _IGNORED:
            raise FgvcError(f"the file uses {field.full_name}, which this comparison does not cover")


def _op(node: NodeProto) -> str:
    _refuse_unknown(node)
    domain = "" if node.domain in {"", "ai.onnx"} else f"{node.domain}::"
    return f"{domain}{node.op_type}" + (f":{node.overload}" if node.overload else "")


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((entry.domain or "ai.onnx", entry.version) for entry in imports))


def _name(port: ValueInfoProto | str) -> str:
    return port if isinstance(port, str) else port.name  # functions list their inputs and outputs by name only


def _dtype(number: int) -> str:
    return TensorProto.DataType.Name(number).lower()


def _text(value: float | bytes) -> str:
    """Exact text of a value: nine digits distinguish any two 32-bit floats."""
    return f"{value:.9g}" if isinstance(value, float) else repr(value).removeprefix("b")
