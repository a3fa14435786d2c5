"""Differences between two graphs in few lines: each told once, with its count and, where it has one, its meaning."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fgvc.exporting.difference import Difference

LINES = 5
NORM = "BatchNormalization"
_PLACE = re.compile(r"(?P<op>[\w.:]+) #\d+ '[^']*'( \(in the reference [^)]*\))?")
_BIAS = re.compile(r"^Conv #.* input 2$")


def summary(differences: Sequence[Difference]) -> list[str]:
    """At most LINES lines; empty where there are no differences. `differences`: those of `compare_graphs`, all of them."""
    kept = [d for d in differences if d.kind == "node" and not d.candidate and d.reference.startswith(f"{NORM} #")]
    folded = [d for d in differences if d.kind == "node" and not d.reference and d.candidate.startswith(f"{NORM} #")]
    lines = []
    if bool(kept) != bool(folded):  # each with the bias that its convolution has where it is folded
        lines = [_norms(len(kept), len(folded))]
        apart = {*kept, *folded}
        differences = [d for d in differences if d not in apart and not _is_folded_bias(d, here=bool(kept))]
    alike: dict[tuple[str, ...], list[Difference]] = {}
    for difference in differences:
        texts = (difference.kind, difference.where, difference.candidate, difference.reference)
        alike.setdefault(tuple(map(_without_places, texts)), []).append(difference)
    groups = sorted(alike.values(), key=len, reverse=True)
    shown = LINES - len(lines)
    lines += [str(group[0]) if len(group) == 1 else f"{len(group)} times, first at {group[0]}" for group in groups[:shown]]
    if rest := sum(map(len, groups[shown:])):
        lines[-1] = f"{rest + len(groups[shown - 1])} more differences"
    return lines


def _norms(kept: int, folded: int) -> str:
    if kept:
        return (
            f"your file keeps its {kept} BatchNormalizations; export with `export.batch_norm: keep` (of a run that is there: "
            "fgvc export --batch-norm keep)"
        )
    return (
        f"your file has its {folded} BatchNormalizations folded into convolutions; export with `export.batch_norm: fold` (of a "
        "run that is there: fgvc export --batch-norm fold)"
    )


def _is_folded_bias(difference: Difference, *, here: bool) -> bool:
    """Whether the difference is a convolution's bias that only the side with folded norms has, the candidate (`here`) or the
    reference."""
    has, lacks = (difference.candidate, difference.reference)[:: 1 if here else -1]
    return difference.kind == "initializer" and bool(has) and not lacks and _BIAS.match(difference.where) is not None


def _without_places(text: str) -> str:
    """A text without numbers and names of nodes, so that equal differences at many places are alike."""
    return re.sub(r"initializer '[^']*'( \('[^']*'\))?", "initializer", _PLACE.sub(lambda place: place["op"], text))
