"""What the canonical form does not see, and what it refuses. What it does see: test_compare.py."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fgvc.errors import FgvcError
from fgvc.exporting.canonical import canonicalise, shared_initializers, weight_positions
from fgvc.exporting.difference import compare_graphs
from tests.exporting.small_graphs import SOURCES, export, first, graph_of, model, net, port, tensor


def sha(m: ModelProto, weights=None) -> str:
    return canonicalise(m, weights=weights).sha256


def disguise(m: ModelProto, seed: int) -> ModelProto:
    """The same graph under other names, in another order of storage, with other metadata and another encoding."""
    rng = random.Random(seed)
    other = ModelProto()
    other.CopyFrom(m)
    other.producer_name, other.producer_version = "x", str(seed)
    other.doc_string, other.model_version = "words", seed + 1
    other.metadata_props.add(key="k", value="v")
    spelling = rng.choice(["", "ai.onnx"])  # two names of the same domain
    other.opset_import[0].domain = spelling
    graph = other.graph
    graph.name, graph.doc_string = "other", "words"
    keep = {p.name for p in graph.input} | {p.name for p in graph.output} | {""}
    inner = {t.name for t in graph.initializer} | {name for n in graph.node for name in n.output}
    fresh = {name: f"t{k}" for k, name in enumerate(rng.sample(sorted(inner - keep), len(inner - keep)))}
    for stored in graph.initializer:
        stored.name = fresh[stored.name]
        array = numpy_helper.to_array(stored)
        if stored.data_type == TensorProto.FLOAT and rng.random() < 0.5:
            stored.ClearField("raw_data")
            stored.ClearField("float_data")
            stored.float_data.extend(array.ravel().tolist())
        elif stored.data_type == TensorProto.INT64 and rng.random() < 0.5:
            stored.ClearField("raw_data")
            stored.ClearField("int64_data")
            stored.int64_data.extend(array.ravel().tolist())
    for node in graph.node:
        node.name, node.doc_string = f"n{rng.random()}", "words"
        node.domain = node.domain or spelling
        node.metadata_props.add(key="k", value="v")
        for names in (node.input, node.output):
            names[:] = [fresh.get(name, name) for name in names]
        attributes = list(node.attribute)
        rng.shuffle(attributes)
        del node.attribute[:]
        node.attribute.extend(attributes)
    del graph.value_info[:]
    initializers = list(graph.initializer)
    rng.shuffle(initializers)
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    shuffle_nodes(other, rng)
    for side in (graph.input, graph.output):
        for one in side:
            for dim in one.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = f"other_{dim.dim_param}"
    return other


def shuffle_nodes(m: ModelProto, rng: random.Random) -> None:
    """A random order in which every node still follows what it reads."""
    left, ready = list(m.graph.node), {p.name for p in m.graph.input} | {t.name for t in m.graph.initializer} | {""}
    order = []
    while left:
        node = rng.choice([n for n in left if all(name in ready for name in n.input)])
        left.remove(node)
        order.append(node)
        ready.update(node.output)
    del m.graph.node[:]
    m.graph.node.extend(order)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", range(5))
def test_names_order_metadata_and_encoding_do_not_matter(source: str, seed: int) -> None:
    reference = graph_of(source)
    candidate = disguise(reference, seed)
    if candidate.opset_import[0].domain == "":  # onnx's own checker does not know the other spelling
        onnx.checker.check_model(candidate)
    assert candidate.SerializeToString() != reference.SerializeToString()
    for weights in (None, ()):
        assert sha(candidate, weights) == sha(reference, weights)


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_blanked_and_nothing_else(source: str) -> None:
    a, b = graph_of(source, 0), graph_of(source, 1)
    positions = weight_positions(a, b)
    assert sha(a, positions) == sha(b, positions)
    assert sha(a, ()) != sha(b, ())
    form = canonicalise(a, weights=positions)
    names = {w.stored_name for k, w in enumerate(form.initializers) if k in positions}
    shapes = sorted(w.tensor.dims for k, w in enumerate(form.initializers) if k in positions)
    biases = [(4,)] if source == "hand" else [(4,), (4,)]  # by hand the second convolution has none
    assert shapes == sorted([(4, 3, 3, 3), (4, 4, 3, 3), (5, 4), (5,), *biases])
    # All others keep their payload, even if a caller asks for more.
    for weights in (None, range(1000)):
        kept = {w.stored_name for w in canonicalise(a, weights=weights).initializers if w.tensor.digest is not None}
        assert kept == {w.stored_name for w in form.initializers} - names


def test_equal_floats_are_constants_of_the_graph() -> None:
    """A buffer that isn't in the state dict looks like a weight, but both draws have it."""

    def with_buffer(draw: int, scale: float) -> ModelProto:
        m = graph_of("hand", draw)
        gemm = first(m, "Gemm")
        m.graph.node.insert(len(m.graph.node) - 1, helper.make_node("Mul", [gemm.input[0], "buffer"], ["scaled"]))
        gemm.input[0] = "scaled"
        m.graph.initializer.append(tensor("buffer", [scale] * 4))
        return m

    positions = weight_positions(with_buffer(0, 2.0), with_buffer(1, 2.0))
    form = canonicalise(with_buffer(0, 2.0), weights=positions)
    assert [w.stored_name for w in form.initializers if w.tensor.blankable and w.tensor.digest] == ["buffer"]
    assert sha(with_buffer(2, 2.0), positions) == form.sha256
    assert sha(with_buffer(2, 3.0), positions) != form.sha256
    assert sha(with_buffer(2, 3.0), None) == sha(with_buffer(2, 2.0), None)  # file against file can't know


