"""Fill the tables of the docs from the committed CSV files: `python docs/tables.py` (with --check: only compare).

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`; FILE is below docs/results/. With
`<!-- table: FILE.csv columns: a,b -->` it has these columns only.
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
BLOCK = re.compile(r"(<!-- table: (?P<file>\S+)(?: columns: (?P<columns>\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(path: Path, columns: str | None) -> str:
    """A CSV, or some columns of it, as a Markdown table."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file))
    kept = [head.index(name) for name in (columns.split(",") if columns else head)]
    lines = [[line[at] for at in kept] for line in (head, ["---"] * len(head), *rows)]
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def filled(text: str) -> str:
    return BLOCK.sub(lambda m: m[1] + table(DOCS / "results" / m["file"], m["columns"]) + m[4], text)


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
