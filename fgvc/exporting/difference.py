"""Readable differences between two graphs: one inserted node is one line, not a hundred.

Canonical names shift behind every inserted node, so the comparison aligns the two lists of nodes first and then follows
each edge through that alignment. It tries the canonical order and the order of storage and keeps the shorter account:
swapping two inputs of an Add turns the canonical order of whole branches round and leaves that of storage alone, a
reshuffled file does the opposite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Literal

from onnx import ModelProto

from fgvc.exporting.structure import Attribute, Canonical, Function, Graph, Initializer, Node, Tensor, TensorSpec

Kind = Literal["input", "output", "opset", "node", "attribute", "topology", "initializer", "constant", "function", "ir"]
ALL = 10_000  # differences: no account is cut
Pair = tuple[Node | None, Node | None]


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference in one place. An empty side means that this side has no such thing."""

    kind: Kind
    where: str
    candidate: str = ""
    reference: str = ""

    def __str__(self) -> str:
        if not self.candidate and not self.reference:
            return self.where
        there = self.reference or "nothing"
        return f"{self.kind}: {self.where}: {self.candidate or 'nothing'}; in the reference: {there}"


def compare_graphs(candidate: Canonical, reference: Canonical, *, limit: int = 50) -> list[Difference]:
    """List the differences: none if and only if the two hashes are equal; at most `limit`, then one that says how many more.

    Both canonical forms have to come from the same `weights`, or weights count as differences.
    """
    if candidate.sha256 == reference.sha256:
        return []
    accounts = [_account(candidate, reference, stored_order=choice) for choice in (False, True)]
    differences = min(accounts, key=len)
    if not differences:  # the hash is the judge: never silent where it differs
        return [Difference("topology", "graph, at a place not found", candidate.sha256, reference.sha256)]
    rest = len(differences) - limit
    return differences if rest <= 0 else [*differences[:limit], Difference(differences[limit].kind, f"... and {rest} more")]


def shortest_account(forms: Sequence[tuple[Canonical, Canonical]]) -> tuple[Difference, ...]:
    """The differences of the pair (candidate, reference) with the fewest, among the pairs that differ."""
    accounts = [account for pair in forms if (account := compare_graphs(*pair, limit=ALL))]
    shortest = min(accounts, key=len)
    return tuple(shortest)


def notes(candidate: ModelProto, reference: ModelProto) -> list[str]:
    """Differences that do not matter: the producer, its version, and the names of nodes, inner tensors and initializers."""
    lines = []
    for label, attribute in (("producer", "producer_name"), ("producer version", "producer_version")):
        c, r = getattr(candidate, attribute), getattr(reference, attribute)
        if c != r:
            lines.append(f"{label}: {c or 'none'}; in the reference: {r or 'none'}")
    for (label, names_c), (_, names_r) in zip(_names(candidate), _names(reference), strict=True):
        sides = ((names_c - names_r, "the candidate"), (names_r - names_c, "the reference"))
        only = [f"{len(names)} only in {side}, such as {min(names)!r}" for names, side in sides if names]
        if only:
            lines.append(f"names of {label}: {'; '.join(only)}")
    return lines


def _names(model: ModelProto) -> list[tuple[str, set[str]]]:
    outputs = {port.name for port in model.graph.output}
    return [
        ("initializers", {t.name for t in model.graph.initializer}),
        ("inner tensors", {name for node in model.graph.node for name in node.output if name} - outputs),
        ("nodes", {node.name for node in model.graph.node if node.name}),
    ]


def _account(candidate: Canonical, reference: Canonical, *, stored_order: bool) -> list[Difference]:
    walk = _Walk(candidate.initializers, reference.initializers, stored_order)
    if candidate.ir_version != reference.ir_version:
        where = "IR version (a runtime refuses files newer than itself)"
        walk.add("ir", where, candidate.ir_version, reference.ir_version)
    opsets = dict(candidate.opset), dict(reference.opset)
    for domain in sorted(opsets[0].keys() | opsets[1].keys()):
        versions = [opset.get(domain, "") for opset in opsets]
        if versions[0] != versions[1]:
            walk.add("opset", f"opset of {domain}", *versions)
    walk.graph(candidate.graph, reference.graph, "")
    walk.unused()
    walk.constants()
    walk.differences += _functions(candidate.functions, reference.functions, stored_order)
    return walk.differences