def test_weight_positions_refuses_graphs_that_differ_otherwise() -> None:
    a, b = graph_of("dynamo", 0), graph_of("dynamo", 1)
    stored = next(t for t in b.graph.initializer if not t.dims and numpy_helper.to_array(t) == 6)
    stored.CopyFrom(tensor(stored.name, 5.0))
    with pytest.raises(FgvcError, match="different graphs"):
        weight_positions(a, b)


def test_positions_count_in_the_order_of_use() -> None:
    names = [w.stored_name for w in canonicalise(graph_of("hand"), weights=None).initializers]
    assert names == ["c1.w", "c1.b", "low", "high", "c2.w", "axes", "fc.w", "fc.b"]


def test_dynamic_axes_by_pattern_not_by_name() -> None:
    def with_dims(inputs: list, output: list) -> ModelProto:
        m = graph_of("hand")
        for side, dims in ((m.graph.input, inputs), (m.graph.output, output)):
            side[0].CopyFrom(port(side[0].name, dims))
        return m

    same = [(["n", 3, 8, 8], ["n", 5]), (["batch", 3, 8, 8], ["batch", 5])]
    others = [
        (["n", 3, 8, 8], ["m", 5]),
        (["n", 3, "n", 8], ["n", 5]),
        (["n", 3, "h", 8], ["n", 5]),
        ([1, 3, 8, 8], [1, 5]),
        ([1, 3, 8, 8], ["n", 5]),
        ([None, 3, 8, 8], ["n", 5]),
    ]
    hashes = [sha(with_dims(*dims)) for dims in [*same, *others]]
    assert hashes[0] == hashes[1]
    # An axis without a name is equal to no other: as if it had one of its own.
    assert hashes[-1] == hashes[2]
    assert len(set(hashes)) == len(hashes) - 2
    assert sha(with_dims([None, 3, 8, 8], [None, 5])) == hashes[2]
    scalar, unknown = graph_of("hand"), graph_of("hand")
    scalar.graph.output[0].CopyFrom(port("logits", []))
    unknown.graph.output[0].type.tensor_type.ClearField("shape")
    assert sha(scalar) != sha(unknown)


