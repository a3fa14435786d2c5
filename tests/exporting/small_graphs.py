"""Small graphs of one network, written by hand and by both exporters, and everything that may be done to a graph."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn


def tensor(name: str, values: object, dtype: type = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def model(nodes: list[NodeProto], inputs: list, outputs: list, initializers: list[TensorProto]) -> ModelProto:
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def port(name: str, dims: list, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)


def by_hand(draw: int) -> ModelProto:
    """Constants of either kind: the first Clip's bounds and the axes are initializers, the pads and the second
    Clip's bounds are Constant nodes. Checked by onnx's own checker."""
    rng = np.random.default_rng(draw)
    weights = {"c1.w": (4, 3, 3, 3), "c1.b": (4,), "c2.w": (4, 4, 3, 3), "fc.w": (5, 4), "fc.b": (5,)}
    initializers = [tensor(name, rng.standard_normal(shape)) for name, shape in weights.items()]
    initializers += [tensor("low", 0.0), tensor("high", 6.0), tensor("axes", [2, 3], np.int64)]
    nodes = [
        helper.make_node("Conv", ["input", "c1.w", "c1.b"], ["a"], "conv1", pads=[1, 1, 1, 1], strides=[1, 1]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"], "clip1"),
        helper.make_node("Conv", ["b", "c2.w"], ["c"], "conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Sub", ["b", "c"], ["d"], "sub"),
        helper.make_node("Constant", [], ["k0"], "k0", value=tensor("", 0.0)),
        helper.make_node("Constant", [], ["k6"], "k6", value=tensor("", 3.0)),
        helper.make_node("Clip", ["d", "k0", "k6"], ["e"], "clip2"),
        helper.make_node("Constant", [], ["pads"], "pads", value=tensor("", [0, 0, 0, 0, 0, 0, 1, 1], np.int64)),
        helper.make_node("Pad", ["e", "pads", "low"], ["f"], "pad", mode="constant"),
        helper.make_node("ReduceMean", ["f", "axes"], ["g"], "mean", keepdims=0),
        helper.make_node("Gemm", ["g", "fc.w", "fc.b"], ["logits"], "fc", transB=1),
    ]
    proto = model(nodes, [port("input", ["batch", 3, 8, 8])], [port("logits", ["batch", 5])], initializers)
    onnx.checker.check_model(proto, full_check=True)
    return proto


class Net(nn.Module):
    """The network of `by_hand`, with two batch norms for the exporters to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.act, self.act2, self.pad = nn.ReLU6(), nn.Hardtanh(0.0, 3.0), nn.ConstantPad2d((0, 1, 0, 1), 0.0)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.b1(self.c1(x)))
        x = self.act2(x - self.b2(self.c2(x)))
        return self.fc(self.pad(x).mean((2, 3)))


def net(draw: int) -> Net:
    """No two weights equal and none zero."""
    rng, network = torch.Generator().manual_seed(draw), Net().eval()
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
    return network


