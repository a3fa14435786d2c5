"""Scores of a run on one split of its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fgvc.config.data import Split
from fgvc.config.recipe import Selected
from fgvc.data.loader import evaluation_loader
from fgvc.data.unseen import judged
from fgvc.errors import FgvcError, NoNumbersError
from fgvc.evaluation import metrics
from fgvc.evaluation.calibration import Calibrated, fitting_sample
from fgvc.evaluation.paired import Paired, Truths, compare_right, standing
from fgvc.evaluation.png_plots import plot_calibration, plot_confusion
from fgvc.evaluation.sample import Sample
from fgvc.evaluation.temperature import FITTED_ON, calibration
from fgvc.evaluation.tta import Views, average_views, canvas, refine_views
from fgvc.images.address import address
from fgvc.io.display import Display, figure
from fgvc.io.tables import as_csv
from fgvc.runs.loaded import LoadedRun
from fgvc.runs.weights import has_floor
from fgvc.runtime.engine import refuse_no_numbers


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation(Display):
    """Scores of one run's selected weights on one split; also in `<run>/metrics.json` under `<split>.<select>`.

    With averaged views the split is called `<split>-<views>`.
    """

    run: Path
    split: str
    select: Selected
    scores: metrics.Scores
    right: NDArray[np.bool_]  # (N,) of the readable images, in the order of the data
    unreadable: tuple[str, ...]
    classes: tuple[str, ...]
    calibrated: Calibrated | None  # None with averaged views, which no bundle has: their probabilities are not calibrated
    stored: bool = True  # in the run; not where that can't be written
    judged: str = ""  # which images, in words, where they are those that a deployed file was not trained on
    tested: bool = False  # whether the run has images that neither taught nor chose
    over_floor: Paired | None = None  # A: the run's floor, B: these weights, on the same images; None: not asked, or no floor

    @property
    def facts(self) -> Mapping[str, object]:
        s = self.scores
        shares = {"top-1": s.top1, "top-5": s.top5, "macro F1": s.macro_f1, "calibration error": s.ece}
        of = {"": self.run, "split": f"{self.split}, {s.images} images", "weights": self.select}
        return of | {name: f"{100 * share:.2f} %" for name, share in shares.items()} | {"loss": f"{s.loss:.4f}"}

    def _repr_html_(self) -> str:
        plot = plot_confusion(self.scores.confusion, self.classes, title=f"{self.split}: top-1 {100 * self.scores.top1:.1f} %")
        return Display._repr_html_(self) + figure([address(plot)], "", side=480)


def evaluate(
    run: LoadedRun,
    split: Literal["val", "test"] | None = None,
    *,
    device: str | None = None,
    views: Views | None = None,
    floor: bool = False,
) -> Evaluation:
    """Score a run's weights on `split` (default: val where there is one, else test), in fp32, on one process.

    The images are those that the run recorded when it began. `device`: another than the run was trained on. `views`: average over
    flips or crops, or look again at what a technique attends to (`refined`, of a run that was opened with its branches); no
    bundle does, so it is recorded under a key of its own. `floor`: score the run's floor, too, on the same images.
    Writes `metrics.json`, `tables/{classes,confused,reliability,risk-coverage}-<split>.csv` and
    `plots/{confusion,reliability,risk-coverage}-<split>.png` into the run (`-<split>-<select>` for other weights than the
    recipe's selection), calibration by up to 10,000 of the images and without `views` only: the temperature and threshold are
    the run's own, fitted on its validation split, whatever is scored. Of a run that can't be written nothing is stored, and
    stderr says so. Raises FgvcError where the split is empty, or a file of it is gone or of another size than when the run began.
    """
    run.measured("metrics.json")  # can be added to
    index, preprocess, select = run.index, run.preprocess, run.select
    split_name, rows = run.rows_of(split)
    spec = canvas(preprocess) if views is not None and "crops" in views else preprocess
    if spec is not preprocess and spec.size == preprocess.size:
        raise FgvcError(
            f"--views {views}: the deployed crop is the whole canvas here, so all crops are the same; use flip"
        )
    with run.on_device(device) as (place, layout):
        net = run.step.net
        unreadable: list[str] = []
        loader = evaluation_loader(index, rows, spec=spec, batch_size=64, workers=run.recipe.train.workers, what="scoring")
        classifier = net if views is None else average_views(net, views, preprocess.size)
        if views == "refined":
            classifier = refine_views(run.step.logits_and_crops, net)
        sample = Sample(classifier, fitting_sample(rows, len(index.classes)) if views is None else rows[:0])

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in loader:
                unreadable.extend(str(error) for error in batch.bad)
                sample.add_batch(batch)
                yield batch.images, batch.labels

        try:
            ending = run.preprocess.ending if views is None else None  # several views give log-probabilities
            scores = metrics.evaluate(
                sample, batches(), classes=len(index.classes), device=place, memory_format=layout, ending=ending
            )
        except NoNumbersError as error:
            raise NoNumbersError(f"{run.folder}: {select}, {split_name}: {error}; train anew with a lower optim.lr") from error
    calibrated = _calibrated(run, split_name, sample, device) if views is None else None
    name = split_name if views is None else f"{split_name}-{views}"
    files = _files(scores, calibrated, index.classes, split=split_name, stem="-".join([name, *run.suffix]))
    words = judged(index, split_name, scores.images)
    pair = over_floor(run, sample.right, split_name, device=device) if floor and views is None else None
    stored = run.store(files, {"metrics.json": {f"{name}.{select}": _numbers(scores, calibrated, words, pair)}})
    return Evaluation(
        run.folder, name, select, scores, sample.right, tuple(unreadable), index.classes, calibrated, stored, words,
        tested=len(index.rows("test")) > 0, over_floor=pair,
    )  # fmt: skip


def _numbers(scores: metrics.Scores, calibrated: Calibrated | None, words: str, pair: Paired | None) -> dict[str, Any]:
    """The entry of metrics.json."""
    unfitted = {"calibrated": False, "note": "no temperature is fitted for averaged views"}
    numbers: dict[str, Any] = scores.numbers() | {"calibration": unfitted if calibrated is None else calibrated.numbers()}
    return numbers | ({"judged": words} if words else {}) | ({} if pair is None else {"floor": standing(pair)})


def over_floor(run: LoadedRun, right: Truths, split: Split, *, device: str | None) -> Paired | None:
    """A run beside its floor on a split, whose readable images it names rightly or not (N,); None: it has none, or is it."""
    if run.select in ("start", "floor") or not has_floor(run.folder):
        return None
    floor = run.selecting("floor").answers(run.rows(split), device=device)
    refuse_no_numbers(floor.logits, run.folder)
    return compare_right(floor.labels, floor.logits.argmax(1) == floor.labels, right)


def _files(
    scores: metrics.Scores, calibrated: Calibrated | None, classes: Sequence[str], *, split: Split, stem: str
) -> dict[str, bytes]:
    """Plots and tables by their places in the run."""
    title = f"{split}: top-1 {100 * scores.top1:.1f} % of {scores.images} images"
    files = {f"plots/confusion-{stem}.png": plot_confusion(scores.confusion, classes, title=title)}
    tables: dict[str, Any] = {"classes": scores.by_class(classes), "confused": scores.confused(classes)}
    if calibrated is not None:
        files |= {f"plots/{file}": picture for file, picture in plot_calibration(calibrated, split=stem).items()}
        tables |= {"reliability": calibrated.rows(), "risk-coverage": calibrated.curve_rows()}
    return files | {f"tables/{table}-{stem}.csv": as_csv(lines).encode() for table, lines in tables.items()}


def _calibrated(run: LoadedRun, split: Split, sample: Sample, device: str | None) -> Calibrated | None:
    """Measure the run's temperature on the sample. None where none of its images can be read."""
    answers = sample.answers
    if not len(answers[1]):
        return None
    return calibration(run, outputs=answers if split == FITTED_ON else None, device=device).measure(split, answers)
