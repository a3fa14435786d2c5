"""A table of cells, their folds pooled: what each gained over the floor of the same images, and over the first cell.

    python benchmarks/base/table.py benchmarks/base/A-cub50.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from fgvc.evaluation.paired import paired_gain
from fgvc.io.bits import unpack


def main(table: Path) -> None:
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))
    cells: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    over = "over the floor (95 %)"
    head = ["cell", "folds", "end %", over, "EMA %", over, "best share of the way %", "fresh probe %", "seconds"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, own in cells.items():
        floor = _right(own, "floor_right")
        said = [name, " ".join(row["fold"] for row in own)]
        for key in ("end_right", "ema_right"):
            right = _right(own, key) if all(row[key] for row in own) else None
            said += ["", ""] if right is None else [f"{100 * right.mean():.2f}", gain(floor, right)]
        shares = [max(map(float, row["interpolated"].split())) for row in own if row["interpolated"]]
        probes, seconds = [float(row["fresh_probe"]) for row in own], [float(row["seconds"]) for row in own]
        said += [f"{np.mean(shares):.2f}" if shares else "", f"{np.mean(probes):.2f}", f"{np.mean(seconds):.0f}"]
        print(f"| {' | '.join(said)} |")


def _right(rows: list[dict[str, str]], key: str) -> np.ndarray:
    """(N,) bool over the images of all folds."""
    return np.concatenate([unpack(row[key], int(row["held_out"])) for row in rows])


def gain(floor: np.ndarray, right: np.ndarray) -> str:
    points, low, high = (100 * share for share in paired_gain(floor, right))
    return f"{points:+.2f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