def export(module: nn.Module, *, dynamo: bool, size: int = 8) -> ModelProto:
    x, file = torch.zeros(2, 3, size, size), io.BytesIO()
    names = {"input_names": ["input"], "output_names": ["logits"], "opset_version": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
            return program.model_proto
        dynamic = {"input": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(module, (x,), file, dynamo=False, dynamic_axes=dynamic, **names)
    return onnx.load_from_string(file.getvalue())


SOURCES = ("hand", "dynamo", "torchscript")


@functools.cache
def _stored(source: str, draw: int) -> bytes:
    proto = by_hand(draw) if source == "hand" else export(net(draw), dynamo=source == "dynamo")
    return proto.SerializeToString()


def graph_of(source: str, draw: int = 0) -> ModelProto:
    return onnx.load_from_string(_stored(source, draw))


def first(m: ModelProto, op: str) -> NodeProto:
    return next(n for n in m.graph.node if n.op_type == op)


def holder(m: ModelProto, name: str) -> TensorProto:
    """Where a constant lives: an initializer or the attribute of a Constant node, upstream of `name` if need be."""
    for stored in m.graph.initializer:
        if stored.name == name:
            return stored
    maker = next(n for n in m.graph.node if name in n.output)
    if maker.op_type == "Constant":
        return maker.attribute[0].t
    return next(t for t in (holder(m, x) for x in maker.input if x) if t.dims and t.dims[0] > 1)


def set_values(stored: TensorProto, values: object, dtype: type | None = None) -> None:
    name, old = stored.name, numpy_helper.to_array(stored)
    stored.CopyFrom(numpy_helper.from_array(np.asarray(values, dtype or old.dtype), name))


def constant(op: str, slot: int, change: Callable[[np.ndarray], object], nth: int = 0) -> Callable[[ModelProto], None]:
    def mutate(m: ModelProto) -> None:
        node = [n for n in m.graph.node if n.op_type == op][nth]
        stored = holder(m, node.input[slot])
        set_values(stored, change(numpy_helper.to_array(stored).copy()))

    return mutate


def insert_live(m: ModelProto) -> None:
    gemm = first(m, "Gemm")
    position = list(m.graph.node).index(gemm)
    new = helper.make_node("Relu", [gemm.input[0]], ["leak"], "leaked")
    gemm.input[0] = "leak"
    m.graph.node.insert(position, new)


def insert_dead(m: ModelProto) -> None:
    m.graph.node.append(helper.make_node("Neg", [first(m, "Sub").output[0]], ["unread"], "leaked"))


def remove_clip(m: ModelProto) -> None:
    clip = first(m, "Clip")
    for node in m.graph.node:
        for k, name in enumerate(node.input):
            if name == clip.output[0]:
                node.input[k] = clip.input[0]
    m.graph.node.remove(clip)


def attribute(op: str, name: str, value: object) -> Callable[[ModelProto], None]:
    def mutate(m: ModelProto) -> None:
        node = first(m, op)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, *([] if value is None else [helper.make_attribute(name, value)])])

    return mutate


def rename_output(m: ModelProto) -> None:
    for node in m.graph.node:
        for k, name in enumerate(node.output):
            if name == "logits":
                node.output[k] = "scores"
    m.graph.output[0].name = "scores"


def rename_input(m: ModelProto) -> None:
    for node in m.graph.node:
        for k, name in enumerate(node.input):
            if name == "input":
                node.input[k] = "pixels"
    m.graph.input[0].name = "pixels"


def swap_inputs(m: ModelProto) -> None:
    node = first(m, "Sub")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def rewire(m: ModelProto) -> None:
    """The second convolution reads what comes before the activation instead of what comes after it."""
    convs = [n for n in m.graph.node if n.op_type == "Conv"]
    convs[1].input[0] = convs[0].output[0]


def rewire_away(m: ModelProto) -> None:
    """One branch is no longer read by anybody."""
    node = first(m, "Sub")
    node.input[1] = node.input[0]


def freeze_batch(m: ModelProto) -> None:
    for side in (m.graph.input, m.graph.output):
        side[0].type.tensor_type.shape.dim[0].dim_value = 1


def split_batch(m: ModelProto) -> None:
    m.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "other"


def more_classes(m: ModelProto) -> None:
    m.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6


def extra_output(m: ModelProto) -> None:
    m.graph.output.append(port(first(m, "Sub").output[0], ["batch", 4, 8, 8]))


def redirect_output(m: ModelProto) -> None:
    gemm = first(m, "Gemm")
    gemm.output[0] = "unread"
    next(n for n in m.graph.node if n.op_type == "ReduceMean").output[0] = "logits"
    gemm.input[0] = "logits"


def duplicate_initializer(m: ModelProto) -> None:
    """The last reader of a shared constant gets one of its own; where none is shared, a second copy lies unread."""
    stored = {t.name: t for t in m.graph.initializer}
    readers = [(node, k) for node in m.graph.node for k, name in enumerate(node.input) if name in stored]
    names = [node.input[k] for node, k in readers]
    shared = [(node, k) for node, k in readers if names.count(node.input[k]) > 1]
    twin = m.graph.initializer.add()
    twin.CopyFrom(stored[shared[-1][0].input[shared[-1][1]]] if shared else m.graph.initializer[0])
    twin.name = "twin"
    if shared:
        shared[-1][0].input[shared[-1][1]] = "twin"


def unused_initializer(m: ModelProto) -> None:
    m.graph.initializer.append(tensor("leaked", [1.0, 2.0, 3.0]))


def remove_bias(m: ModelProto) -> None:
    gemm = first(m, "Gemm")
    bias = gemm.input.pop()
    m.graph.initializer.remove(next(t for t in m.graph.initializer if t.name == bias))


