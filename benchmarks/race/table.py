"""The race: a line for each who took part, beside what `fgvc improve` made of the deployed file in the same time.

python benchmarks/race/table.py BETTER ANSWERS.csv ... > race.csv

BETTER: a finished improvement, whose images.csv all have used: those to learn from and those that choose to learn, those
that judge for the answers. The gain is improve's over the other's, paired, with a 95 % interval (Tango 1998).
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np

from fgvc.evaluation.paired import paired_gain
from fgvc.runtime.bundle import load_bundle


def answers_of(bundle: Path, root: Path, paths: list[str]) -> list[str]:
    """The exported net's answers about images."""
    return [answer.label for answer in load_bundle(bundle).predict([root / path for path in paths])]


def main() -> None:
    better, *files = map(Path, sys.argv[1:])
    tables = {file.stem: list(csv.DictReader(file.open(encoding="utf-8"))) for file in files}
    rows = next(iter(tables.values()))
    paths, labels = [row["path"] for row in rows], np.array([row["label"] for row in rows])
    root = Path(json.loads((better / "task.json").read_text())["task"]["recipe"]["data"]["root"])
    bundle = next(place for name in ("bundle", "candidate") if (place := better / name).exists())
    ours = np.array(answers_of(bundle, root, paths)) == labels
    seconds = round(json.loads((better / "clock.json").read_text())["seconds"])
    writer = csv.writer(sys.stdout)
    writer.writerow(["who", "seconds", "images", "top1", "improve_gain", "low", "high"])
    writer.writerow(["fgvc improve", seconds, len(ours), f"{100 * ours.mean():.2f}", "", "", ""])
    for who, table in tables.items():
        assert [row["path"] for row in table] == paths, who
        right = np.array([row["answer"] for row in table]) == labels
        points = [f"{100 * share:+.2f}" for share in paired_gain(right, ours)]
        writer.writerow([who, table[0]["seconds"], len(right), f"{100 * right.mean():.2f}", *points])


if __name__ == "__main__":
    main()