def test_dead_nodes_and_their_constants_are_seen_in_any_order() -> None:
    def with_dead(order: tuple[int, ...], bound: float) -> ModelProto:
        m = graph_of("hand")
        dead = [
            helper.make_node("Neg", ["a"], ["u"]),
            helper.make_node("Clip", ["u", "bound"], ["v"]),
            helper.make_node("Abs", ["v"], ["w"]),
            helper.make_node("Exp", ["u"], ["x"]),
        ]
        for k in order:
            m.graph.node.append(dead[k])
        m.graph.initializer.append(tensor("bound", bound))
        return m

    hashes = {sha(with_dead(order, 1.0)) for order in itertools.permutations(range(4))}
    assert len(hashes) == 1
    assert {sha(with_dead((0, 1, 2, 3), 2.0)), sha(with_dead((0, 1, 2), 1.0)), sha(graph_of("hand"))}.isdisjoint(hashes)


def test_which_output_of_a_node_is_left_out() -> None:
    """The maximum or its position: the same nodes and the same edges, but for the place of the output."""

    def top(outputs: list[str]) -> ModelProto:
        nodes = [helper.make_node("TopK", ["x", "k"], outputs), helper.make_node("Identity", ["t"], ["y"])]
        return model(nodes, [port("x", [5])], [port("y", [1])], [tensor("k", [1], np.int64)])

    forms = [canonicalise(top(outputs), weights=None) for outputs in (["t", ""], ["", "t"], ["t", "unread"])]
    assert len({form.sha256 for form in forms}) == 3
    for other in forms[1:]:
        assert next(d.kind for d in compare_graphs(other, forms[0])) == "topology"


def test_initializers_that_old_files_list_as_inputs() -> None:
    """Such a weight can be overridden by whoever runs the graph: not the same interface, but not an input either."""
    old, new = graph_of("hand"), graph_of("hand")
    old.graph.input.insert(0, port("fc.b", [5]))
    form = canonicalise(old, weights=None)
    assert [p.name for p in form.graph.inputs] == ["input"]
    (difference,) = compare_graphs(form, canonicalise(new, weights=None))
    assert (difference.kind, difference.candidate) == ("initializer", "also a graph input")


def broken(name: str) -> ModelProto:
    m = graph_of("hand")
    conv = first(m, "Conv")
    if name == "external":
        weight = m.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="weights.bin")
    elif name == "external constant":
        stored = first(m, "Constant").attribute[0].t
        stored.data_location = TensorProto.EXTERNAL
    elif name == "cycle":
        conv.input[0] = "f"
    elif name == "dead cycle":
        m.graph.node.extend([helper.make_node("Neg", ["p"], ["q"]), helper.make_node("Neg", ["q"], ["p"])])
    elif name == "nobody's tensor":
        conv.input[0] = "unknown"
    elif name == "nobody's output":
        m.graph.output[0].name = "unknown"
    elif name == "two producers":
        m.graph.node.append(helper.make_node("Neg", ["a"], ["b"]))
    elif name == "two initializers":
        m.graph.initializer.append(m.graph.initializer[0])
    elif name == "sparse":
        m.graph.sparse_initializer.add().dims.append(1)
    elif name == "quantization annotation":
        m.graph.quantization_annotation.add(tensor_name="a")
    elif name == "training":
        m.training_info.add()
    elif name == "sequence":
        m.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("logits", TensorProto.FLOAT, [1]))
    elif name == "truncated":
        m.graph.initializer[-1].raw_data = b"123"
    return m


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("external", "another file"),
        ("external constant", "another file"),
        ("cycle", "cycle"),
        ("dead cycle", "cycle"),
        ("nobody's tensor", "'unknown' is read but nothing produces it"),
        ("nobody's output", "'unknown' is read but nothing produces it"),
        ("two producers", "'b' is defined twice"),
        ("two initializers", "same name"),
        ("sparse", "sparse_initializer"),
        ("quantization annotation", "quantization_annotation"),
        ("training", "training_info"),
        ("sequence", "not a tensor"),
        ("truncated", "can't be read"),
    ],
)
def test_refusals(name: str, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        canonicalise(broken(name), weights=None)


def test_string_and_half_payloads() -> None:
    """Strings have no fixed bytes, and half-precision floats are stored as integers where they aren't raw."""

    def holding(stored: TensorProto) -> ModelProto:
        node = helper.make_node("Constant", [], ["y"], value=stored)
        return model([node], [], [port("y", list(stored.dims), stored.data_type)], [])

    words = [holding(helper.make_tensor("", TensorProto.STRING, [2], w)) for w in ([b"ab", b"c"], [b"a", b"bc"])]
    assert sha(words[0]) != sha(words[1])
    for kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE):
        typed = helper.make_tensor("", kind, [2], [1.5, -2.0])
        raw = numpy_helper.from_array(numpy_helper.to_array(typed), "")
        assert raw.HasField("raw_data")
        assert not typed.HasField("raw_data")
        assert sha(holding(raw)) == sha(holding(typed))
        assert sha(holding(helper.make_tensor("", kind, [2], [1.5, 2.0]))) != sha(holding(typed))


