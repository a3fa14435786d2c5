"""Differences between two graphs in few lines: each told once, with its count and, where it has one, its meaning."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fgvc.exporting.difference import Difference
from fgvc.exporting.structure import Canonical, Graph

LINES = 5
NORM = "BatchNormalization"
_PLACE = re.compile(r"(?P<op>[\w.:]+) #\d+ '[^']*'( \(in the reference [^)]*\))?")


def summary(candidate: Canonical, reference: Canonical, differences: Sequence[Difference]) -> list[str]:
    """At most LINES lines; empty where there are no differences. `differences`: those of `compare_graphs`, all of them."""
    if not differences:
        return []
    if line := _folded(candidate.graph, reference.graph):
        return [line]
    alike: dict[tuple[str, ...], list[Difference]] = {}
    for difference in differences:
        texts = (difference.kind, difference.where, difference.candidate, difference.reference)
        alike.setdefault(tuple(map(_without_places, texts)), []).append(difference)
    groups = sorted(alike.values(), key=len, reverse=True)
    lines = [
        str(group[0]) if len(group) == 1 else f"{len(group)} times, first at {group[0]}" for group in groups[:LINES]
    ]
    if rest := sum(map(len, groups[LINES:])):
        lines[-1] = f"{rest + len(groups[LINES - 1])} more differences"
    return lines


def _folded(ours: Graph, theirs: Graph) -> str:
    """The line for two graphs that differ in folded batch norms alone; empty for others."""
    counts, others = (Counter(node.op for node in graph.nodes) for graph in (ours, theirs))
    norms = counts.pop(NORM, 0), others.pop(NORM, 0)
    if counts != others or norms[0] == norms[1]:
        return ""
    if norms[1] > norms[0]:
        return (
            f"the deployed file keeps {norms[1] - norms[0]} {NORM} nodes that are folded into convolutions here; write into "
            "its own tensors instead: fgvc train with model.onnx, then fgvc export --into"
        )
    return f"{norms[0] - norms[1]} {NORM} nodes here are folded into convolutions in the deployed file"


def _without_places(text: str) -> str:
    """A text without numbers and names of nodes, so that equal differences at many places are alike."""
    return re.sub(r"initializer '[^']*'( \('[^']*'\))?", "initializer", _PLACE.sub(lambda place: place["op"], text))
