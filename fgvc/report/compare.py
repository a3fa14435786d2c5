"""Page of a comparison: figures, classes that changed, and the images that the new classifier breaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fgvc.data.index import decode_row
from fgvc.errors import FgvcError
from fgvc.evaluation.compared import FLIP_COLUMNS, PairedAnswers
from fgvc.images.address import picture
from fgvc.io.files import refuse_file, write_atomic, writing
from fgvc.io.tables import as_csv
from fgvc.report.render import render

SHOWN = 60  # images; all flips are in the table beside the page


def refuse_out(out: Path) -> None:
    """Raise FgvcError where no page can be written; call it before the long work."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise FgvcError(f"{out}: not a place for a page; name a file that ends in .html")
    for file in (out, *_table_paths(out)):
        refuse_file(file)


def _table_paths(out: Path) -> tuple[Path, Path]:
    """Paths of the tables of flips and of classes."""
    return out.with_suffix(".csv"), out.with_name(f"{out.stem}-classes.csv")


def write_page(
    answers: PairedAnswers, out: Path, *, failures: Sequence[str] = (), stack_threshold: float | None = None
) -> None:
    """Write `out`, and beside it a .csv of all flips and a -classes.csv. `failures`: those of the gate;
    `stack_threshold`: a confidence from which on a stack accepts answers."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    tables = _table_paths(out)
    flips, classes = answers.flips(), answers.paired.by_class(answers.classes)
    shown = [flip for flip in flips if flip["flip"] == "negative"][:SHOWN]
    row = dict(zip(map(str, answers.paths), answers.rows.tolist(), strict=True))
    page = render(
        "compare.html",
        title="What changes from A to B",
        answers=answers,
        pair=answers.paired,
        failures=failures,
        threshold=stack_threshold,
        accepted=[] if stack_threshold is None else answers.accepted(stack_threshold),
        changed=[row for row in classes if row["negative_flips"] or row["positive_flips"]],
        unchanged=sum(not (row["negative_flips"] or row["positive_flips"]) for row in classes),
        shown=[(flip, picture(decode_row(answers.images, row[flip["path"]]))) for flip in shown],
        table=tables[0].name,
    )
    for path, table in zip(tables, (as_csv(flips, FLIP_COLUMNS), as_csv(classes)), strict=True):
        write_atomic(path, table)
    write_atomic(out, page)
