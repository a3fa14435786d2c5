"""Page of a data check: the faults of a set, with its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fgvc.config.data import SPLITS
from fgvc.data.index import decode_row
from fgvc.data.quality.checks import Report
from fgvc.data.quality.suspects import Suspect
from fgvc.images.address import picture
from fgvc.report.render import render

SUSPECTS = 60  # labels shown
GROUPS = 60  # groups of copies shown, of all kinds together
COPIES = 4  # images shown of a group
LINES = 100  # classes, and files, named
SIDE = 192  # pixels of a picture


@dataclass(frozen=True, slots=True)
class Figure:
    """One image of the set, with its place and label."""

    address: str  # the picture itself
    path: str
    split: str
    label: str


@dataclass(frozen=True, slots=True)
class DuplicateGroup:
    """A group of images that show the same."""

    fault: str  # what makes it an error; "" for a mere repetition
    figures: tuple[Figure, ...]
    more: int


@dataclass(frozen=True, slots=True)
class LabelDoubt:
    """An image whose label looks wrong."""

    figure: Figure
    suggested: str
    label_probability: float
    suggested_probability: float


def data_page(report: Report) -> str:
    """Render the page of a report: self-contained, a few megabytes at most. Raises ImageError where an image has gone since."""
    index = report.index
    copies = _ordered(report)
    suspects = report.suspects.listed if report.suspects else ()
    return render(
        "data.html",
        title=f"Data check: {index.root.resolve().name}",
        report=report,
        total=len(index),
        splits=SPLITS,
        classes=_classes(report),
        sizes=_sizes(report.sizes[report.sizes[:, 0] > 0]),
        copies=[
            DuplicateGroup(fault, tuple(_figure(report, row) for row in report.shown(rows, COPIES)), len(rows[COPIES:]))
            for rows, fault in copies[:GROUPS]
        ],
        all_copies=len(copies),
        all_doubts=len(suspects),
        doubts=[_doubt(report, suspect) for suspect in suspects[:SUSPECTS]],
        unreadable=[(str(index.paths[row]), reason) for row, reason in report.unreadable],
        damaged=[(str(index.paths[row]), what) for row, what in sorted(report.stored.damage.items())],
        tiny=[(str(index.paths[row]), " x ".join(map(str, report.sizes[row]))) for row in report.tiny],
        lines=LINES,
    )


def _ordered(report: Report) -> list[tuple[tuple[int, ...], str]]:
    """Groups of copies with the fault that makes each an error, errors first. A group of near copies includes the equal ones."""
    near = {row for rows in report.near for row in rows}
    groups = [*report.near, *(rows for rows in report.duplicates if rows[0] not in near)]
    across = {
        name: {row for rows in (*equal, *pairs) for row in rows}
        for name, equal, pairs in (
            ("split", report.leaks, report.near_leaks),
            ("label", report.conflicts, report.near_conflicts),
        )
    }

    def fault(rows: tuple[int, ...]) -> str:
        several = [name for name, flagged in across.items() if flagged & set(rows)]
        return f"more than one {' and '.join(several)}" if several else ""

    return sorted(((rows, fault(rows)) for rows in groups), key=lambda group: (not group[1], group[0]))


def _figure(report: Report, row: int) -> Figure:
    index = report.index
    address = picture(decode_row(index, row), side=SIDE)
    return Figure(address, str(index.paths[row]), SPLITS[index.splits[row]], index.classes[index.labels[row]])


def _doubt(report: Report, suspect: Suspect) -> LabelDoubt:
    return LabelDoubt(_figure(report, suspect.row), report.index.classes[suspect.suggested], suspect.p_label, suspect.p_suggested)


def _classes(report: Report) -> list[tuple[str, list[int], list[float]]]:
    """Classes by name, with images by split and in per cent of the largest class: all, or those with most and fewest images."""
    totals = report.counts.sum(axis=0)
    order = np.argsort(-totals, kind="stable")
    if len(order) > LINES:
        order = np.r_[order[: LINES // 2], order[-(LINES // 2) :]]
    largest = max(int(totals.max(initial=0)), 1)
    return [
        (report.index.classes[k], report.counts[:, k].tolist(), (100 * report.counts[:, k] / largest).tolist())
        for k in order.tolist()
    ]


def _sizes(sizes: np.ndarray) -> list[tuple[str, Sequence[str]]]:
    """Quantiles of widths, heights and their ratio of sizes (N,2); [] where there are none."""
    if not len(sizes):
        return []
    width, height = sizes[:, 0], sizes[:, 1]
    facts = (
        ("width", width, "{:.0f}"),
        ("height", height, "{:.0f}"),
        ("width / height", width / height, "{:.2f}"),
    )
    return [
        (name, [form.format(value) for value in np.quantile(of, (0, 0.05, 0.5, 0.95, 1))]) for name, of, form in facts
    ]
