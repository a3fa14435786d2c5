"""Rules under which two ONNX files that are written in different ways are the same graph.

Each rule rewrites a model in place into one way of writing it and returns how often it applied. None changes what the model
computes, to the bit: sums of more than two terms are not reordered, and no float is computed anew. Two files are *equal but for
spelling* where their canonical forms are equal after all rules.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import InferenceError, infer_shapes

from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.structure import FLOATING, Canonical

Rule = Callable[[ModelProto], int]
DEFAULT_DOMAIN = ("", "ai.onnx")
COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
SPATIAL = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "FusedConv"}
NEUTRAL = {
    "dilations": 1,
    "strides": 1,
    "pads": 0,
    "output_padding": 0,
}  # of SPATIAL, where the schema has no default value
# Of whole numbers and shapes, exact on any machine.
FOLDABLE = {
    "Abs", "Add", "And", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Greater", "Less", "Max", "Min",
    "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Transpose",
    "Unsqueeze", "Where",
}  # fmt: skip
LARGEST_FOLDED = 1024  # numbers of a constant that is computed


def respelled(model: ModelProto, without: Collection[str] = ()) -> tuple[Canonical, dict[str, int]]:
    """The canonical form of a model after all rules (but those named), with all weights blanked, and how often each applied. The
    model itself stays as it is.

    Raises FgvcError as `canonicalise` does.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    applied: Counter[str] = Counter()
    while True:
        counts = {name: rule(copy) for name, rule in RULES.items() if name not in without}
        applied.update(counts)
        if not any(counts.values()):
            return canonicalise(copy, weights=None), {name: count for name, count in applied.items() if count}


def spelling_differences(candidate: ModelProto, reference: ModelProto) -> dict[str, tuple[int, int]] | None:
    """The rules that make two models equal, and how often each applied to the one and to the other; None where they differ in
    more than spelling. Empty: they are identical.

    A rule is named where without it they would not be equal.
    """
    if canonicalise(candidate, weights=None).sha256 == canonicalise(reference, weights=None).sha256:
        return {}
    (ours, applied), (theirs, applied_to_reference) = respelled(candidate), respelled(reference)
    if ours.sha256 != theirs.sha256:
        return None
    counts = {name: (applied.get(name, 0), applied_to_reference.get(name, 0)) for name in RULES}
    spared: list[str] = [name for name, pair in counts.items() if pair == (0, 0)]
    for name in sorted(counts.keys() - spared, key=lambda name: sum(counts[name])):
        if len({respelled(model, [*spared, name])[0].sha256 for model in (candidate, reference)}) == 1:
            spared.append(name)
    return {name: pair for name, pair in counts.items() if name not in spared}


# --- the rules -----------------------------------------------------------------------------------------------------------


def inline_functions(model: ModelProto) -> int:
    """Put the bodies of the file's own functions where they are called."""
    if count := len(model.functions):
        model.CopyFrom(inline_local_functions(model))
    return count


def drop_unused_opsets(model: ModelProto) -> int:
    """Drop imports of operator sets from which no node is."""
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    used = {
        _domain(node.domain) for node in (*nodes, *(node for function in model.functions for node in function.node))
    }
    return _keep(model.opset_import, [_domain(entry.domain) in used | {""} for entry in model.opset_import])


def constants_to_initializers(model: ModelProto) -> int:
    """Store what Constant nodes hold as initializers."""
    count = 0
    for graph in _graphs(model.graph):
        outputs = {port.name for port in graph.output}
        tensors = [_constant(node) if not outputs & set(node.output) else None for node in graph.node]
        graph.initializer.extend(tensor for tensor in tensors if tensor is not None)
        count += _keep(graph.node, [tensor is None for tensor in tensors])
    return count


def drop_identities(model: ModelProto) -> int:
    """Let what reads an Identity read its input. One that makes an output of the graph goes where a node makes its input."""
    count = 0
    for graph in _graphs(model.graph):
        ports = {port.name for port in (*graph.output, *graph.input)}
        made = {name for node in graph.node for name in node.output}
        names: dict[str, str] = {}
        kept = []
        for node in graph.node:
            kept.append(True)
            if node.op_type != "Identity" or _domain(node.domain):
                continue
            source, target = node.input[0], node.output[0]
            if target not in ports:
                names[target] = source
            elif source in made and not {source} & (ports | names.keys() | set(names.values())):
                names[source] = target  # the node behind it makes the output itself
            else:
                continue
            kept[-1] = False
        count += _keep(graph.node, kept)
        _rename(graph, names)
    return count


def drop_default_attributes(model: ModelProto) -> int:
    """Drop attributes that say what holds without them."""
    versions = {_domain(entry.domain): entry.version for entry in model.opset_import}
    dropped = 0
    for graph in _graphs(model.graph):
        kernels = {tensor.name: list(tensor.dims[2:]) for tensor in graph.initializer}
        for node in graph.node:
            defaults = _defaults(node, versions)
            dropped += _keep(
                node.attribute,
                [not (_equals(a, defaults.get(a.name)) or _is_neutral(node, a, kernels)) for a in node.attribute],
            )
    return dropped


