"""Coverage and precision of a stack that accepts a deployed file's answers above a threshold of confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.data.unseen import judged
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import confidence_of, fitting_sample
from fgvc.runs.loaded import Answers, LoadedRun, onnx_answers
from fgvc.runtime.engine import OnnxSession

BEFORE, UNDIVIDED, AFTER = "before", "after, without the temperature", "after"  # of an export: the deployed file, what ships


@dataclass(frozen=True, slots=True)
class Accepted:
    """Share of the images that are accepted, and of those the share that is named rightly (NaN: none is)."""

    coverage: float
    precision: float

    @property
    def words(self) -> tuple[str, str]:
        """Coverage and precision in per cent, as text."""
        return f"{100 * self.coverage:.1f} %", "" if np.isnan(self.precision) else f"{100 * self.precision:.1f} %"


@dataclass(frozen=True, slots=True, kw_only=True)
class StackThreshold:
    """Answers of several files on the same images, accepted from one confidence on, by the files' own outputs."""

    threshold: float
    images: int
    which: str  # images, in words
    files: Mapping[str, Accepted]

    def numbers(self) -> dict[str, Any]:
        """Values for metrics.json."""
        rows = {
            name: {"coverage": round(row.coverage, 6), "precision": None if np.isnan(row.precision) else round(row.precision, 6)}
            for name, row in self.files.items()
        }
        return {"threshold": self.threshold, "images": self.images, "which": self.which, "files": rows}


def refuse_threshold(threshold: float | None) -> None:
    """Raise FgvcError for a threshold that no probability is below, or above."""
    if threshold is not None and not 0 < threshold < 1:
        raise FgvcError(f"--stack-threshold {threshold:g}: a probability between 0 and 1, such as 0.8")


def accepted(confidence: NDArray[np.floating], right: NDArray[np.bool_], threshold: float) -> Accepted:
    """Coverage and precision of answers with these confidences (N,), given whether each is right (N,)."""
    taken = confidence >= threshold
    return Accepted(float(taken.mean()), float(right[taken].mean()) if taken.any() else float("nan"))


def measure_threshold(
    run: LoadedRun, old: Path, new: OnnxSession, threshold: float, *, divided_by: float
) -> StackThreshold:
    """Coverage and precision at a confidence of a deployed file, and of what is written into it, on the images that judge; where
    there are none, on validation. `divided_by`: the temperature in the new file's last layer. Raises FgvcError where the run has
    neither."""
    split, rows = run.rows_of("test" if len(run.index.rows("test")) else None)
    rows = fitting_sample(rows, len(run.classes))

    def answers(session: OnnxSession) -> Answers:
        return onnx_answers(session, run.index, rows, spec=run.preprocess, workers=run.recipe.train.workers)

    before, after = answers(OnnxSession(old, output=new.file.output)), answers(new)
    undivided = {} if divided_by == 1 else {UNDIVIDED: (after, 1 / divided_by)}
    files = {BEFORE: (before, 1.0), **undivided, AFTER: (after, 1.0)}
    shares = {
        name: accepted(
            confidence_of(each.logits.astype(np.float64), t, each.ending), each.logits.argmax(1) == each.labels, threshold
        )
        for name, (each, t) in files.items()
    }
    which = judged(run.index, split, len(after.rows)) or f"{len(after.rows)} images of {split}"
    return StackThreshold(threshold=threshold, images=len(after.rows), which=which, files=shares)
