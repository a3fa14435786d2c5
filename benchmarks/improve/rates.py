"""How fast should a deployed file's own net learn? Plain runs from the file at several rates, each scored between start and end.

    python benchmarks/improve/rates.py rates.csv DEPLOYED.onnx DATA --work RUNS [--labels FILE] [--rate 1e-4 ...] [overrides]
    python benchmarks/improve/rates.py rates.csv

The images are those that `fgvc improve` would learn from and choose by; those that judge are not read. A row for each rate: top-1
on the images that choose at each tenth of the way from the start (the file) to the end (the average of the weights), and which
images were right. Rows that are there are left alone. Without a file the table is printed, rates paired with the first.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fgvc import api
from fgvc.config.loading import merge
from fgvc.evaluation.paired import paired_gain
from fgvc.improvement.request import Request
from fgvc.improvement.task import look
from fgvc.io.bits import pack, unpack

RATES = ("3e-4", "1e-4", "1e-3")
FIELDS = ("file", "set", "rate", "epochs", "learned", "images", "way", "right")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", type=Path)
    parser.add_argument("file", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--rate", action="append")
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    if given.file is None:
        return _print(given.table)
    task = look(Request(target=given.file, data=given.data, budget=600, labels=given.labels), given.work, print)
    for rate in given.rate or RATES:
        name = {"file": Path(given.file).name, "set": given.data.name, "rate": rate, "epochs": str(given.epochs)}
        if any(name.items() <= row.items() for row in _rows(given.table)):
            continue
        tree = copy.deepcopy(dict(task.recipe))
        merge(tree, {"optim.lr": float(rate), "train.epochs": given.epochs, "train.validate_every": given.epochs})
        recipe = given.work / f"rate-{rate}.yaml"
        recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
        out, between = given.work / f"run-{rate}", given.work / f"between-{rate}"
        command = [sys.executable, "-m", "fgvc", "train", str(recipe), "--out", str(out)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        result = api.interpolate(out, between)
        right = [result.right[share] for share in sorted(result.right)]
        row = name | {
            "learned": task.counts["train"], "images": len(right[0]), "way": " ".join(f"{100 * r.mean():.2f}" for r in right),
            "right": " ".join(map(pack, right)),
        }  # fmt: skip
        rows = [*_rows(given.table), row]  # another process may have added some
        with given.table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def _rows(table: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(table.open())) if table.exists() else []


def _print(table: Path) -> None:
    print(
        "| file | rate | learned, chose | file % | end % | best of the way % | of it | over the first rate, points |\n|"
        + "---|" * 8
    )
    firsts: dict[tuple[str, str], np.ndarray] = {}
    for row in _rows(table):
        right = [unpack(bits, int(row["images"])) for bits in row["right"].split()]
        best = max(range(len(right)), key=lambda at: right[at].mean())
        first = firsts.setdefault((row["file"], row["set"]), right[best])
        tops = [f"{100 * right[at].mean():.2f}" for at in (0, -1, best)]
        cells = [row["file"], row["rate"], f"{row['learned']}, {row['images']}", *tops, f"{best / 10:g}"]
        print("| " + " | ".join([*cells, "" if first is right[best] else _gain(first, right[best])]) + " |")


def _gain(first: np.ndarray, right: np.ndarray) -> str:
    points, low, high = (100 * share for share in paired_gain(first, right))
    return f"{points:+.2f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
