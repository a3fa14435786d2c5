"""Fill the tables of the docs from the committed CSV files: `python docs/tables.py` (with --check: only compare).

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`; FILE is below docs/results/. With
`<!-- table: FILE.csv columns: a,b -->` it has these columns only. `<!-- matrix: FILE.csv -->` is for lines of backbone, family,
technique, result and detail: a row for each backbone, a column for each technique, reasons as notes below. Of the runs of a
study, `<!-- study: FILE.csv part: test budget: epochs -->` is the table of its arms, and `<!-- trials: FILE.csv ... -->` that of
all trials.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from fgvc.ablate.table import lines, markdown

DOCS = Path(__file__).parent
BLOCK = re.compile(
    r"(<!-- (?P<kind>table|matrix|study|trials): (?P<file>\S+)(?: columns: (?P<columns>\S+))?"
    r"(?: part: (?P<part>\S+) budget: (?P<budget>\S+))? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def table(path: Path, columns: str | None) -> str:
    """A CSV, or some columns of it, as a Markdown table."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file))
    kept = [head.index(name) for name in (columns.split(",") if columns else head)]
    shown = [[row[at] for at in kept] for row in (head, ["---"] * len(head), *rows)]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |\n" for row in shown)


def matrix(path: Path) -> str:
    """Backbones by techniques: a tick, the number of a reason, or nothing where nobody tried."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    notes: dict[str, int] = {}

    def cell(row: dict[str, str] | None) -> str:
        if row is None:
            return ""
        if row["result"] == "yes":  # of an export, how far onnxruntime is from torch
            return row["detail"].partition(";")[0] if row["technique"] == "ONNX" else "✓"
        return f"{row['result']} ({notes.setdefault(row['detail'].replace('|', '/'), len(notes) + 1)})"

    techniques = list(dict.fromkeys(row["technique"] for row in rows))
    families = {row["backbone"]: row["family"] for row in rows}
    found = {(row["backbone"], row["technique"]): row for row in rows}
    shown = [["backbone", "family", *techniques], ["---"] * (len(techniques) + 2)]
    shown += [[name, of, *(cell(found.get((name, kind))) for kind in techniques)] for name, of in families.items()]
    below = "".join(f"{number}. {reason}\n" for reason, number in notes.items())
    return "".join("| " + " | ".join(row) + " |\n" for row in shown) + (f"\n{below}" if below else "")


def study(path: Path, part: str, budget: str, *, apart: bool) -> str:
    """The arms of a study beside its first; `apart`: every trial is an arm of its own."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if apart:
        rows = [row | {"arm": f"{row['arm']} {row['trial']}", "trial": "1"} for row in rows]
    return markdown(lines(rows, part=part, budget=budget))


def block(m: re.Match[str]) -> str:
    path = DOCS / "results" / m["file"]
    made = {
        "matrix": lambda: matrix(path),
        "table": lambda: table(path, m["columns"]),
        "study": lambda: study(path, m["part"], m["budget"], apart=False),
        "trials": lambda: study(path, m["part"], m["budget"], apart=True),
    }
    return m[1] + made[m["kind"]]() + m["end"]


def filled(text: str) -> str:
    return BLOCK.sub(block, text)


def main(arguments: list[str]) -> int:
    stale = []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if filled(text) != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(filled(text), encoding="utf-8")
    print("\n".join(f"{name}: table out of date" if "--check" in arguments else f"{name}: written" for name in stale))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
