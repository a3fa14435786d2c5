"""Smaller files beside the proven one (`fgvc export --int8 --fp16`), and their agreement with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.calibration import Calibration
from fgvc.config.data import Split
from fgvc.data.index import spread
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.evaluation.agreement import FP16, INT8, Agreement, AgreementLimits, measure_agreement
from fgvc.evaluation.calibration import fitting_sample, measure
from fgvc.exporting.prove import ProvedExport
from fgvc.exporting.quantize import LOWEST_OPSET, Int8, opset_of
from fgvc.exporting.variant import VariantFile, make_fp16, make_int8
from fgvc.report.agreement import agreement_page
from fgvc.runs.loaded import Answers, LoadedRun, onnx_answers
from fgvc.runs.measured import store_measured
from fgvc.runtime.engine import OnnxSession

LISTED = 20  # images in contract.json; all are on the page
ADVICE = {
    "int8": "try more images to calibrate with (--int8-images), more of the first layers in float (--int8-float), or a lower "
    "bar (--agreement); weights of 7 bits, for CPUs without VNNI, lose most (--full-range)",
    "fp16": "values beyond 65,504, or logits that lie very close; try a lower bar (--agreement)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """Smaller files to make beside model.onnx."""

    int8: Int8 | None = None
    fp16: bool = False
    agreement: float | None = None  # in place of the limits of INT8 and FP16

    def __post_init__(self) -> None:
        if self.agreement is not None and not 0 < self.agreement <= 1:
            raise FgvcError(f"--agreement {self.agreement:g}: a share above 0 and up to 1, such as {INT8.agreement}")
        if self.int8 is not None and (self.int8.images < 1 or self.int8.first < 0):
            raise FgvcError("--int8-images: at least 1; --int8-float: 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallerFile:
    """A smaller file that passed, with its agreement and its section of contract.json."""

    variant_file: VariantFile
    agreement: Agreement
    section: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"model.{self.variant_file.variant}.onnx"


def make_variants(
    run: LoadedRun, proven: ProvedExport, session: OnnxSession, variants: Variants, calibration: Calibration | None = None
) -> list[SmallerFile]:
    """Make the smaller files, each compared with the float file (`session`) on the validation split, or on train where there is
    none.

    On up to 10,000 images; of validation with the calibration error that each has by the bundle's temperature; without those
    that `left_out` names. Writes `<run>/reports/{int8,fp16}.html`, also where a file is refused. Raises FgvcError where one gives
    logits that are no numbers, is not what the plain backbone becomes, or answers too differently.
    """
    files = []
    if variants.int8 is not None and not left_out(proven, variants):
        files.append((make_int8(*proven.plain, _calibration(run, variants.int8.images), variants.int8), INT8))
    if variants.fp16:
        files.append((make_fp16(*proven.plain), FP16))
    if not files:
        return []
    split: Split = "val" if len(run.index.rows("val")) else "train"
    float_answers = _answers(run, session, fitting_sample(run.rows(split), len(run.classes)))
    return [_judge(run, file, float_answers, split, _limits(limits, variants.agreement), calibration) for file, limits in files]


def left_out(proven: ProvedExport, variants: Variants) -> dict[str, str]:
    """Wanted files that the deployed opset does not allow, each with the reason."""
    opset = opset_of(proven.plain[0].proto)
    if variants.int8 is None or opset >= LOWEST_OPSET:
        return {}
    return {"model.int8.onnx": f"needs opset {LOWEST_OPSET} or newer, and model.onnx is of opset {opset}"}


def _judge(
    run: LoadedRun,
    variant_file: VariantFile,
    float_answers: Answers,
    split: Split,
    limits: AgreementLimits,
    calibration: Calibration | None,
) -> SmallerFile:
    answers = _answers(run, OnnxSession(variant_file.model, output=run.preprocess.output), float_answers.rows)
    if nonfinite := int((~np.isfinite(answers.logits).all(1)).sum()):
        reason = f"gives logits that are no numbers (NaN or infinite) for {nonfinite} of {len(answers.rows)} {split} images"
        raise FgvcError(f"model.{variant_file.variant}.onnx is refused:\n  {reason}\n{ADVICE[variant_file.variant]}")
    agreement = measure_agreement(float_answers.rows, float_answers.labels, float_answers.logits, answers.logits, split=split)
    failures = agreement.failures(limits)
    page = f"reports/{variant_file.variant}.html"
    stored = store_measured(run.folder, {page: agreement_page(run.index, variant_file, agreement, limits, failures)})
    if failures:
        lines = [*failures, *(_line(run, row) for row in _listed(run, agreement)[:5])]
        advice, all_of = ADVICE[variant_file.variant], f"\nall: {run.folder / page}" if stored else ""
        raise FgvcError(f"model.{variant_file.variant}.onnx is refused:\n  " + "\n  ".join(lines) + f"\n{advice}" + all_of)
    section = {
        **variant_file.contract,
        "agreement": {
            **agreement.numbers(),
            **_errors(float_answers, answers, split, calibration),
            "bars": {"agreement": limits.agreement, "loss": limits.loss},
            "differing": len(agreement.differing),
            "worst_images": _listed(run, agreement),
        },
    }
    return SmallerFile(variant_file=variant_file, agreement=agreement, section=section)


def _errors(float_answers: Answers, answers: Answers, split: Split, calibration: Calibration | None) -> dict[str, float]:
    """Calibration errors of the float file and of the smaller one, by the bundle's temperature."""
    if calibration is None or calibration.fitted_on != split:
        return {}
    sides = {"ece_float": float_answers, "ece": answers}
    return {name: measure(side.logits, side.labels, calibration, ending=side.ending).after.ece for name, side in sides.items()}


def _listed(run: LoadedRun, agreement: Agreement) -> list[dict[str, Any]]:
    names, paths = run.classes, run.index.paths
    return [
        {
            "path": str(paths[image.row]), "label": names[image.label], "float": names[image.by_float],
            "variant": names[image.by_variant], "margin": round(image.margin, 6),
        }
        for image in agreement.differing[:LISTED]
    ]  # fmt: skip


def _line(run: LoadedRun, row: Mapping[str, Any]) -> str:
    return (
        f"{row['path']} ({row['label']}): {row['float']} becomes {row['variant']}, by a margin of {row['margin']:.3f}"
    )


def _limits(limits: AgreementLimits, agreement: float | None) -> AgreementLimits:
    return limits if agreement is None else replace(limits, agreement=agreement)


def _calibration(run: LoadedRun, count: int) -> Iterator[np.ndarray]:
    """Yield up to `count` train images, evenly over the classes, as serving sees them."""
    rows = run.rows("train")
    rows = spread(rows[np.argsort(run.index.labels[rows], kind="stable")], count)
    for batch in evaluation_loader(run.index, rows, spec=run.preprocess, batch_size=64, workers=0, what="smaller files"):
        yield batch.images.numpy()


def _answers(run: LoadedRun, session: OnnxSession, rows: NDArray[np.int64]) -> Answers:
    return onnx_answers(session, run.index, rows, spec=run.preprocess, workers=run.recipe.train.workers)
