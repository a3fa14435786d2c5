"""`fgvc export --int8 --fp16`: smaller files beside the proven one, and how far they answer as it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import Split
from fgvc.config.runtime import Calibration
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.evaluation.agreement import FP16, INT8, Agreement, Bars, agree
from fgvc.evaluation.calibration import measure, spread
from fgvc.exporting.prove import ProvedExport
from fgvc.exporting.quantize import LOWEST_OPSET, Int8, opset_of
from fgvc.exporting.variant import VariantFile, make_fp16, make_int8
from fgvc.report.agreement import agreement_page
from fgvc.runs.loaded import Answers, LoadedRun, onnx_answers
from fgvc.runs.measured import leave
from fgvc.runtime.engine import Session

LISTED = 20  # images in contract.json; all are on the page
ADVICE = {
    "int8": "try more images to calibrate with (--int8-images), more of the first layers in float (--int8-float), or a lower "
    "bar (--agreement); weights of 7 bits, for CPUs without VNNI, lose most (--full-range)",
    "fp16": "values beyond 65,504, or logits that lie very close; try a lower bar (--agreement)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variants:
    """What is asked for beside model.onnx."""

    int8: Int8 | None = None
    fp16: bool = False
    agreement: float | None = None  # other than the bars of INT8 and FP16

    def __post_init__(self) -> None:
        if self.agreement is not None and not 0 < self.agreement <= 1:
            raise FgvcError(f"--agreement {self.agreement:g}: a share above 0 and up to 1, such as {INT8.agreement}")
        if self.int8 is not None and (self.int8.images < 1 or self.int8.first < 0):
            raise FgvcError("--int8-images: at least 1; --int8-float: 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallerFile:
    """A smaller file that passed. `section`: of contract.json."""

    made: VariantFile
    agreement: Agreement
    section: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"model.{self.made.variant}.onnx"


def make_variants(
    run: LoadedRun, proven: ProvedExport, wanted: Variants, calibration: Calibration | None = None
) -> list[SmallerFile]:
    """The files that are wanted, each compared with the float file on the validation split, or on train where there is none.

    On up to 10,000 images; of validation with the calibration error that each has by the bundle's temperature; without those
    that `left_out` names. Writes `<run>/reports/{int8,fp16}.html`, also where a file is refused. Raises FgvcError where one gives
    logits that are no numbers, is not what the plain backbone becomes, or answers too differently.
    """
    made = []
    if wanted.int8 is not None and not left_out(proven, wanted):
        made.append((make_int8(*proven.plain, _calibration(run, wanted.int8.images), wanted.int8), INT8))
    if wanted.fp16:
        made.append((make_fp16(*proven.plain), FP16))
    if not made:
        return []
    split: Split = "val" if len(run.index.rows("val")) else "train"
    known = _ask(run, proven.model, spread(run.rows(split), len(run.classes)))
    return [_judge(run, one, known, split, _bars(bars, wanted.agreement), calibration) for one, bars in made]


def left_out(proven: ProvedExport, wanted: Variants) -> dict[str, str]:
    """The wanted files that the deployed opset does not allow, and why."""
    opset = opset_of(proven.plain[0].proto)
    if wanted.int8 is None or opset >= LOWEST_OPSET:
        return {}
    return {"model.int8.onnx": f"needs opset {LOWEST_OPSET} or newer, and model.onnx is of opset {opset}"}


def _judge(
    run: LoadedRun, made: VariantFile, known: Answers, split: Split, bars: Bars, calibration: Calibration | None
) -> SmallerFile:
    said = _ask(run, made.model, known.rows)
    if wild := int((~np.isfinite(said.logits).all(1)).sum()):
        reason = f"gives logits that are no numbers (NaN or infinite) for {wild} of {len(said.rows)} {split} images"
        raise FgvcError(f"model.{made.variant}.onnx is refused:\n  {reason}\n{ADVICE[made.variant]}")
    found = agree(known.rows, known.labels, known.logits, said.logits, split=split)
    failed = found.failed(bars)
    page = f"reports/{made.variant}.html"
    stored = leave(run.folder, {page: agreement_page(run.index, made, found, bars, failed)})
    if failed:
        lines = [*failed, *(_line(run, one) for one in _listed(run, found)[:5])]
        advice, all_of = ADVICE[made.variant], f"\nall: {run.folder / page}" if stored else ""
        raise FgvcError(f"model.{made.variant}.onnx is refused:\n  " + "\n  ".join(lines) + f"\n{advice}" + all_of)
    section = {
        **made.contract,
        "agreement": {
            **found.numbers(),
            **_errors(known, said, split, calibration),
            "bars": {"agreement": bars.agreement, "loss": bars.loss},
            "differing": len(found.differing),
            "worst_images": _listed(run, found),
        },
    }
    return SmallerFile(made=made, agreement=found, section=section)


def _errors(known: Answers, said: Answers, split: Split, calibration: Calibration | None) -> dict[str, float]:
    """Calibration error of the float file and of the smaller one, by the one temperature that the bundle has for both."""
    if calibration is None or calibration.fitted_on != split:
        return {}
    sides = {"ece_float": known, "ece": said}
    return {name: measure(one.logits, one.labels, calibration).after.ece for name, one in sides.items()}


def _listed(run: LoadedRun, found: Agreement) -> list[dict[str, Any]]:
    names, paths = run.classes, run.index.paths
    return [
        {
            "path": str(paths[one.row]), "label": names[one.label], "float": names[one.by_float],
            "variant": names[one.by_variant], "margin": round(one.margin, 6),
        }
        for one in found.differing[:LISTED]
    ]  # fmt: skip


def _line(run: LoadedRun, row: Mapping[str, Any]) -> str:
    return (
        f"{row['path']} ({row['label']}): {row['float']} becomes {row['variant']}, by a margin of {row['margin']:.3f}"
    )


def _bars(bars: Bars, agreement: float | None) -> Bars:
    return bars if agreement is None else replace(bars, agreement=agreement)


def _calibration(run: LoadedRun, count: int) -> Iterator[np.ndarray]:
    """Up to `count` train images, evenly over the classes, as serving sees them."""
    rows = run.rows("train")
    rows = rows[np.argsort(run.index.labels[rows], kind="stable")]
    rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    for batch in evaluation_loader(run.index, rows, spec=run.preprocess, batch_size=64, workers=0):
        yield batch.images.numpy()


def _ask(run: LoadedRun, model: bytes, rows: NDArray[np.int64]) -> Answers:
    return onnx_answers(Session(model), run.index, rows, spec=run.preprocess, workers=run.recipe.train.workers)
