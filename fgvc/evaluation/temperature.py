"""Temperature and threshold of a run: fitted once, on its validation split, and stored in its folder.

`<run>/calibration.json` holds, under `val.<select>`, what a bundle's does, and the identity of the checkpoint whose weights it
was fitted for. All that shows a probability of this run takes both numbers from there. No other split is ever fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.calibration import Calibration
from fgvc.config.data import Split
from fgvc.config.images import Ending
from fgvc.config.loading import validate
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.evaluation.calibration import FEWEST, KEEP, Calibrated, calibrate, fitting_sample, measure
from fgvc.runs.loaded import LoadedRun, onnx_answers
from fgvc.runs.measured import read_measured_of, store_measured
from fgvc.runtime.engine import OnnxSession, refuse_no_numbers

RECORD = "calibration.json"  # in the run
FITTED_ON: Split = "val"
SAME = 1e-3  # of a mean cross-entropy in nats, by the largest logit; logits that are within 1e-4 of it move it by 2e-4 at most

LabelledLogits = tuple[NDArray[Any], NDArray[Any]]
"""Logits (N,K) and labels (N,)."""


@dataclass(frozen=True, slots=True)
class RunCalibration:
    """Calibration of a run, or the reason why it has none."""

    calibration: Calibration | None
    why: str = ""
    ending: Ending | None = None  # of the run's deployed file

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted."""
        return self.calibration is not None and self.calibration.calibrated

    @property
    def reliable(self) -> float:
        """The temperature, where it was fitted on FEWEST images or more and gains on those that it was not fitted on; else 1."""
        fitted = self.calibration
        gains = fitted is not None and fitted.images >= FEWEST and fitted.nll_after <= fitted.nll_before
        return fitted.temperature if fitted is not None and gains and self.calibrated else 1.0

    @property
    def source(self) -> str:
        """Origin of the temperature, in words."""
        fitted = self.calibration
        return self.reason if fitted is None else f"fitted on {fitted.images} {fitted.fitted_on} images"

    @property
    def reason(self) -> str:
        """Reason why no temperature was fitted; empty where one was."""
        return "" if self.calibrated else self.why if self.calibration is None else self.calibration.note

    def measure(self, split: str, outputs: LabelledLogits) -> Calibrated:
        """Measure the calibration on a split; cross-fitted where it was fitted on that split."""
        calibration = self.calibration
        if calibration is not None and calibration.fitted_on == split:
            return calibrate(*outputs, keep=calibration.keep, split=split, previous=calibration, ending=self.ending)
        return measure(*outputs, calibration, why=self.why, ending=self.ending)


def recorded_calibration(run: LoadedRun) -> Calibration | None:
    """Read the calibration stored for these very weights. Raises FgvcError where the file is not as fgvc wrote it."""
    row = read_measured_of(run.folder, RECORD, run.identity).get(key := f"{FITTED_ON}.{run.select}")
    return None if row is None else validate(Calibration, row, where=f"{run.folder / RECORD}: {key}")


def fitting_rows(run: LoadedRun) -> NDArray[np.int64]:
    """Rows of the images that a run's temperature is fitted on. Raises FgvcError where they are not what they were."""
    return fitting_sample(run.rows(FITTED_ON), len(run.classes))


def calibration(
    run: LoadedRun, *, keep: float | None = None, outputs: LabelledLogits | None = None, device: str | None = None
) -> RunCalibration:
    """Read the calibration stored for the run's weights; where there is none, fit it on the validation split and store it.

    `keep`: share of the right answers that the threshold must keep; None: that of the stored one. `outputs`: the net's for
    `fitting_rows`, where they are at hand. Raises FgvcError for logits that are no numbers.
    """
    stored, ending = recorded_calibration(run), run.preprocess.ending
    if stored is not None and keep in (None, stored.keep):
        return RunCalibration(stored, ending=ending)
    if not len(run.index.rows(FITTED_ON)):
        return RunCalibration(None, "the data have no validation split, and a temperature is fitted on nothing else")
    if outputs is None:
        try:
            answers = run.answers(fitting_rows(run), device=device)
        except FgvcError as error:
            if stored is not None:  # there is a temperature, and no new threshold can be fitted
                raise
            return _without_images(run, error)
        outputs = answers.logits, answers.labels
    refuse_no_numbers(outputs[0], run.folder)
    share = KEEP if keep is None else keep
    fitted = calibrate(*outputs, keep=share, split=FITTED_ON, previous=stored, ending=ending).fitted
    assert fitted is not None
    row = {f"{FITTED_ON}.{run.select}": fitted.model_dump(mode="json")}
    store_measured(run.folder, {}, rows={RECORD: row}, identity=run.identity)
    return RunCalibration(fitted, ending=ending)


def calibration_without_data(run: LoadedRun, *, device: str | None = None) -> RunCalibration:
    """Read or fit the calibration of a run whose data may be missing: then it has the stored one, or none."""
    if (stored := recorded_calibration(run)) is not None:
        return RunCalibration(stored, ending=run.preprocess.ending)
    try:
        return calibration(run, device=device)
    except NoNumbersError:
        raise
    except FgvcError as error:
        return _without_images(run, error)


def _without_images(run: LoadedRun, error: FgvcError) -> RunCalibration:
    message = " ".join(line.strip() for line in str(error).splitlines()[:2])  # without advice, which is the verb's that was asked
    advice = f"`fgvc eval {run.folder} --split {FITTED_ON} --root DIR` fits and keeps a temperature where the set lies in DIR now"
    return RunCalibration(None, f"none is kept, and the validation split can't be read ({message}); {advice}")


def shipped_calibration(
    run: LoadedRun, run_calibration: RunCalibration, session: OnnxSession, *, divided_by: float = 1.0
) -> Calibration | None:
    """The calibration that a bundle gets: the run's, checked on the exported file (`session`); where that has the temperature in
    its last layer (`divided_by`), one of temperature 1 with the same threshold. None: the run has none.

    Raises FgvcError where the file has another loss on the validation split than the run had when its temperature was fitted, or
    logits that are no numbers."""
    if (calibration := run_calibration.calibration) is None:
        return None
    rows = fitting_rows(run)
    at_one = calibration.model_copy(update={"temperature": 1.0, "note": ""}) if divided_by != 1 else calibration
    try:
        answers = onnx_answers(session, run.index, rows, spec=run.preprocess, workers=run.recipe.train.workers)
    except FgvcError:  # the model fits, it was proved on images of this size; so it's that none can be read any more
        return at_one
    refuse_no_numbers(answers.logits, run.folder)
    logits = answers.logits * np.float32(divided_by)
    measured = measure(logits, answers.labels, calibration, ending=answers.ending)
    difference = abs(measured.nll - calibration.nll_before) / max(1.0, float(np.abs(logits).max()))
    if measured.images == calibration.images and difference > SAME:
        raise FgvcError(
            f"{run.folder}: the exported file has a loss of {measured.nll:.4f} on validation, and the run "
            f"{calibration.nll_before:.4f} when its temperature was fitted: its probabilities would not be calibrated; remove "
            f"{run.folder / RECORD} and export again"
        )
    if divided_by == 1:
        return calibration
    own = measure(answers.logits, answers.labels, None, ending=answers.ending)
    return at_one.model_copy(update={"nll_before": round(own.nll, 6), "ece_before": round(own.before.ece, 6)})
