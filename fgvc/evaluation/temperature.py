"""A run's temperature and threshold: fitted once, on its validation split, and kept in its folder with the checkpoint's digest.

`<run>/calibration.json` holds, under `val.<select>`, what a bundle's does, and the identity of the checkpoint whose weights it
was fitted for. All that shows a probability of this run takes both numbers from there. No other split is ever fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import Split
from fgvc.config.loading import validate
from fgvc.config.runtime import Calibration
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.evaluation.calibration import KEEP, Calibrated, calibrate, measure, spread
from fgvc.runs.loaded import LoadedRun, onnx_answers
from fgvc.runs.measured import leave, measured_of
from fgvc.runtime.engine import Session, refuse_no_numbers

RECORD = "calibration.json"  # in the run
FITTED_ON: Split = "val"
SAME = 1e-3  # of a mean cross-entropy in nats, by the largest logit; logits that are within 1e-4 of it move it by 2e-4 at most

Given = tuple[NDArray[Any], NDArray[Any]]
"""Logits (N,K) and labels (N,)."""


@dataclass(frozen=True, slots=True)
class RunCalibration:
    """A run's calibration, or why it has none."""

    calibration: Calibration | None
    why: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted."""
        return self.calibration is not None and self.calibration.calibrated

    @property
    def reason(self) -> str:
        """Why none was; empty where one was."""
        return "" if self.calibrated else self.why if self.calibration is None else self.calibration.note

    def on(self, split: str, given: Given) -> Calibrated:
        """What it does for a part of the data; cross-fitted where that is the part that it was fitted on."""
        own = self.calibration
        if own is not None and own.fitted_on == split:
            return calibrate(*given, keep=own.keep, split=split, known=own)
        return measure(*given, own, why=self.why)


def recorded(run: LoadedRun) -> Calibration | None:
    """What is kept of these very weights. Raises FgvcError where the file is not as fgvc wrote it."""
    row = measured_of(run.folder, RECORD, run.identity).get(key := f"{FITTED_ON}.{run.select}")
    return None if row is None else validate(Calibration, row, where=f"{run.folder / RECORD}: {key}")


def fitting_rows(run: LoadedRun) -> NDArray[np.int64]:
    """The images that a run's temperature is fitted on. Raises FgvcError where they are not what they were."""
    return spread(run.rows(FITTED_ON), len(run.classes))


def calibration(
    run: LoadedRun, *, keep: float | None = None, given: Given | None = None, device: str | None = None
) -> RunCalibration:
    """What is kept of the run's weights; where nothing is, it is fitted on the validation split, and kept.

    `keep`: share of the right answers that the threshold must keep; None: what the kept one keeps. `given`: what the net says of
    `fitting_rows`, where that is at hand. Raises FgvcError for logits that are no numbers.
    """
    found = recorded(run)
    if found is not None and keep in (None, found.keep):
        return RunCalibration(found)
    if not len(run.index.rows(FITTED_ON)):
        return RunCalibration(None, "the data have no validation split, and a temperature is fitted on nothing else")
    if given is None:
        try:
            answers = run.answers(fitting_rows(run), device=device)
        except FgvcError as error:
            if found is not None:  # the temperature is known, and the new threshold can't be
                raise
            return _unread(run, error)
        given = answers.logits, answers.labels
    refuse_no_numbers(given[0], run.folder)
    fitted = calibrate(*given, keep=KEEP if keep is None else keep, split=FITTED_ON, known=found).known
    assert fitted is not None
    row = {f"{FITTED_ON}.{run.select}": fitted.model_dump(mode="json")}
    leave(run.folder, {}, rows={RECORD: row}, identity=run.identity)
    return RunCalibration(fitted)


def calibration_without_data(run: LoadedRun, *, device: str | None = None) -> RunCalibration:
    """The same of a run whose data need not be there: then it has what is kept, or nothing."""
    if (found := recorded(run)) is not None:
        return RunCalibration(found)
    try:
        return calibration(run, device=device)
    except NoNumbersError:
        raise
    except FgvcError as error:
        return _unread(run, error)


def _unread(run: LoadedRun, error: FgvcError) -> RunCalibration:
    said = " ".join(line.strip() for line in str(error).splitlines()[:2])  # without advice, which is the verb's that was asked
    advice = f"`fgvc eval {run.folder} --split {FITTED_ON} --root DIR` fits and keeps a temperature where the set lies in DIR now"
    return RunCalibration(None, f"none is kept, and the validation split can't be read ({said}); {advice}")


def refuse_other_file(run: LoadedRun, known: RunCalibration, model: bytes) -> None:
    """Raise FgvcError where an exported file does not say of the validation split what the run said when its temperature was
    fitted, or says what are no numbers."""
    if known.calibration is None:
        return
    rows, workers = fitting_rows(run), run.recipe.train.workers
    try:
        said = onnx_answers(Session(model), run.index, rows, spec=run.preprocess, workers=workers)
    except FgvcError:  # the model fits, it was proved on images of this size; so it's that none can be read any more
        return
    refuse_no_numbers(said.logits, run.folder)
    own, found = known.calibration, measure(said.logits, said.labels, known.calibration)
    apart = abs(found.nll - own.nll_before) / max(1.0, float(np.abs(said.logits).max()))
    if found.images == own.images and apart > SAME:
        raise FgvcError(
            f"{run.folder}: the exported file has a loss of {found.nll:.4f} on validation, and the run {own.nll_before:.4f} when "
            f"its temperature was fitted: its probabilities would not be calibrated; remove {run.folder / RECORD} and export "
            "again"
        )