@pytest.mark.parametrize("dynamo", [True, False])
def test_dead_channels_are_explained(dynamo: bool) -> None:
    """Equal and zero biases: what the exporters do to them is named by the reference's initializers."""
    network = net(0)
    with torch.no_grad():
        for norm in (network.b1, network.b2):
            norm.running_mean.zero_()
            norm.bias.zero_()
        network.fc.bias.zero_()
    reference = canonicalise(graph_of("dynamo" if dynamo else "torchscript"), weights=None)
    candidate = canonicalise(export(network, dynamo=dynamo), weights=None)
    assert candidate.sha256 != reference.sha256
    merged = shared_initializers(candidate, reference)
    biases = {
        w.stored_name: k for k, w in enumerate(reference.initializers) if len(w.tensor.dims) == 1 and w.tensor.blankable
    }
    if dynamo:  # drops every bias that is all zero
        (dropped,) = merged
        assert dropped.candidate is None
        assert dict(zip(dropped.references, dropped.positions, strict=True)) == biases
        assert str(dropped).startswith("dropped: ")
    else:  # merges the two of length 4
        (bias,) = merged
        assert bias.candidate is not None
        assert set(bias.references) == {name for name in biases if name != "fc.bias"}
        assert str(bias).startswith(f"merged into {bias.candidate}: ")
    assert shared_initializers(reference, reference) == []


def test_constants_that_the_reference_shares_too_are_no_ties() -> None:
    """`low` serves a Clip and a Pad in every export by hand."""
    form = canonicalise(graph_of("hand"), weights=None)
    assert shared_initializers(form, canonicalise(graph_of("hand", 1), weights=None)) == []


# --- random graphs -----------------------------------------------------------------------------------------------

OPERATORS = {"Relu": 1, "Neg": 1, "Add": 2, "Sub": 2}
Plan = list[tuple[str, tuple[int, ...]]]  # operator and sources: 0 the input, 1 and 2 constants, then nodes by number
LEAVES = 3


@st.composite
def plans(draw: st.DrawFn, size: int = 5) -> Plan:
    plan: Plan = []
    for k in range(draw(st.integers(1, size))):
        op = draw(st.sampled_from(sorted(OPERATORS)))
        sources = st.integers(0, LEAVES + k - 1)
        plan.append((op, tuple(draw(sources) for _ in range(OPERATORS[op]))))
    return plan


def built(plan: Plan, outputs: list[int], constants: tuple[float, float] = (1.0, 2.0)) -> ModelProto:
    names = ["x", "p", "q", *(f"n{k}" for k in range(len(plan)))]
    nodes = [
        helper.make_node(op, [names[s] for s in sources], [names[LEAVES + k]]) for k, (op, sources) in enumerate(plan)
    ]
    initializers = [tensor("p", constants[0]), tensor("q", constants[1])]
    return model(nodes, [port("x", [])], [port(names[LEAVES + k], []) for k in outputs], initializers)


def sinks(plan: Plan) -> list[int]:
    read = {s - LEAVES for _, sources in plan for s in sources}
    return [k for k in range(len(plan)) if k not in read]


def named_outputs(m: ModelProto) -> ModelProto:
    """Outputs called y0, y1... so that only the structure can differ."""
    fresh = {p.name: f"y{k}" for k, p in enumerate(m.graph.output)}
    for node in m.graph.node:
        for names in (node.input, node.output):
            names[:] = [fresh.get(name, name) for name in names]
    for one in m.graph.output:
        one.name = fresh[one.name]
    return m


