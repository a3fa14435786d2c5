"""Every mutant of a graph is seen by the hash and found by the comparison, on graphs of all three origins."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from fgvc.exporting.canonical import canonicalise, weight_positions
from fgvc.exporting.difference import Difference, compare_graphs, notes
from tests.exporting.small_graphs import (
    MUTANTS,
    SOURCES,
    first,
    graph_of,
    holder,
    insert_live,
    model,
    port,
    set_values,
    tensor,
)


def differences(candidate, reference, weights=None, **kwargs):
    forms = [canonicalise(m, weights=weights) for m in (candidate, reference)]
    return compare_graphs(*forms, **kwargs)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_told_in_few_lines(source: str, name: str) -> None:
    mutate, kind, mentions = MUTANTS[name]
    reference, candidate = graph_of(source, 0), graph_of(source, 1)  # other weights, so that they can't give it away
    weights = weight_positions(graph_of(source, 2), reference)
    for blanked in (weights, None):
        assert differences(candidate, reference, blanked) == []
    mutate(candidate)
    for blanked in (weights, None):
        forms = [canonicalise(m, weights=blanked) for m in (candidate, reference)]
        changes = compare_graphs(*forms)
        account = "\n".join(map(str, changes))
        assert forms[0].sha256 != forms[1].sha256
        assert [d for d in changes if d.kind in (kind or d.kind) and mentions in str(d)], account
        assert len(changes) <= 3, account
        assert "not found" not in account
        # The other way round the same places differ.
        assert {d.kind for d in compare_graphs(*reversed(forms))} == {d.kind for d in changes}, account


@pytest.mark.parametrize("source", SOURCES)
def test_a_single_change_is_a_single_line(source: str) -> None:
    """Those whose consequences would show everywhere if names were compared."""
    for name in ("extra live node", "removed node", "swapped inputs", "rewired edge", "Clip bound", "renamed input"):
        reference, candidate = graph_of(source), graph_of(source)
        MUTANTS[name][0](candidate)
        lines = [d for d in differences(candidate, reference) if "Constant #" not in d.reference[:12]]
        lines = [d for d in lines if "used by no output" not in d.where]
        assert len(lines) == 1, (name, list(map(str, lines)))


def test_two_changes_are_two_lines() -> None:
    reference, candidate = graph_of("dynamo"), graph_of("dynamo")
    for name in ("Clip bound", "extra live node", "changed attribute"):
        MUTANTS[name][0](candidate)
    assert sorted(d.kind for d in differences(candidate, reference)) == ["attribute", "constant", "node"]


def test_an_exporter_change_is_told_in_few_lines() -> None:
    lines = differences(graph_of("torchscript"), graph_of("dynamo"), limit=5)
    assert len(lines) == 6
    assert str(lines[-1]).startswith("... and ")
    total = differences(graph_of("torchscript"), graph_of("dynamo"), limit=1000)
    assert str(lines[-1]) == f"... and {len(total) - 5} more"


def test_weights_count_when_nothing_is_blanked() -> None:
    lines = differences(graph_of("hand", 0), graph_of("hand", 1), weights=())
    assert [d.kind for d in lines] == ["constant"] * 5
    assert differences(graph_of("hand", 0), graph_of("hand", 0), weights=()) == []


def test_differences_in_words() -> None:
    candidate = graph_of("hand")
    set_values(holder(candidate, "high"), 4.0)
    (changed,) = differences(candidate, graph_of("hand"))
    assert changed == Difference("constant", "initializer 'high' of Clip #1 'clip1'", "float[] = 4.0", "float[] = 6.0")
    assert str(changed) == (
        "constant: initializer 'high' of Clip #1 'clip1': float[] = 4.0; in the reference: float[] = 6.0"
    )
    candidate = graph_of("hand")
    insert_live(candidate)
    (extra,) = differences(candidate, graph_of("hand"))
    assert str(extra) == (
        "node: extra node: Relu #10 'leaked' (reads ReduceMean #9 'mean'; read by Gemm #11 'fc'); "
        "in the reference: nothing"
    )


def chain(length: int, extra: int | None = None, odd: int | None = None):
    """Equal layers, one behind the other: nothing but the position tells them apart."""
    nodes, last = [], "x"
    for k in range(length + (extra is not None)):
        nodes.append(helper.make_node("Elu", [last], [f"t{k}"], alpha=0.5 if k == odd else 1.0))
        last = f"t{k}"
    return model(nodes, [port("x", [1])], [port(last, [1])], [])


def test_deep_graph_of_equal_layers() -> None:
    """Deeper than Python's recursion limit, and one change in it is one line."""
    (changed,) = differences(chain(3000, odd=1234), chain(3000))
    assert (changed.kind, "#1234 't1234'" in changed.where) == ("attribute", True)
    longer = chain(3000, extra=7)
    longer.graph.output[0].name = longer.graph.node[-1].output[0] = "t2999"
    longer.graph.node[-2].output[0] = longer.graph.node[-1].input[0] = "before"
    (extra,) = differences(longer, chain(3000))
    assert (extra.kind, extra.where) == ("node", "extra node")