def _functions(ours: Iterable[Function], theirs: Iterable[Function], stored_order: bool) -> list[Difference]:
    differences: list[Difference] = []
    by_name = {f.name: f for f in ours}, {f.name: f for f in theirs}
    for name in sorted(by_name[0].keys() | by_name[1].keys()):
        c, r = (side.get(name) for side in by_name)
        if c is None or r is None:
            differences.append(Difference("function", f"function {name}", *("defined" if f else "" for f in (c, r))))
        elif c != r:
            walk = _Walk((), (), stored_order)
            walk.graph(c.body, r.body, f"function {name}: ")
            signatures = [_signature(f) for f in (c, r)]
            if signatures[0] != signatures[1] or not walk.differences:
                differences.append(Difference("function", f"function {name}", *signatures))
            differences += walk.differences
    return differences


def _signature(function: Function) -> str:
    defaults = {a.name: _value(a) for a in function.defaults}
    return f"opset {dict(function.opset)}, attributes {list(function.parameters)}, defaults {defaults}"


class _Side:
    """Descriptions of the nodes and tensors of one of the two graphs."""

    def __init__(self, initializers: Sequence[Initializer]) -> None:
        self.weights = {w.name: w for w in initializers}
        self.producers: dict[str, str] = {}  # reference -> its producer
        self.readers: dict[str, list[str]] = {}
        self.unmatched: set[str] = set()  # outputs of nodes that the other side doesn't have

    def enter(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            for slot, ref in enumerate(node.outputs):
                self.producers[ref] = _label(node) + (f" output {slot}" if slot else "")
            for ref in node.inputs:
                self.readers.setdefault(ref, []).append(_label(node))

    def describe(self, ref: str) -> str:
        if ref in self.weights:
            weight = self.weights[ref]
            return f"initializer {weight.stored_name!r} {weight.tensor}"
        if ref.startswith("i"):
            return f"graph input {ref[1:]}"
        return self.producers.get(ref, f"initializer {ref[2:].partition(':')[0]}" if ref.startswith("w:") else ref)

    def describe_all(self, refs: Sequence[str]) -> str:
        return ", ".join(self.describe(ref) or "nothing" for ref in refs) or "nothing"

    def describe_node(self, node: Node) -> str:
        reads = self.describe_all(node.inputs)
        return f"{_label(node)} (reads {reads}; read by {', '.join(self.users(node)) or 'no node'})"

    def users(self, node: Node) -> list[str]:
        return [label for ref in node.outputs for label in self.readers.get(ref, [])][:3]

    def signature(self, node: Node) -> Hashable:
        """Key to align a node by: its operator, attributes and shapes of initializers, which make it distinctive."""
        shapes = tuple((w.tensor.dtype, w.tensor.dims) for ref in node.inputs if (w := self.weights.get(ref)))
        return node.op, tuple(a for a in node.attributes if not a.kind.startswith("graph")), shapes


class _Walk:
    """One comparison of two graphs, which collects their differences. `same` maps references of the candidate to the reference's,
    as far as inputs, aligned nodes and the initializers in equal places show that the two are the same tensor."""

    def __init__(self, ours: Sequence[Initializer], theirs: Sequence[Initializer], stored_order: bool) -> None:
        self.ours, self.theirs, self.stored_order = _Side(ours), _Side(theirs), stored_order
        self.differences: list[Difference] = []
        self.same: dict[str, str] = {"": ""}
        self.used: set[str] = set()  # the reference's initializers that `same` leads to

    def add(self, kind: Kind, where: str, candidate: object, reference: object) -> None:
        self.differences.append(Difference(kind, where, str(candidate), str(reference)))

    def graph(self, ours: Graph, theirs: Graph, inside: str) -> None:
        self.ours.enter(ours.nodes)
        self.theirs.enter(theirs.nodes)
        self.ports("input", ours.inputs, theirs.inputs, inside)
        pairs = _align(self.ordered(ours), self.ordered(theirs), self.ours.signature, self.theirs.signature)
        for c, r in pairs:
            if c and r:
                self.same.update((a, b) for a, b in zip(c.outputs, r.outputs, strict=False) if a and b)
            else:
                self.ours.unmatched.update(filter(None, c.outputs if c else ()))
                self.theirs.unmatched.update(filter(None, r.outputs if r else ()))
        for c, r in pairs:
            if c and r and c.op == r.op:
                self.node(c, r, inside)
            else:
                where = inside + ("other operator" if c and r else "extra node" if c else "missing node")
                self.add("node", where, self.ours.describe_node(c) if c else "", self.theirs.describe_node(r) if r else "")
        self.ports("output", ours.outputs, theirs.outputs, inside)

    def ordered(self, graph: Graph) -> list[Node]:
        return sorted(graph.nodes, key=lambda n: n.stored_index) if self.stored_order else list(graph.nodes)

    def ports(self, kind: Kind, ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec], inside: str) -> None:
        if len(ours) == len(theirs):
            pairs: list[tuple[TensorSpec | None, TensorSpec | None]] = list(zip(ours, theirs, strict=True))
        else:
            by_name = {p.name: p for p in ours}, {p.name: p for p in theirs}
            pairs = [(by_name[0].get(name), by_name[1].get(name)) for name in dict.fromkeys([*by_name[1], *by_name[0]])]
        for c, r in pairs:
            if c is None or r is None or (c.name, c.dtype, c.dims) != (r.name, r.dtype, r.dims):
                self.add(kind, f"{inside}graph {kind}", c or "", r or "")
            if c and r and kind == "input":
                self.same[c.value] = r.value
            elif c and r and not self.agree(c.value, r.value):
                self.add(kind, f"{inside}graph output {r.name!r} is", self.ours.describe(c.value), self.theirs.describe(r.value))

    def agree(self, ours: str, theirs: str) -> bool:
        """Whether two references are the same tensor; also where one's producer is a node that the other side lacks: that has a
        line of its own."""
        if _is_weight(ours) and _is_weight(theirs):
            return self.weights(ours, theirs)
        return self.same.get(ours) == theirs or ours in self.ours.unmatched or theirs in self.theirs.unmatched

    def weights(self, ours: str, theirs: str) -> bool:
        """Whether two initializers in equal places may be the same one; the first such place settles it."""
        if ours not in self.same and theirs not in self.used:
            self.same[ours] = theirs
            self.used.add(theirs)
        return self.same.get(ours) == theirs

    def node(self, c: Node, r: Node, inside: str) -> None:
        where = inside + _label(c)
        if (c.stored_name, c.stored_index) != (r.stored_name, r.stored_index):
            where += f" (in the reference {_label(r)})"
        self.attributes(c, r, where)
        wrong = []
        for slot, (a, b) in enumerate(zip_longest(c.inputs, r.inputs, fillvalue="")):
            if self.agree(a, b):
                continue
            if all(_is_weight(ref) or not ref for ref in (a, b)):
                shared = " (shared with another place on one side only)" if a and b else ""
                texts = self.ours.describe(a) if a else "", self.theirs.describe(b) if b else ""
                self.add("initializer", f"{where} input {slot}{shared}", *texts)
            else:
                wrong.append((a, b))
        if wrong:
            ours, theirs = zip(*wrong, strict=True)
            # Initializers that nothing has paired yet are as good as equal here.
            mapped = (self.same.get(a, "w" if _is_weight(a) else "?") for a in ours)
            swapped = sorted(mapped) == sorted("w" if _is_weight(b) and b not in self.used else b for b in theirs)
            reads = (self.ours.describe_all(ours), self.theirs.describe_all(theirs))
            self.add("topology", where + (" reads its inputs in another order" if swapped else " reads"), *reads)
        shown = [[bool(ref) for ref in node.outputs] for node in (c, r)]
        if shown[0] != shown[1]:
            self.add("topology", f"{where} produces", *(f"outputs {[k for k, b in enumerate(s) if b]}" for s in shown))

    def attributes(self, c: Node, r: Node, where: str) -> None:
        by_name = {a.name: a for a in c.attributes}, {a.name: a for a in r.attributes}
        kind: Kind = "constant" if c.op == "Constant" else "attribute"
        if kind == "constant":
            where += f" of {', '.join(self.ours.users(c)) or 'no node'}"
        for name in sorted(by_name[0].keys() | by_name[1].keys()):
            a, b = (side.get(name) for side in by_name)
            if a and b and a.kind == b.kind and a.kind.startswith("graph") and len(a.value) == len(b.value):
                for mine, other in zip(a.value, b.value, strict=True):
                    if isinstance(mine, Graph) and isinstance(other, Graph):
                        self.graph(mine, other, f"{where}, {name}: ")
            elif a != b:
                self.add(kind, f"{where} {name}", _value(a) if a else "", _value(b) if b else "")

    def unused(self) -> None:
        """Compare the initializers that no node of the graph reads; a dead node's are among them."""
        counts = [
            Counter((w.tensor, w.overridable) for w in side.weights.values() if w.name not in side.readers)
            for side in (self.ours, self.theirs)
        ]
        for (tensor, _), number in (counts[0] - counts[1]).items():
            self.add("initializer", "used by no output", f"{number} x {tensor}", "")
        for (tensor, _), number in (counts[1] - counts[0]).items():
            self.add("initializer", "used by no output", "", f"{number} x {tensor}")

    def constants(self) -> None:
        """Compare the initializers in equal places. Where their numbers shifted, `weights` blanked others than intended: there
        only those are judged that can't be weights."""
        ours, theirs = self.ours.weights, self.theirs.weights
        pairs = [(ours[c], theirs[r]) for c, r in self.same.items() if c in ours and r in theirs]
        shifted = any(c.name != r.name for c, r in pairs) or len(ours) != len(theirs)
        for c, r in pairs:
            names = f"{c.stored_name!r}" + (f" ({r.stored_name!r})" if r.stored_name != c.stored_name else "")
            readers = self.ours.readers.get(c.name) or ["no node"]
            where = f"initializer {names} of {', '.join(readers[:3])}"
            if (c.tensor.dtype, c.tensor.dims) != (r.tensor.dtype, r.tensor.dims):
                self.add("initializer", where, c.tensor, r.tensor)
            elif c.overridable != r.overridable:
                texts = ["also a graph input" if w.overridable else "not a graph input" for w in (c, r)]
                self.add("initializer", where, *texts)
            elif c.tensor != r.tensor and not (shifted and c.tensor.blankable):
                self.add("constant", where, *(f"{w.tensor}" + _blank(w.tensor) for w in (c, r)))