def fold_shape_arithmetic(model: ModelProto) -> int:
    """Compute what depends on constants and known shapes alone, where it is of whole numbers or truth values."""
    graph = model.graph
    if not any(node.op_type in FOLDABLE for node in graph.node):
        return 0
    dead = _unread(graph)
    shapes, made = _shapes(model), {name: node for node in graph.node for name in node.output}
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not _is_float(t) and _is_small(t)}
    outputs = {port.name for port in graph.output}
    kept = []
    for node in graph.node:
        result = None
        if (
            node.op_type in FOLDABLE
            and not _domain(node.domain)
            and len(node.output) == 1
            and node.output[0] not in outputs
        ):
            result = _computed(node, constants, shapes, made, model.opset_import)
        kept.append(result is None)
        if result is not None:
            constants[node.output[0]] = result
            graph.initializer.append(numpy_helper.from_array(result, node.output[0]))
    if count := _keep(graph.node, kept):
        while unread := _unread(graph) - dead:  # what only the folded ones read
            _keep(graph.node, [not unread & set(node.output) for node in graph.node])
            _keep(graph.initializer, [tensor.name not in unread for tensor in graph.initializer])
    return count


def merge_equal_constants(model: ModelProto) -> int:
    """Store equal constants that are no weights once: whole numbers, truth values, and single floats."""
    graph = model.graph
    inputs = {port.name for port in graph.input}
    by_content: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in inputs and not (_is_float(tensor) and tensor.dims):
            content = tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
            if (first := by_content.setdefault(content, tensor.name)) != tensor.name:
                names[tensor.name] = first
    _rename(graph, names)
    return _keep(graph.initializer, [tensor.name not in names for tensor in graph.initializer])


def order_commutative_inputs(model: ModelProto) -> int:
    """Order the two inputs of an operator for which their order does not matter, by what is behind them."""
    graph = model.graph
    marks = {port.name: f"input {k}" for k, port in enumerate(graph.input)}
    for tensor in graph.initializer:
        blank = _is_float(tensor) and bool(tensor.dims)
        payload = b"" if blank else numpy_helper.to_array(tensor).tobytes()
        marks[tensor.name] = _mark("stored", str(tensor.data_type), str(list(tensor.dims)), payload.hex())
    count = 0
    for node in graph.node:
        behind = [marks.get(name, "") for name in node.input]
        if node.op_type in COMMUTATIVE and not _domain(node.domain) and len(behind) == 2 and behind[1] < behind[0]:
            node.input[:] = [node.input[1], node.input[0]]
            behind.reverse()
            count += 1
        attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
        whole = _mark(node.domain, node.op_type, *attributes, *behind)
        marks |= {name: f"{whole} {k}" for k, name in enumerate(node.output)}
    return count


COMMUTATIVE_RULE = "order of commutative inputs"
RULES: Mapping[str, Rule] = {
    "the file's own functions": inline_functions,
    "Constant nodes": constants_to_initializers,
    "Identity nodes": drop_identities,
    "default attributes": drop_default_attributes,
    "shape arithmetic": fold_shape_arithmetic,
    "equal constants": merge_equal_constants,
    "unused operator sets": drop_unused_opsets,
    COMMUTATIVE_RULE: order_commutative_inputs,
}


# --- what they share -----------------------------------------------------------------------------------------------------