def test_subgraphs_are_compared_inside() -> None:
    def conditional(bound: float, name: str = "inner"):
        branches = []
        for branch, op in (("then", "Neg"), ("else", "Elu")):
            nodes = [
                helper.make_node("Constant", [], [f"{name}.k.{branch}"], value=tensor("", bound)),
                helper.make_node(op, ["y"], [f"{name}.{branch}"]),
                helper.make_node("Add", [f"{name}.{branch}", f"{name}.k.{branch}"], [f"{name}.out.{branch}"]),
            ]
            branches.append(helper.make_graph(nodes, branch, [], [port(f"{name}.out.{branch}", [3])]))
        nodes = [
            helper.make_node("Relu", ["x"], ["y"]),
            helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1]),
        ]
        return model(nodes, [port("x", [3]), port("c", [], 9)], [port("z", [3])], [])

    assert differences(conditional(1.0), conditional(1.0, name="other")) == []
    changed = differences(conditional(1.0), conditional(2.0))
    assert [d.kind for d in changed] == ["constant", "constant"]
    assert "else_branch: Constant #0" in changed[0].where
    rewired = conditional(1.0)
    rewired.graph.node[1].attribute[0].g.node[1].input[0] = "x"  # past the Relu: an edge into the outer graph
    (rewiring,) = differences(rewired, conditional(1.0))
    assert rewiring.kind == "topology"
    assert "_branch: " in rewiring.where


def test_functions_are_compared_inside() -> None:
    def calling(op: str):
        proto = model([helper.make_node("F", ["x"], ["y"], domain="d")], [port("x", [3])], [port("y", [3])], [])
        inner = [helper.make_node("Relu", ["a"], ["t"]), helper.make_node(op, ["t"], ["b"])]
        proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], inner, [helper.make_opsetid("", 20)]))
        return proto

    (difference,) = differences(calling("Neg"), calling("Abs"))
    assert (difference.kind, difference.where) == ("node", "function d::F: other operator")


def test_notes_tell_what_makes_no_difference() -> None:
    reference, candidate = graph_of("hand"), graph_of("hand")
    assert notes(candidate, reference) == []
    candidate.producer_name, candidate.producer_version = "pytorch", "2.14.1"
    clip = first(candidate, "Clip")
    clip.name, clip.output[0] = "renamed", "t"
    for node in candidate.graph.node:
        node.input[:] = ["t" if name == "b" else name for name in node.input]
    assert differences(candidate, reference) == []
    assert notes(candidate, reference) == [
        "producer: pytorch; in the reference: none",
        "producer version: 2.14.1; in the reference: none",
        "names of inner tensors: 1 only in the candidate, such as 't'; 1 only in the reference, such as 'b'",
        "names of nodes: 1 only in the candidate, such as 'renamed'; 1 only in the reference, such as 'clip1'",
    ]


def test_the_order_of_storage_may_differ_on_top_of_a_change() -> None:
    reference, candidate = graph_of("hand"), graph_of("hand")
    nodes = list(candidate.graph.node)
    shuffled = [nodes[k] for k in (7, 5, 4, 0, 1, 2, 3, 6, 8, 9, 10)]
    del candidate.graph.node[:]
    candidate.graph.node.extend(shuffled)
    assert differences(candidate, reference) == []
    set_values(holder(candidate, "k6"), np.float32(2.0))
    (difference,) = differences(candidate, reference)
    assert difference.kind == "constant"
    assert "Constant #1 'k6' (in the reference Constant #5 'k6')" in difference.where
