"""Rules that write an ONNX graph in one of several ways that mean the same.

Each rewrites a model in place and returns how often it applied. None changes what the model computes, to the bit: sums of more
than two terms are not reordered, and no float is computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.inliner import inline_local_functions

from fgvc.exporting.edits import domain_of, graphs_in, is_float, keep, rename
from fgvc.exporting.shape_arithmetic import fold_shape_arithmetic

Rule = Callable[[ModelProto], int]
COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
SPATIAL = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "FusedConv"}
NEUTRAL = {"dilations": 1, "strides": 1, "pads": 0, "output_padding": 0}  # of SPATIAL, whose schema has no default value


def inline_functions(model: ModelProto) -> int:
    """Put the bodies of the file's own functions where they are called."""
    if count := len(model.functions):
        model.CopyFrom(inline_local_functions(model))
    return count


def drop_unused_opsets(model: ModelProto) -> int:
    """Drop imports of operator sets from which no node is."""
    nodes = [node for graph in graphs_in(model.graph) for node in graph.node]
    used = {
        domain_of(node.domain) for node in (*nodes, *(node for function in model.functions for node in function.node))
    }
    return keep(model.opset_import, [domain_of(entry.domain) in used | {""} for entry in model.opset_import])


def constants_to_initializers(model: ModelProto) -> int:
    """Move the tensors of Constant nodes to initializers."""
    count = 0
    for graph in graphs_in(model.graph):
        outputs = {port.name for port in graph.output}
        tensors = [_constant(node) if not outputs & set(node.output) else None for node in graph.node]
        graph.initializer.extend(tensor for tensor in tensors if tensor is not None)
        count += keep(graph.node, [tensor is None for tensor in tensors])
    return count


def drop_identities(model: ModelProto) -> int:
    """Remove Identity nodes: their readers read their input. One whose output is the graph's gives its name to the node before
    it."""
    count = 0
    for graph in graphs_in(model.graph):
        ports = {port.name for port in (*graph.output, *graph.input)}
        made = {name for node in graph.node for name in node.output}
        names: dict[str, str] = {}
        kept = []
        for node in graph.node:
            kept.append(True)
            if node.op_type != "Identity" or domain_of(node.domain):
                continue
            source, target = node.input[0], node.output[0]
            if target not in ports:
                names[target] = source
            elif source in made and not {source} & (ports | names.keys() | set(names.values())):
                names[source] = target  # the node behind it makes the output itself
            else:
                continue
            kept[-1] = False
        count += keep(graph.node, kept)
        rename(graph, names)
    return count


def drop_default_attributes(model: ModelProto) -> int:
    """Drop attributes that have their default value, and those without effect."""
    versions = {domain_of(entry.domain): entry.version for entry in model.opset_import}
    dropped = 0
    for graph in graphs_in(model.graph):
        kernels = {tensor.name: list(tensor.dims[2:]) for tensor in graph.initializer}
        for node in graph.node:
            defaults = _defaults(node, versions)
            dropped += keep(
                node.attribute,
                [not (_equals(a, defaults.get(a.name)) or _is_neutral(node, a, kernels)) for a in node.attribute],
            )
    return dropped


def merge_equal_constants(model: ModelProto) -> int:
    """Store equal constants that are no weights once: whole numbers, truth values, and single floats."""
    graph = model.graph
    inputs = {port.name for port in graph.input}
    by_content: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name not in inputs and not (is_float(tensor) and tensor.dims):
            content = tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
            if (first := by_content.setdefault(content, tensor.name)) != tensor.name:
                names[tensor.name] = first
    rename(graph, names)
    return keep(graph.initializer, [tensor.name not in names for tensor in graph.initializer])


def order_commutative_inputs(model: ModelProto) -> int:
    """Sort the two inputs of a commutative operator by the subgraphs that compute them."""
    graph = model.graph
    marks = {port.name: f"input {k}" for k, port in enumerate(graph.input)}
    for tensor in graph.initializer:
        blank = is_float(tensor) and bool(tensor.dims)
        payload = b"" if blank else numpy_helper.to_array(tensor).tobytes()
        marks[tensor.name] = _mark("stored", str(tensor.data_type), str(list(tensor.dims)), payload.hex())
    count = 0
    for node in graph.node:
        behind = [marks.get(name, "") for name in node.input]
        if node.op_type in COMMUTATIVE and not domain_of(node.domain) and len(behind) == 2 and behind[1] < behind[0]:
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
    COMMUTATIVE_RULE: order_commutative_inputs,  # the last: it orders by what is behind the inputs
}


def _mark(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _constant(node: NodeProto) -> TensorProto | None:
    """What a Constant node holds, named as its output; None for other nodes and for what is no plain tensor."""
    if node.op_type != "Constant" or domain_of(node.domain) or len(node.attribute) != 1:
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
        schema = onnx.defs.get_schema(node.op_type, versions.get(domain_of(node.domain), 1), domain_of(node.domain))
    except onnx.defs.SchemaError:
        return {}
    return {name: entry.default_value for name, entry in schema.attributes.items() if entry.default_value.type}


def _equals(attribute: AttributeProto, default: AttributeProto | None) -> bool:
    if default is None or attribute.ref_attr_name or attribute.type != default.type:
        return False
    return bool(helper.get_attribute_value(attribute) == helper.get_attribute_value(default))


def _is_neutral(node: NodeProto, attribute: AttributeProto, kernels: Mapping[str, list[int]]) -> bool:
    """Whether an attribute without a default in the specification has the value that has no effect: unit strides, no padding and
    the like of a convolution or pooling."""
    if node.op_type not in SPATIAL or attribute.type != AttributeProto.INTS:
        return False
    values = list(attribute.ints)
    if attribute.name == "kernel_shape":
        return "Conv" in node.op_type and kernels.get(node.input[1]) == values
    neutral = NEUTRAL.get(attribute.name)
    return neutral is not None and all(value == neutral for value in values)