def _align(
    ours: Sequence[Node],
    theirs: Sequence[Node],
    sign_ours: Callable[[Node], Hashable],
    sign_theirs: Callable[[Node], Hashable],
) -> list[Pair]:
    """Pair nodes of equal signature, then in what is left between those nodes of the same operator, then those in the same
    place. A node without partner is paired with None."""
    pairs: list[Pair] = []
    for a, b, equal in _blocks([sign_ours(n) for n in ours], [sign_theirs(n) for n in theirs]):
        if equal:
            pairs += zip(ours[a], theirs[b], strict=True)
            continue
        mine, other = ours[a], theirs[b]
        for c, d, _ in _blocks([n.op for n in mine], [n.op for n in other]):
            pairs += zip_longest(mine[c], other[d])
    return pairs


def _blocks(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> Iterator[tuple[slice, slice, bool]]:
    """Slices that are equal on both sides, and those between them. The common ends go first: SequenceMatcher looks for
    the longest match, which in a run of equal layers may be one that is shifted by a layer."""
    short = min(len(ours), len(theirs))
    head = next((k for k in range(short) if ours[k] != theirs[k]), short)
    tail = next((k for k in range(short - head) if ours[-1 - k] != theirs[-1 - k]), short - head)
    mine, other = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    yield slice(0, head), slice(0, head), True
    for tag, a, b, c, d in SequenceMatcher(None, mine, other, autojunk=False).get_opcodes():
        yield slice(head + a, head + b), slice(head + c, head + d), tag == "equal"
    yield slice(len(ours) - tail, len(ours)), slice(len(theirs) - tail, len(theirs)), True


def _label(node: Node) -> str:
    name = node.stored_name or next(iter(node.stored_outputs), "")
    return f"{node.op} #{node.stored_index} {name!r}"


def _value(attribute: Attribute) -> str:
    if isinstance(attribute.value, str):
        return attribute.value
    return ", ".join("a subgraph" if isinstance(v, Graph) else str(v) for v in attribute.value)


def _blank(tensor: Tensor) -> str:
    return " (taken for a weight)" if tensor.digest is None else ""


def _is_weight(ref: str) -> bool:
    return ref.startswith("w")
