"""Report of one or more runs as a page that needs no network, no script and no second file (`fgvc report`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PosixPath
from typing import Any

import yaml

from fgvc.config.data import Split
from fgvc.config.loading import differences, dump, leaves
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.data.unseen import judged
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import Calibrated
from fgvc.evaluation.evaluate import over_floor
from fgvc.evaluation.metrics import SMALLER_IS_BETTER, Scores, score_logits
from fgvc.evaluation.paired import Paired, wilson
from fgvc.evaluation.temperature import calibration
from fgvc.images.preprocess import described
from fgvc.io.files import refuse_file, write_atomic, writing
from fgvc.io.names import distinct_names
from fgvc.report.certificate import Certificate, certificates
from fgvc.report.confusion import ConfusionTable, confusion_table
from fgvc.report.gallery import Gallery, gallery
from fgvc.report.html_charts import Chart, calibration_charts, curves, terms
from fgvc.report.localization import COLUMNS, Table, localisation
from fgvc.report.render import render
from fgvc.runs.history import History, interpolation_remark, read_history
from fgvc.runs.loaded import Answers, LoadedRun
from fgvc.runtime.bundle import Bundle
from fgvc.runtime.engine import refuse_no_numbers

SHARES = {
    "top1": "top-1",
    "top5": "top-5",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced accuracy",
    "ece": "calibration error",
}
FLOOR = ("top-1 of the floor: logistic regression on the frozen net", "gain over the floor, 95 % interval")
LISTED = 15  # classes shown at once; all others fold out
NAMED = 50  # unreadable files listed


class Page(PosixPath):
    """The path of a page that was written; a notebook shows the page."""

    def _repr_html_(self) -> str:
        place = escape(str(self))
        return f'<a href="{place}">{place}</a><iframe src="{place}" width="100%" height="600"></iframe>'


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChapter:
    """Contents of the page about one run."""

    name: str
    run: LoadedRun
    split: Split
    answers: Answers
    scores: Scores
    calibrated: Calibrated
    history: History
    gallery: Gallery
    certificate: Certificate | None  # None: no bundle was given
    localisation: list[Table] | None  # None: not measured
    over_floor: Paired | None  # A: the floor, B: the run, on the same images; None: it has no floor

    @property
    def facts(self) -> dict[str, str]:
        """Facts of the run and its training, with the same keys for every run, so that they can stand side by side."""
        recipe, epochs = self.run.recipe, len(self.history.epochs)
        size = " × ".join(str(side) for side in recipe.image.size)
        seconds = self.history.seconds
        done = f"{epochs} of {recipe.train.epochs}"
        return {
            "network": f"{recipe.model.name} at {size}",
            "techniques": ", ".join(enabled_techniques(recipe.techniques)) or "none",
            "preprocessing": described(self.run.preprocess),
            "weights": self.run.select,
            "epochs": done + ("" if seconds is not None else ", not finished"),
            "training time": duration(seconds) if seconds is not None else "",
            "started": self.history.started,
            "seed": str(recipe.train.seed),
            "interpolated": interpolation_remark(self.run.folder),
            "images": self.judged,
        }

    @property
    def classes(self) -> list[dict[str, Any]]:
        """Rows of `Scores.by_class`, the worst recall first; classes without an image last."""
        rows = self.scores.by_class(self.run.classes)
        return sorted(rows, key=lambda row: (row["recall"] == "", row["recall"] or 0.0, -int(row["images"])))

    @property
    def judged(self) -> str:
        """Description of the images where they are those that a deployed file was not trained on."""
        return judged(self.run.index, self.split, self.scores.images)

    @property
    def calibration(self) -> list[Chart]:
        return calibration_charts(self.calibrated)

    @property
    def terms(self) -> list[Chart]:
        return terms(self.history)

    @property
    def interval(self) -> str:
        low, high = wilson(self.scores.top1, self.scores.images)
        return f"{100 * low:.1f} to {100 * high:.1f}"

    @property
    def verdict(self) -> str:
        """Beside its floor: gain, loss, unclear, or none where it has no floor."""
        return "none" if self.over_floor is None else self.over_floor.verdict

    @property
    def confusion(self) -> ConfusionTable:
        return confusion_table(self.scores.confusion, self.run.classes)

    @property
    def floor(self) -> tuple[str, str]:
        """Top-1 of a logistic regression on the frozen net, and the run's gain over it; empty where there is none."""
        if (pair := self.over_floor) is None:
            return "", ""
        gain = f"{100 * pair.gain:+.2f} points, {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
        return f"{100 * pair.a_right.mean():.2f} %", gain

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Key and value of the settings that are not fgvc's defaults."""
        changed = self.run.recipe.model_dump(mode="json", exclude_defaults=True)
        return [(key, setting_text(value)) for key, value in leaves(changed)]

    @property
    def config(self) -> str:
        return dump(self.run.recipe)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of all runs; `best`: positions of the best cells."""

    label: str
    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()


def report(
    runs: Sequence[LoadedRun],
    out: Path,
    *,
    bundles: Sequence[Bundle] = (),
    split: Split | None = None,
    device: str | None = None,
    images: int = 10,
) -> Page:
    """Score the runs on one split of their data (default: those that judge where a run descends from a deployed file, else
    val, else test) and write the page; the same runs give the same bytes.

    `bundles`: what runs were exported to, each shown with the run whose logits it gives. `images`: pictures a section.
    Raises FgvcError where runs have different classes, or a bundle holds none of the runs' weights.
    """
    refuse_file(out)
    folders = [run.folder for run in runs]
    if len({folder.resolve() for folder in folders}) < len(runs):
        raise FgvcError("the same run twice: name each run once")
    _refuse_other_classes(runs)
    splits = [run.rows_of(split or ("test" if run.index.unseen else None)) for run in runs]
    if len({split for split, _ in splits}) > 1:
        raise FgvcError("not all of the runs have a validation split: give --split test")
    answers = [run.answers(rows, device=device) for run, (_, rows) in zip(runs, splits, strict=True)]
    for run, answer in zip(runs, answers, strict=True):
        refuse_no_numbers(answer.logits, run.folder)
    proven = certificates(bundles, runs, answers)
    chapters = []
    for at, (name, run, answer) in enumerate(zip(distinct_names(folders), runs, answers, strict=True)):
        scores = score_logits(answer.logits, answer.labels)
        calibrated = calibration(run, device=device).measure(splits[at][0], (answer.logits, answer.labels))
        chapters.append(
            RunChapter(
                name=name,
                run=run,
                split=splits[at][0],
                answers=answer,
                scores=scores,
                calibrated=calibrated,
                history=read_history(run.folder),
                gallery=gallery(run, answer, scores, calibrated.fitted, images=images, device=device),
                certificate=proven.get(at),
                localisation=localisation(run),
                over_floor=over_floor(run, answer.logits.argmax(1) == answer.labels, splits[at][0], device=device),
            )
        )
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, _page(chapters))
    return Page(out)


def _page(chapters: Sequence[RunChapter]) -> str:
    names = [chapter.name for chapter in chapters]
    paths = [{str(chapter.run.index.paths[row]) for row in chapter.answers.rows} for chapter in chapters]
    return render(
        "report.html",
        title=f"Report: {names[0]}" if len(names) == 1 else f"Report: {len(names)} runs",
        chapters=chapters,
        rows=_side_by_side(chapters),
        same_images=all(run_paths == paths[0] for run_paths in paths),
        curves=curves(names, [chapter.history for chapter in chapters]),
        differing=_differing([chapter.run.recipe for chapter in chapters]),
        shares=SHARES,
        listed=LISTED,
        named=NAMED,
        columns=COLUMNS,
    )


def _refuse_other_classes(runs: Sequence[LoadedRun]) -> None:
    first = runs[0]
    for other in runs[1:]:
        if other.classes != first.classes:
            in_one = sorted(set(first.classes) ^ set(other.classes))
            why = f"{in_one[0]!r} is in one alone" if in_one else "the same names in another order"
            raise FgvcError(
                f"{first.folder} and {other.folder} have different classes ({len(first.classes)} and {len(other.classes)}; "
                f"{why}): one report compares runs on the same classes; make one for each"
            )


def _side_by_side(chapters: Sequence[RunChapter]) -> list[Row]:
    rows = []
    for key, label in {**SHARES, "loss": "log loss"}.items():
        values = [float(getattr(chapter.scores, key)) for chapter in chapters]
        cells = tuple(f"{value:.4f}" if key == "loss" else f"{100 * value:.2f} %" for value in values)
        best = min(values) if key in SMALLER_IS_BETTER else max(values)
        rows.append(Row(label, cells, frozenset(at for at, value in enumerate(values) if value == best)))
        if key == "top1":
            rows.append(Row("top-1, 95 % interval", tuple(f"{chapter.interval} %" for chapter in chapters)))
            if any(chapter.over_floor for chapter in chapters):
                floors = zip(*(chapter.floor for chapter in chapters), strict=True)
                rows += [Row(name, tuple(cell or "–" for cell in cells)) for name, cells in zip(FLOOR, floors, strict=True)]
    for label in chapters[0].facts:
        rows.append(Row(label, tuple(chapter.facts[label] or "–" for chapter in chapters)))
    return rows


def _differing(recipes: Sequence[Recipe]) -> list[tuple[str, tuple[str, ...]]]:
    """Keys in which a recipe differs from the first, with the value of each."""
    trees = [recipe.model_dump(mode="json") for recipe in recipes]
    keys = sorted({key for tree in trees[1:] for key in differences(trees[0], tree)})
    return [(key, tuple(setting_text(_at(tree, key)) for tree in trees)) for key in keys]


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def setting_text(value: Any) -> str:
    """Text of a setting: YAML, in lines where it is a tree."""
    if isinstance(value, Mapping) and value:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).strip()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Text of a duration in hours, minutes and seconds, the two largest of them."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{left} s"
