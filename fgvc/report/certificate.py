"""What was proved of the bundle that a run was exported to, and whether that bundle holds this run's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.exporting.proofs import BATCH_TOLERANCE, FOLD_TOLERANCE, ONNX_TOLERANCE, SHIPPED_TOLERANCE
from fgvc.images.preprocess import differences
from fgvc.io.names import label_differences
from fgvc.runs.loaded import Answers, LoadedRun
from fgvc.runtime.bundle import Bundle
from fgvc.runtime.engine import Session

IMAGES = 8  # asked of both
SAME = 1e-3  # of logits, relative to max(1, |logit|): ten times what the proofs allow; other weights are hundreds away

AROUND = {"preprocess": "its preprocessing", "labels": "the order of its labels"}


@dataclass(frozen=True, slots=True)
class Proof:
    """One figure of the contract."""

    level: str
    what: str
    found: str
    bar: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """`worst`: how far the bundle's logits are from the run's, on `images` images."""

    bundle: Bundle
    worst: float
    images: int

    @property
    def proofs(self) -> list[Proof]:
        """The three levels, as contract.json records them."""
        proofs = self.bundle.contract["proofs"]
        numeric, structural, behavioural = proofs["numeric"], proofs["structural"], proofs["behavioural"]
        nodes = f"{structural['nodes']} nodes, {structural['initializers']} initializers"
        batch = behavioural["worst_batch"]
        seen = f"of onnxruntime against torch, {behavioural['images']} images"
        rows = [
            ("numeric", "folding, in float64", numeric["folded_float64"], FOLD_TOLERANCE),
            ("numeric", "rounding, as shipped in float32", numeric["shipped_float32"], SHIPPED_TOLERANCE),
            ("behavioural", f"logits {seen}", behavioural["worst"], ONNX_TOLERANCE),
            ("behavioural", "one image against eight", batch, BATCH_TOLERANCE),
        ]
        found = [
            Proof(level, what, f"{value:.1e}" if value else "0", f"{bar:.0e}")
            for level, what, value, bar in rows
            if value is not None
        ]
        found.insert(
            2, Proof("structural", "the plain net's graph", nodes if structural["equal"] else "another", "equal")
        )
        others = str(len(behavioural["disagreements"]))
        return [*found, Proof("behavioural", "images of another class, within the margin", others, "excused")]

    @property
    def facts(self) -> list[tuple[str, str]]:
        contract: dict[str, Any] = dict(self.bundle.contract)
        interface = contract["interface"]
        size = " × ".join(str(side) for side in interface["size"])
        inputs = f"{interface['input_name']} (batch × 3 × {size}) to {', '.join(interface['output_names'])}"
        return [
            ("bundle", str(self.bundle.folder)),
            ("graph, SHA-256", contract["sha256"]),
            ("graph of", f"the plain {contract['backbone']}, {contract['num_classes']} classes"),
            ("deployed file compared", str(contract.get("against") or "none")),
            *self._drop_in,
            ("interface", inputs),
            ("exporter", f"{contract['exporter']}, opset {interface['opset']}"),
            ("versions", ", ".join(f"{name} {value}" for name, value in contract["versions"].items())),
        ]

    @property
    def _drop_in(self) -> list[tuple[str, str]]:
        """What was proved of its taking the deployed file's place; nothing where none was compared."""
        if not self.bundle.contract.get("against"):
            return []
        known = self.bundle.contract.get("deployed") or {}  # older bundles say nothing
        open_ = [what for key, what in AROUND.items() if known.get(key) != "the same"]
        said = (
            f"not proved: {' and '.join(open_)} only assumed"
            if open_
            else "graph, preprocessing and labels are the same"
        )
        return [("a drop-in for it", said)]


def certificates(
    bundles: Sequence[Bundle], runs: Sequence[LoadedRun], answers: Sequence[Answers]
) -> dict[int, Certificate]:
    """The position of a run -> the certificate of the bundle that gives its logits.

    Raises FgvcError for a bundle that gives none of the runs': a certificate of other weights must not stand beside them.
    """
    found: dict[int, Certificate] = {}
    for bundle in bundles:
        away = {
            at: _distance(bundle, run, answer)
            for at, (run, answer) in enumerate(zip(runs, answers, strict=True))
            if not _apart(bundle, run)
        }
        if not away:
            raise FgvcError(
                f"{bundle.folder}: other classes or another preprocessing than the run's: not exported from it; the bundle's "
                f"against {runs[0].folder}'s: {'; '.join(_apart(bundle, runs[0]))}"
            )
        nearest = min(away, key=lambda at: away[at].worst)
        if not away[nearest].worst <= SAME:
            raise FgvcError(
                f"{bundle.folder}: not these weights: its logits are {away[nearest].worst:.2g} away from those of "
                f"{runs[nearest].folder} ({runs[nearest].select}); export again, or give the --select of its export"
            )
        found[nearest] = away[nearest]
    return found


def _apart(bundle: Bundle, run: LoadedRun) -> list[str]:
    return [*differences(bundle.preprocess, run.preprocess), *label_differences(bundle.labels, run.classes)]


def _distance(bundle: Bundle, run: LoadedRun, answer: Answers) -> Certificate:
    at = np.unique(np.linspace(0, len(answer.rows) - 1, min(IMAGES, len(answer.rows))).astype(int))
    loader = evaluation_loader(run.index, answer.rows[at], spec=run.preprocess, batch_size=IMAGES, workers=0)
    x = np.concatenate([batch.images.numpy() for batch in loader])
    z, said = answer.logits[at], Session(bundle.model).logits(x)
    return Certificate(bundle, float((np.abs(z - said) / np.maximum(1, np.abs(z))).max()), len(at))