def isomorphic(a: Plan, outputs_a: list[int], b: Plan, outputs_b: list[int]) -> bool:
    """By trying every assignment of nodes: the definition, whatever it costs."""
    if len(a) != len(b) or len(outputs_a) != len(outputs_b):
        return False
    for order in itertools.permutations(range(len(b))):
        to = [0, 1, 2, *(LEAVES + k for k in order)]
        if [order[k] for k in outputs_a] == outputs_b and all(
            b[order[k]] == (op, tuple(to[s] for s in sources)) for k, (op, sources) in enumerate(a)
        ):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(plans(), st.data())
def test_random_graphs_are_equal_exactly_when_isomorphic(plan: Plan, data: st.DataObject) -> None:
    """Against brute force, on pairs that are near each other: one source of one node moved, or nothing."""
    other = list(plan)
    k = data.draw(st.integers(0, len(plan) - 1))
    op, sources = plan[k]
    slot = data.draw(st.integers(0, len(sources) - 1))
    moved = list(sources)
    moved[slot] = data.draw(st.integers(0, LEAVES + k - 1))
    other[k] = (op, tuple(moved))
    outputs, others = sinks(plan), sinks(other)
    forms = [
        canonicalise(disguise(named_outputs(built(p, o)), seed), weights=None)
        for seed, (p, o) in enumerate([(plan, outputs), (other, others)])
    ]
    # Unused constants are part of the file; with equal plans for nodes they're the same on both sides.
    assert (forms[0].sha256 == forms[1].sha256) == isomorphic(plan, outputs, other, others)
    differences = compare_graphs(*forms)
    assert (differences == []) == (forms[0].sha256 == forms[1].sha256)
    assert not any("not found" in d.where for d in differences)


@settings(max_examples=150, deadline=None)
@given(plans(size=12), st.integers(0, 2**32), st.data())
def test_random_graphs_with_dead_nodes_survive_any_disguise(plan: Plan, seed: int, data: st.DataObject) -> None:
    outputs = data.draw(st.lists(st.integers(0, len(plan) - 1), min_size=1, max_size=3, unique=True))
    reference = built(plan, outputs)
    candidate = disguise(reference, seed)
    forms = [canonicalise(m, weights=None) for m in (candidate, reference)]
    assert forms[0].sha256 == forms[1].sha256
    assert compare_graphs(*forms) == []


@settings(max_examples=200, deadline=None)
@given(
    plans(size=12),
    st.integers(0, 2**32),
    st.sampled_from(["operator", "constant", "add", "output", "attribute"]),
    st.data(),
)
def test_one_random_mutation_of_a_random_graph_is_seen(plan: Plan, seed: int, how: str, data: st.DataObject) -> None:
    outputs = data.draw(st.lists(st.integers(0, len(plan) - 1), min_size=1, max_size=3, unique=True))
    reference = built(plan, outputs)
    candidate = built(plan, outputs)
    node = data.draw(st.sampled_from(list(candidate.graph.node)))
    if how == "operator":
        node.op_type = {"Relu": "Neg", "Neg": "Relu", "Add": "Sub", "Sub": "Add"}[node.op_type]
        # Two nodes may have changed places by that: then it is the same graph.
        kinds = [sorted(n.op_type for n in m.graph.node) for m in (candidate, reference)]
        assert kinds[0] != kinds[1]
    elif how == "constant":
        candidate.graph.initializer[0].CopyFrom(tensor("p", np.float32(1.0000001)))
    elif how == "add":
        candidate.graph.node.append(helper.make_node("Neg", [node.output[0]], ["leaked"]))
    elif how == "output":
        assume(node.output[0] not in {p.name for p in candidate.graph.output})
        candidate.graph.output.append(port(node.output[0], []))
    else:
        node.attribute.append(helper.make_attribute("alpha", 0.5))
    forms = [canonicalise(disguise(candidate, seed), weights=None), canonicalise(reference, weights=None)]
    assert forms[0].sha256 != forms[1].sha256
    differences = compare_graphs(*forms)
    assert differences
    assert not any("not found" in d.where for d in differences)
