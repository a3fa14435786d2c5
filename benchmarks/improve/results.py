"""Writes what finished improvements showed as a table: a row for each folder of `fgvc improve`.

python benchmarks/improve/results.py results.csv better-0/ better-1/ ...

Rows that the table has stay, but for those of the same file, set, budget, starts and seed. All figures are the verdict's, on
images that no rung saw, read once. `minutes` is the working time, of `budget`.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

KEYS = ("file", "set", "budget", "starts", "seed")
FIELDS = (
    *KEYS, "minutes", "images", "old", "new", "gain", "low", "high", "plain", "floor", "repaired", "broken", "ships", "choices",
    "fgvc", "torch", "cpu", "cpus",
)  # fmt: skip


def row(folder: Path) -> dict[str, Any]:
    """The row of a finished improvement."""
    verdict, task, rungs, clock, plan = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("verdict", "task", "rungs", "clock", "plan")
    )
    request, others = task["request"], verdict["others"]
    env = json.loads(next(iter(sorted((folder / "runs").glob("*/env.json")))).read_text())
    points = {name: f"{100 * verdict[name]:.2f}" for name in ("old", "new", "low", "high")}
    points |= {name: f"{100 * others[name]:.2f}" for name in ("plain", "floor") if name in others}
    return points | {
        "file": Path(request["target"]).name, "set": Path(request["data"]).name, "budget": f"{plan['budget'] / 60:g}m",
        "starts": " ".join(start.partition("=")[0] for start in request["starts"]), "seed": request["seed"],
        "minutes": f"{clock['seconds'] / 60:.1f}", "images": verdict["images"],
        "gain": f"{100 * (verdict['new'] - verdict['old']):+.2f}", "repaired": verdict["repaired"], "broken": verdict["broken"],
        "ships": rungs["choices"]["ships"], "choices": json.dumps(rungs["choices"], sort_keys=True),
        "fgvc": env["fgvc"], "torch": env["torch"], "cpu": env["cpu"], "cpus": env["cores"],
    }  # fmt: skip


def main() -> None:
    table, *folders = map(Path, sys.argv[1:])
    rows = {tuple(str(old[key]) for key in KEYS): old for old in csv.DictReader(table.open())} if table.exists() else {}
    for folder in folders:
        new = row(folder)
        rows[tuple(str(new[key]) for key in KEYS)] = new
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
