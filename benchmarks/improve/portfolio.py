"""Writes what `fgvc improve` tries beside the plain recipe, from the results: python benchmarks/improve/portfolio.py

Of the arms that both tables know (the test split of the birds, three seeds; folds of coffee leaves) those that gained over plain
in the mean of each, by the mean of both. Teachers and epochs are no entries: the ladder has rungs of its own for these. No gain
has to be beyond its interval: on the user's images an entry has to win anyway.
"""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.loading import override
from fgvc.io.bits import unpack
from fgvc.io.files import as_json

ROOT = Path(__file__).parents[2]
TABLES = {  # file -> columns of an arm's name, of which images were right and of how many there were, and of its settings
    ROOT / "docs" / "results" / "cub50.csv": ("arm", "right", "images", "settings"),
    ROOT / "benchmarks" / "base" / "E-coffee.csv": ("cell", "end_right", "held_out", "overrides"),
}
BASE = "plain"
OWN_RUNGS = ("techniques.distill", "train.epochs")
WHAT = {"heads": "three added heads at several scales, and a centre loss; both leave before the export"}


def measured(table: Path) -> dict[str, tuple[float, str]]:
    """Top-1 of each arm over plain's on the same seeds or folds, in points, and its settings."""
    arm, right, images, settings = TABLES[table]
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(line for line in stream if not line.startswith("#")))

    def share(row: dict[str, str]) -> float:
        return float(unpack(row[right], int(float(row[images]))).mean())

    plain = {row.get("seed", row.get("fold")): share(row) for row in rows if row[arm] == BASE}
    gains: dict[str, list[float]] = {}
    for row in rows:
        if (key := row.get("seed", row.get("fold"))) in plain:
            gains.setdefault(row[arm], []).append(100 * (share(row) - plain[key]))
    return {row[arm]: (float(np.mean(gains[row[arm]])), row[settings]) for row in rows if row[arm] in gains}


def tree_of(settings: str) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for text in shlex.split(settings):
        if not text.startswith("model.weights="):
            override(tree, text)
    return tree


def entries() -> list[dict[str, Any]]:
    tables = [measured(table) for table in TABLES]
    kept = []
    for name in set.intersection(*map(set, tables)) - {BASE}:
        gains, settings = [table[name][0] for table in tables], tables[0][name][1]
        if min(gains) > 0 and not any(own in settings for own in OWN_RUNGS):
            entry = {"name": name, "what": WHAT.get(name, name), "gained": [round(gain, 2) for gain in gains]}
            kept.append(entry | {"settings": tree_of(settings)})
    return sorted(kept, key=lambda entry: -np.mean(entry["gained"]))


if __name__ == "__main__":
    (ROOT / "fgvc" / "improvement" / "portfolio.json").write_text(as_json(entries()), encoding="utf-8")