def _domain(name: str) -> str:
    """A domain's one name: the default domain has two."""
    return "" if name in DEFAULT_DOMAIN else name


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and those inside of its nodes."""
    yield graph
    for inner in _inner(graph):
        yield from _graphs(inner)


def _inner(graph: GraphProto) -> Iterator[GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else []))


def _keep(field: Any, kept: Sequence[bool]) -> int:
    """Remove the other elements of a repeated field, in place: copies of weights would be large. Returns how many went."""
    for at in reversed(range(len(kept))):
        if not kept[at]:
            del field[at]
    return len(kept) - sum(kept)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
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
        _rename(inner, {old: name for old, name in names.items() if old not in own})
        for port in inner.output:
            port.name = port.name if port.name in own else new(port.name)


def _unread(graph: GraphProto) -> set[str]:
    """Values and initializers that nothing reads."""
    read = {port.name for port in graph.output}
    for inside in _graphs(graph):
        read |= {name for node in inside.node for name in node.input} | {port.name for port in inside.output}
    made = {name for node in graph.node for name in node.output if name}
    made = {name for node in graph.node for name in node.output if not read & set(node.output)} & made
    return made | {tensor.name for tensor in graph.initializer if tensor.name not in read}


def _is_float(tensor: TensorProto) -> bool:
    return TensorProto.DataType.Name(tensor.data_type).lower() in FLOATING


def _is_small(tensor: TensorProto) -> bool:
    return math.prod(tensor.dims) <= LARGEST_FOLDED and tensor.data_type != TensorProto.STRING


def _mark(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _constant(node: NodeProto) -> TensorProto | None:
    """What a Constant node holds, named as its output; None for other nodes and for what is no plain tensor."""
    if node.op_type != "Constant" or _domain(node.domain) or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    value: Any = helper.get_attribute_value(attribute)
    tensor = TensorProto()
    if attribute.name == "value":
        tensor.CopyFrom(value)
    elif attribute.name in ("value_float", "value_floats"):
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype=np.float32)))
    elif attribute.name in ("value_int", "value_ints"):
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype=np.int64)))
    else:
        return None
    tensor.name = node.output[0]
    return tensor


def _defaults(node: NodeProto, versions: Mapping[str, int]) -> dict[str, AttributeProto]:
    """The operator's attributes that have a default value, as its specification says."""
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(_domain(node.domain), 1), _domain(node.domain))
    except onnx.defs.SchemaError:
        return {}
    return {name: entry.default_value for name, entry in schema.attributes.items() if entry.default_value.type}


def _equals(attribute: AttributeProto, default: AttributeProto | None) -> bool:
    if default is None or attribute.ref_attr_name or attribute.type != default.type:
        return False
    return bool(helper.get_attribute_value(attribute) == helper.get_attribute_value(default))


def _is_neutral(node: NodeProto, attribute: AttributeProto, kernels: Mapping[str, list[int]]) -> bool:
    """Whether it is a list that a convolution or pooling does not need: its specification states no value for it, but says it."""
    if node.op_type not in SPATIAL or attribute.type != AttributeProto.INTS:
        return False
    values = list(attribute.ints)
    if attribute.name == "kernel_shape":
        return "Conv" in node.op_type and kernels.get(node.input[1]) == values
    neutral = NEUTRAL.get(attribute.name)
    return neutral is not None and all(value == neutral for value in values)


def _shapes(model: ModelProto) -> dict[str, list[int | None]]:
    """Shapes of values, as far as they follow from the inputs'; None where an axis is open."""
    try:
        graph = infer_shapes(model).graph
    except (InferenceError, RuntimeError, ValueError):
        graph = model.graph
    shapes: dict[str, list[int | None]] = {t.name: list(t.dims) for t in graph.initializer}
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.HasField("shape"):
            dims = port.type.tensor_type.shape.dim
            shapes[port.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return shapes


def _computed(
    node: NodeProto,
    constants: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, list[int | None]],
    made: Mapping[str, NodeProto],
    opset: Sequence[onnx.OperatorSetIdProto],
) -> NDArray[Any] | None:
    """The value of a node; None where it is not known, of floats, or large."""
    if node.op_type in ("Shape", "Size"):
        dims = _dims(node, shapes)
        if dims is None or None in dims:
            return None
        whole = np.array(dims, dtype=np.int64)
        return whole if node.op_type == "Shape" else np.array(whole.prod(), dtype=np.int64)
    names = [name for name in node.input if name]
    behind = made.get(names[0]) if names else None
    if (
        node.op_type in ("Gather", "Slice")
        and behind is not None
        and behind.op_type == "Shape"
        and names[0] not in constants
    ):
        # Of a shape with open axes, the others. An open axis that is taken out shows as a number that no shape has.
        dims = _dims(behind, shapes)
        if dims is None or any(name not in constants for name in names[1:]):
            return None
        result = _run(node, {names[0]: np.array([-(2**40) if d is None else d for d in dims])} | dict(constants), opset)
        return None if result is None or (result < 0).any() else result
    if not names or any(name not in constants for name in names):
        return None
    if node.op_type in ("Div", "Mod") and any((constants[name] < 0).any() for name in names):
        return None  # programs round them in two ways
    return _run(node, constants, opset)


def _dims(node: NodeProto, shapes: Mapping[str, list[int | None]]) -> list[int | None] | None:
    """The shape that a Shape node gives, cut by its start and end."""
    if (shape := shapes.get(node.input[0])) is None:
        return None
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    return shape[slice(ends.get("start"), ends.get("end"))]


def _run(
    node: NodeProto, constants: Mapping[str, NDArray[Any]], opset: Sequence[onnx.OperatorSetIdProto]
) -> NDArray[Any] | None:
    tensors = [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name]
    graph = helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=node.output[0])], tensors)
    try:
        (result,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=list(opset))).run(None, {})
    except Exception:  # the evaluator has errors of all kinds for what it can't do: the node stays
        return None
    result = np.asarray(result)
    return result if result.dtype.kind in "iub" and result.size <= LARGEST_FOLDED else None
