"""Comparison of two ONNX graphs by their meaning, whichever of several equivalent forms they are written in.

Two files are *identical* where their canonical forms are equal, and *equal but for spelling* where these are equal after all
rules (`fgvc.exporting.rules`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnx import ModelProto

from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.rules import COMMUTATIVE_RULE, RULES
from fgvc.exporting.structure import Canonical

CANONICAL = 2  # version of what a contract says of graphs; 1 had the SHA-256 of the canonical form alone, 2 has the verdict, too
Verdict = Literal["identical", "equal but for spelling", "different"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """Result of a comparison by meaning: whether two graphs are equal after the rules, and which rules that took."""

    rules: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # that make them equal; how often each applied to either
    # Of different graphs, the canonical forms (candidate, reference) after all rules, and after all but the order of commutative
    # inputs: these are ordered by what is behind them, so that a difference there would show again.
    forms: tuple[tuple[Canonical, Canonical], ...] = ()

    @property
    def verdict(self) -> Verdict:
        return "different" if self.forms else "equal but for spelling" if self.rules else "identical"


def respelled(model: ModelProto, without: Collection[str] = ()) -> tuple[Canonical, dict[str, int]]:
    """Apply all rules (but those named) to a copy of a model. Returns its canonical form with all weights blanked, and how often
    each rule applied.

    Raises FgvcError as `canonicalise` does.
    """
    copy, applied = _rewritten(model, without)
    return canonicalise(copy, weights=None), applied


def compare_spelling(candidate: ModelProto, reference: ModelProto) -> Spelling:
    """Compare two graphs. A rule is named where without it they would not be equal. Raises FgvcError as `canonicalise` does."""
    models = candidate, reference
    if len({canonicalise(model, weights=None).sha256 for model in models}) == 1:
        return Spelling()
    (ours, applied), (theirs, applied_to_reference) = (_rewritten(model, (COMMUTATIVE_RULE,)) for model in models)
    unordered = canonicalise(ours, weights=None), canonicalise(theirs, weights=None)
    applied[COMMUTATIVE_RULE], applied_to_reference[COMMUTATIVE_RULE] = (RULES[COMMUTATIVE_RULE](m) for m in (ours, theirs))
    ordered = canonicalise(ours, weights=None), canonicalise(theirs, weights=None)
    if ordered[0].sha256 != ordered[1].sha256:
        return Spelling(forms=(ordered, unordered))
    counts = {name: (applied.get(name, 0), applied_to_reference.get(name, 0)) for name in RULES}
    spared: list[str] = [name for name, pair in counts.items() if pair == (0, 0)]
    for name in sorted(counts.keys() - spared, key=lambda name: sum(counts[name])):
        if len({respelled(model, [*spared, name])[0].sha256 for model in models}) == 1:
            spared.append(name)
    return Spelling(rules={name: pair for name, pair in counts.items() if name not in spared})


def _rewritten(model: ModelProto, without: Collection[str]) -> tuple[ModelProto, dict[str, int]]:
    copy = ModelProto()
    copy.CopyFrom(model)
    applied: Counter[str] = Counter()
    while True:
        counts = {name: rule(copy) for name, rule in RULES.items() if name not in without}
        applied.update(counts)
        if not any(counts.values()):
            return copy, {name: count for name, count in applied.items() if count}