def weight(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto], None]:
    def mutate(m: ModelProto) -> None:
        stored = holder(m, first(m, "Gemm").input[1])
        name, values = stored.name, change(numpy_helper.to_array(stored))
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))

    return mutate


def replace_operator(m: ModelProto) -> None:
    first(m, "Sub").op_type = "Add"


def foreign_operator(m: ModelProto) -> None:
    first(m, "Sub").domain = "org.example"


def opset(m: ModelProto) -> None:
    m.opset_import[0].version = 19


def second_opset(m: ModelProto) -> None:
    m.opset_import.append(helper.make_opsetid("org.example", 1))


def ir_version(m: ModelProto) -> None:
    m.ir_version = 8


def input_dtype(m: ModelProto) -> None:
    m.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def output_dtype(m: ModelProto) -> None:
    m.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def input_size(m: ModelProto) -> None:
    m.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16


def add_function(m: ModelProto) -> None:
    node = helper.make_node("Neg", ["x"], ["y"])
    m.functions.append(helper.make_function("org.example", "Leak", ["x"], ["y"], [node], m.opset_import[:1]))


def axes_dtype(m: ModelProto) -> None:
    set_values(holder(m, first(m, "ReduceMean").input[1]), [2, 3], np.int32)


# name -> (what to do, kind, what the account of it must mention)
MUTANTS: dict[str, tuple[Callable[[ModelProto], None], str, str]] = {
    "extra live node": (insert_live, "node", "leaked"),
    "extra dead node": (insert_dead, "node", "leaked"),
    "removed node": (remove_clip, "node", "missing node"),
    "other operator": (replace_operator, "node", "Add"),
    "other domain": (foreign_operator, "node", "org.example::Sub"),
    "changed attribute": (attribute("Conv", "pads", [0, 0, 1, 1]), "attribute", "[0, 0, 1, 1]"),
    "changed float attribute": (attribute("Gemm", "alpha", 1.5), "attribute", "1.5"),
    "changed string attribute": (attribute("Pad", "mode", "edge"), "attribute", "'edge'"),
    "removed attribute": (attribute("Gemm", "transB", None), "attribute", "transB"),
    "Clip bound": (constant("Clip", 2, lambda v: 4.0), "constant", "4.0"),
    "second Clip's bound": (constant("Clip", 2, lambda v: 2.5, nth=1), "constant", "2.5"),
    "Clip bound by one unit": (constant("Clip", 2, lambda v: np.nextafter(v, v + 1)), "constant", "6.000000476"),
    "reduce axis": (constant("ReduceMean", 1, lambda v: [1, 3]), "constant", "[1, 3]"),
    "dtype of a constant": (axes_dtype, "", "int32"),
    "pad vector": (constant("Pad", 1, lambda v: v[::-1]), "constant", "1"),
    "renamed output": (rename_output, "output", "scores"),
    "renamed input": (rename_input, "input", "pixels"),
    "other opset": (opset, "opset", "19"),
    "second opset": (second_opset, "opset", "org.example"),
    "other IR version": (ir_version, "ir", "8"),
    "dtype of a weight": (weight(lambda v: v.astype(np.float16)), "initializer", "float16"),
    "shape of a weight": (weight(lambda v: v.T), "initializer", "float[4,5]"),
    "rank of a weight": (weight(lambda v: v.ravel()), "initializer", "float[20]"),
    "dtype of the input": (input_dtype, "input", "double"),
    "dtype of the output": (output_dtype, "output", "float16"),
    "size of the input": (input_size, "input", "16"),
    "number of classes": (more_classes, "output", "6"),
    "swapped inputs": (swap_inputs, "topology", "another order"),
    "rewired edge": (rewire, "topology", "Conv"),
    "rewired away": (rewire_away, "topology", "Sub"),
    "frozen batch axis": (freeze_batch, "input", "float[1,3,8,8]"),
    "axes no longer equal": (split_batch, "output", "?1"),
    "extra output": (extra_output, "output", "float"),
    "redirected output": (redirect_output, "output", "ReduceMean"),
    "duplicated initializer": (duplicate_initializer, "initializer", "float"),
    "unused initializer": (unused_initializer, "initializer", "float[3]"),
    "removed initializer": (remove_bias, "initializer", "float[5]"),
    "extra function": (add_function, "function", "Leak"),
}
