"""Fill the tables of the docs from the committed CSV files: `python docs/tables.py` (with --check: only compare).

A table stands between `<!-- table: FILE.csv -->` and `<!-- end -->`; FILE is below docs/results/. With
`<!-- table: FILE.csv columns: a,b -->` it has these columns only. `<!-- matrix: FILE.csv -->` is for lines of backbone, family,
technique, result and detail: a row for each backbone, a column for each technique, reasons as notes below. Of the runs of a
study, `<!-- study: FILE.csv split: test budget: epochs -->` is the table of its arms, `<!-- trials: FILE.csv ... -->` that of all
trials, and `<!-- forest: FILE.csv ... -->` a picture of the arms' differences to the first. From the code come
`<!-- techniques -->`, what each technique says of itself, `<!-- layers -->`, the packages and which of them import which, and the
reference: `<!-- settings -->`, `<!-- technique settings -->`, `<!-- verbs -->` and `<!-- bundle -->` (`docs/reference.py`).
"""

from __future__ import annotations

import csv
import hashlib
import re
import sys
from functools import partial
from os.path import relpath
from pathlib import Path

import grimp
import reference
from matplotlib import rc_context

from fgvc.config.schema import recipe_schema, schema_file
from fgvc.config.techniques import load_object, settings_by_kind
from fgvc.io.files import as_json
from fgvc.report.render import svg
from fgvc.studies.page import forest
from fgvc.studies.table import Line, lines, markdown

DOCS = Path(__file__).parent
BLOCK = re.compile(
    r"(<!-- (?P<kind>techniques|layers|table|matrix|study|trials|forest|settings|technique settings|verbs|bundle)"
    r"(?:: (?P<file>\S+))?(?: columns: (?P<columns>\S+))?(?: split: (?P<split>\S+) budget: (?P<budget>\S+))? -->\n)"
    r".*?(?P<end><!-- end -->)",
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


def study(path: Path, split: str, budget: str, *, apart: bool = False) -> list[Line]:
    """The arms of a study beside its first; `apart`: every trial is an arm of its own."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if apart:
        rows = [row | {"arm": f"{row['arm']} {row['trial']}", "trial": "1"} for row in rows]
    return lines(rows, split=split, budget=budget)


def place(m: re.Match[str]) -> Path:
    """Of the picture of a study."""
    return DOCS / "pictures" / f"{Path(m['file']).stem}-{m['split']}-{m['budget']}.svg"


def drawn(m: re.Match[str]) -> bytes | None:
    """The picture of a study anew; None where that which is there is of these numbers. The numbers' hash is in the file, as its
    bytes differ between matplotlib's versions."""
    found = study(DOCS / "results" / m["file"], m["split"], m["budget"])
    digest = hashlib.sha256(markdown(found).encode()).hexdigest()
    if place(m).is_file() and digest in place(m).read_text(encoding="utf-8"):
        return None
    figure = forest(found)
    assert figure is not None, f"{m['file']}: no arm has a seed in common with the first"
    with rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        return svg(figure, Description=digest)


def techniques() -> str:
    """What each technique says of itself."""
    rows = [("technique", "what it does", "source", "forwards it adds to a step", "what it leaves behind"), ("---",) * 5]
    for kind, settings in settings_by_kind().items():
        made = load_object(settings.technique)
        does = (settings.__doc__ or "").strip().replace("\n    ", " ").rstrip(".")
        rows.append((f"`{kind}`", does, made.source, made.forwards, made.leaves))
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def layers() -> str:
    """The packages as a graph that GitHub draws: an arrow where one imports another, and no third one in between does so."""
    graph = grimp.build_graph("fgvc", include_external_packages=False, exclude_type_checking_imports=True)
    rooms = sorted(graph.find_children("fgvc"))
    of = {module: ".".join(module.split(".")[:2]) for module in graph.modules}
    edges = {(of[a], of[b]) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)}
    below: dict[str, set[str]] = {room: {b for a, b in edges if a == room and b != room and b in rooms} for room in rooms}

    def reach(room: str) -> set[str]:
        return below[room].union(*(reach(other) for other in below[room]))

    lines = ["```mermaid", "flowchart TD"]
    for room in rooms:
        through = set().union(*(reach(other) for other in below[room]))
        lines += [f"  {room.removeprefix('fgvc.')} --> {other.removeprefix('fgvc.')}" for other in sorted(below[room] - through)]
    return "\n".join([*lines, "```", ""])


def block(m: re.Match[str], page: Path) -> str:
    path = DOCS / "results" / (m["file"] or "")
    picture = Path(relpath(place(m), page.parent)) if m["kind"] == "forest" else None  # beside the page
    made = {
        "techniques": techniques,
        "layers": layers,
        "settings": reference.settings,
        "technique settings": reference.techniques,
        "verbs": reference.verbs,
        "bundle": reference.bundle,
        "matrix": lambda: matrix(path),
        "table": lambda: table(path, m["columns"]),
        "study": lambda: markdown(study(path, m["split"], m["budget"])),
        "trials": lambda: markdown(study(path, m["split"], m["budget"], apart=True)),
        "forest": lambda: f"![Differences to the first arm with their intervals]({picture})\n",
    }
    return m[1] + made[m["kind"]]() + m["end"]


def main(arguments: list[str]) -> int:
    stale: dict[Path, bytes] = {}
    for path in [*sorted(DOCS.parent.glob("*.md")), *sorted(DOCS.rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (filled := BLOCK.sub(partial(block, page=path), text)) != text:
            stale[path] = filled.encode()
        forests = [m for m in BLOCK.finditer(text) if m["kind"] == "forest"]
        stale |= {place(m): content for m in forests if (content := drawn(m)) is not None}
    schema = as_json(recipe_schema()).encode()
    if not schema_file().is_file() or schema_file().read_bytes() != schema:
        stale[schema_file()] = schema
    check = "--check" in arguments
    for path, content in stale.items():
        print(f"{path.relative_to(DOCS.parent)}: {'out of date' if check else 'written'}")
        if not check:
            path.write_bytes(content)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
