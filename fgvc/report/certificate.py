"""Certificate of a bundle that a run was exported to: its proofs, and whether it holds this run's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fgvc.data.index import spread
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.exporting.proofs import BATCH_TOLERANCE, FOLD_TOLERANCE, ONNX_TOLERANCE, SHIPPED_TOLERANCE
from fgvc.images.preprocess import differences
from fgvc.io.names import label_differences
from fgvc.runs.loaded import Answers, LoadedRun
from fgvc.runtime.bundle import Bundle
from fgvc.runtime.engine import session_of, softmax

COMPARED_IMAGES = 8  # by both
SAME_LOGITS = 1e-3  # of logits, relative to max(1, |logit|): ten times what the proofs allow; other weights are hundreds away
LEAST = 1e-30  # a probability below is as good as 0

STACK_PARTS = {"preprocess": "its preprocessing", "labels": "the order of its labels"}


@dataclass(frozen=True, slots=True)
class Proof:
    """One figure of a bundle's contract, with its limit."""

    level: str
    what: str
    value: str
    bar: str


def recorded_proofs(bundle: Bundle) -> list[Proof]:
    """Proofs of the three levels, as a bundle's contract.json records them."""
    recorded = bundle.contract["proofs"]
    numeric, behavioural = recorded["numeric"], recorded["behavioural"]
    batch = behavioural["worst_batch"]
    scope = f"of onnxruntime against torch, {behavioural['images']} images"
    rows = [
        ("numeric", "folding, in float64", numeric["folded_float64"], FOLD_TOLERANCE),
        ("numeric", "rounding, as shipped", numeric["shipped_float32"], numeric.get("bar", SHIPPED_TOLERANCE)),
        ("behavioural", f"logits {scope}", behavioural["worst"], bar := behavioural.get("bar", ONNX_TOLERANCE)),
        ("behavioural", "one image against eight", batch, BATCH_TOLERANCE * bar / ONNX_TOLERANCE),
    ]
    proofs = [
        Proof(level, what, f"{value:.1e}" if value else "0", f"{bar:.0e}")
        for level, what, value, bar in rows
        if value is not None
    ]
    if (structural := recorded.get("structural")) is not None:
        nodes = f"{structural['nodes']} nodes, {structural['initializers']} initializers"
        graph = Proof("structural", "the plain net's graph", nodes if structural["equal"] else "another", "equal")
    else:
        written = recorded["written"]
        moved = f"{written['moved']} payloads of weights moved, {written['kept']} did not"
        graph = Proof("bytes", "all but these are the deployed file's", moved, "equal")
    proofs.insert(2, graph)
    others = str(len(behavioural["disagreements"]))
    return [*proofs, Proof("behavioural", "images of another class, within the margin", others, "excused")]


@dataclass(frozen=True, slots=True)
class Certificate:
    """A bundle with the largest distance of its logits from the run's (`worst`), on `images` images."""

    bundle: Bundle
    worst: float
    images: int

    @property
    def recorded(self) -> list[Proof]:
        return recorded_proofs(self.bundle)

    @property
    def facts(self) -> list[tuple[str, str]]:
        contract: dict[str, Any] = dict(self.bundle.contract)
        if "file" in contract:
            return self._file_facts(contract)
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

    def _file_facts(self, contract: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Facts of a bundle that was written into a deployed file."""
        file, image = contract["file"], contract["input"]
        size = " × ".join(str(side) for side in image["size"])
        return [
            ("bundle", str(self.bundle.folder)),
            ("written into", f"{file['name']}, {contract['num_classes']} classes"),
            *((f"SHA-256 of {name}", digest) for name, digest in file["sha256"].items()),
            ("SHA-256 of it without payloads", file["skeleton_sha256"]),
            ("input", f"{image['dtype']} {image['layout']}, {size} pixels"),
            ("versions", ", ".join(f"{name} {value}" for name, value in contract["versions"].items())),
        ]

    @property
    def _drop_in(self) -> list[tuple[str, str]]:
        """Rows on the proof that it is a drop-in for the deployed file; empty where none was compared."""
        if not self.bundle.contract.get("against"):
            return []
        deployed = self.bundle.contract.get("deployed") or {}  # older bundles say nothing
        unproved = [what for key, what in STACK_PARTS.items() if deployed.get(key) != "the same"]
        result = (
            f"not proved: {' and '.join(unproved)} only assumed"
            if unproved
            else "graph, preprocessing and labels are the same"
        )
        if deployed.get("answers"):
            result += f", {deployed['answers']}"
        verdict = self.bundle.contract.get("verdict", "identical")  # older bundles have no other
        if verdict != "identical":
            result += f"; the graph is {verdict}: {', '.join(self.bundle.contract['spelling'])}"
        return [("a drop-in for it", result)]


def certificates(
    bundles: Sequence[Bundle], runs: Sequence[LoadedRun], answers: Sequence[Answers]
) -> dict[int, Certificate]:
    """Make the certificates, by the position of the run whose logits the bundle gives.

    Raises FgvcError for a bundle that gives none of the runs': a certificate of other weights must not stand beside them.
    """
    certificate_by_run: dict[int, Certificate] = {}
    for bundle in bundles:
        distances = {
            at: _compare_logits(bundle, run, answer)
            for at, (run, answer) in enumerate(zip(runs, answers, strict=True))
            if not _stack_differences(bundle, run)
        }
        if not distances:
            raise FgvcError(
                f"{bundle.folder}: other classes or another preprocessing than the run's: not exported from it; the bundle's "
                f"against {runs[0].folder}'s: {'; '.join(_stack_differences(bundle, runs[0]))}"
            )
        nearest = min(distances, key=lambda at: distances[at].worst)
        if not distances[nearest].worst <= SAME_LOGITS:
            raise FgvcError(
                f"{bundle.folder}: not these weights: its logits are {distances[nearest].worst:.2g} away from those of "
                f"{runs[nearest].folder} ({runs[nearest].select}); export again, or give the --select of its export"
            )
        certificate_by_run[nearest] = distances[nearest]
    return certificate_by_run


def _stack_differences(bundle: Bundle, run: LoadedRun) -> list[str]:
    return [*differences(bundle.preprocess, run.preprocess), *label_differences(bundle.labels, run.classes)]


def _compare_logits(bundle: Bundle, run: LoadedRun, answer: Answers) -> Certificate:
    at = spread(np.arange(len(answer.rows)), COMPARED_IMAGES)
    loader = evaluation_loader(run.index, answer.rows[at], spec=run.preprocess, batch_size=COMPARED_IMAGES, workers=0)
    x = np.concatenate([batch.images.numpy() for batch in loader])
    divided_by = float(bundle.contract.get("temperature", {}).get("divided_by", 1.0))
    session, z = session_of(bundle, bundle.model), answer.logits[at] / np.float32(divided_by)
    bundle_logits = session.logits(x)
    if session.file.ending in ("softmax", "log_softmax"):  # which leaves log-probabilities of logits
        z, bundle_logits = (np.log(softmax(each).clip(min=LEAST)) for each in (z, bundle_logits))
    return Certificate(bundle, float((np.abs(z - bundle_logits) / np.maximum(1, np.abs(z))).max()), len(at))
