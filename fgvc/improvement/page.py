"""The HTML report of an improvement, for managers and engineers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fgvc.data.index import decode_row
from fgvc.errors import FgvcError
from fgvc.evaluation.compared import PairedAnswers
from fgvc.images.address import picture
from fgvc.improvement.ladder import PLAIN, Rung
from fgvc.improvement.task import Task
from fgvc.improvement.verdict import Verdict
from fgvc.io.files import write_atomic
from fgvc.report.certificate import recorded_proofs
from fgvc.report.document import duration
from fgvc.report.render import render
from fgvc.runtime.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    from fgvc.improvement.outcome import Outcome
    from fgvc.improvement.rungs import Ladder

SHOWN = 12  # repaired pictures, and as many broken ones


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture whose answer changed from right to wrong or back, with the class map of the new classifier."""

    flip: Mapping[str, Any]  # a row of `PairedAnswers.flips`
    picture: str
    map: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A rung in the table."""

    rung: Rung
    epochs: int
    outcome: Outcome | None
    gain: float | None  # points over the deployed file, on the images that choose
    ships: bool


def write_page(
    task: Task, ladder: Ladder, answers: PairedAnswers, verdict: Verdict, *, bundle: Path, start: float | None, out: Path
) -> None:
    """Write `out`. `bundle`: the new classifier's; `start`: accuracy of the deployed one on the images that choose."""
    opened = load_bundle(bundle)
    shown = bundle.parent / ("bundle" if verdict.better else bundle.name)
    write_atomic(
        out,
        render(
            "improve.html",
            title=f"{task.name}: {'a better file' if verdict.better else 'no better file is shown'}",
            task=task, plan=ladder.plan, verdict=verdict, answers=answers, pair=answers.paired, folder=shown.parent, bundle=shown,
            rows=_rows(ladder, start), start=start, share=ladder.choices.get("share", 1.0), ships=ladder.ships.name, plain=PLAIN,
            repaired=_shots(answers, opened, "positive"), broken=_shots(answers, opened, "negative"),
            classes=[row for row in answers.paired.by_class(answers.classes) if row["negative_flips"] or row["positive_flips"]],
            proofs=recorded_proofs(opened), command=ladder.command, duration=duration,
        ),
    )  # fmt: skip


def _rows(ladder: Ladder, start: float | None) -> list[Row]:
    rows = []
    for rung in ladder.plan.rungs:
        outcome = ladder.outcomes.get(rung.name)
        scored = outcome is not None and outcome.of > 0 and start is not None
        gain = outcome.accuracy - start if scored and outcome is not None and start is not None else None
        rows.append(Row(rung, ladder.epochs(rung), outcome, gain, ladder.ships.name.startswith(rung.name)))
    return rows


def _shots(answers: PairedAnswers, bundle: Bundle, kind: str) -> list[Shot]:
    """Select pictures whose answers changed, those of which the new classifier is most confident first, with the map of its
    answer."""
    flips = [flip for flip in answers.flips() if flip["flip"] == kind]
    flips = sorted(flips, key=lambda flip: -flip["b_confidence"])[:SHOWN]
    rows = dict(zip(map(str, answers.paths), answers.rows.tolist(), strict=True))
    images = [decode_row(answers.images, rows[flip["path"]]) for flip in flips]
    return [Shot(flip, picture(image), drawn) for flip, image, drawn in zip(flips, images, _maps(images, bundle), strict=True)]


def _maps(images: Sequence[Image.Image], bundle: Bundle) -> list[str | None]:
    """Class maps over the pictures as the network sees them; None where the bundle has none."""
    try:
        return [picture(explained.overlay) for explained in bundle.explain(images)]
    except FgvcError:
        return [None] * len(images)
