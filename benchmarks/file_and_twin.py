"""Is anything lost by training a deployed file itself? The same recipe from the file and from its twin in timm, seed by seed.

    python benchmarks/file_and_twin.py docs/results/file-and-twin.csv DEPLOYED.onnx DATA START.safetensors --work RUNS
    python benchmarks/file_and_twin.py docs/results/file-and-twin.csv

START are the weights of the backbone that the file was made from, in timm's names. Both begin with a head fitted to the features,
learn from the images that `fgvc improve` would learn from, keep their schedule to the end, and choose nothing: the average of the
weights is judged, the file after it was written into and read by onnxruntime. A row for each run: which images of both halves of
the unseen ones, those that choose and those that judge, were named rightly. Rows that are there are left alone; without a file
the table is printed, paired by image.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fgvc import api
from fgvc.evaluation.compared import Images, collect_answers
from fgvc.evaluation.paired import paired_gain
from fgvc.evaluation.side import open_sides
from fgvc.improvement.recipes import recipe_of, write_recipe
from fgvc.improvement.request import Request
from fgvc.improvement.task import Task, look
from fgvc.io.bits import pack, unpack
from fgvc.runs.images import read_index
from fgvc.runtime.bundle import read_json

FIELDS = ("file", "set", "arm", "seed", "epochs", "rate", "learned", "minutes", "images", "right")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", type=Path)
    parser.add_argument("file", nargs="?")
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("start", nargs="?", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", default="3e-4")
    given = parser.parse_args()
    if given.file is None:
        return _print(given.table)
    task = look(Request(target=given.file, data=given.data, budget=600), given.work, print)
    for seed in given.seed or (0, 1, 2):
        for arm in ("file", "twin"):
            name = {
                "file": Path(given.file).name, "set": given.data.name, "arm": arm, "seed": str(seed),
                "epochs": str(given.epochs), "rate": given.rate,
            }  # fmt: skip
            if any(name.items() <= row.items() for row in _rows(given.table)):
                continue
            row = name | {"learned": task.counts["train"]} | _trained(task, given, arm, seed)
            if not given.table.exists():
                given.table.write_text(",".join(FIELDS) + "\n")
            with given.table.open("a", newline="") as stream:
                csv.DictWriter(stream, FIELDS, lineterminator="\n").writerow(row)


def _trained(task: Task, given: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm, and ask it about the unseen images."""
    out, recipe = given.work / f"{arm}-{seed}", given.work / f"{arm}-{seed}.yaml"
    settings: dict[str, Any] = {
        "model": {"head": "probe"},
        "optim": {"lr": float(given.rate)},
        "train": {"epochs": given.epochs, "validate_every": given.epochs, "seed": seed},
    }
    if arm == "twin":
        fed = read_json(Path(str(task.file)).with_name("preprocess.json"), dict)
        settings["model"] |= {"backbone": task.twin, "weights": str(given.start.absolute())}
        settings["deploy"] = {key: fed[key] for key in ("resize", "crop_pct", "interpolation", "mean", "std")}
        shared = {key: value for key, value in task.recipe.items() if key not in ("model", "deploy")}
    else:
        shared = dict(task.recipe)
    write_recipe(recipe_of(shared, settings), recipe)
    command = [sys.executable, "-m", "fgvc", "train", str(recipe), "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    bundle = given.work / f"{arm}-{seed}-bundle"
    api.export(out, bundle, overwrite=True, temperature=False)
    index = read_index(api.load_recipe(recipe))
    rows = np.flatnonzero(index.splits != 0)
    answers = collect_answers(*open_sides(Path(str(task.file)), bundle), Images(index=index, rows=rows, split="test"))
    right, seconds = answers.paired.b_right, api.Run(out).history.seconds or 0.0
    return {"minutes": f"{seconds / 60:.1f}", "images": len(right), "right": pack(right)}


def _rows(table: Path) -> list[dict[str, Any]]:
    return list(csv.DictReader(line for line in table.open() if not line.startswith("#"))) if table.exists() else []


def _print(table: Path) -> None:
    right: dict[str, dict[str, np.ndarray]] = {"file": {}, "twin": {}}
    for row in _rows(table):
        right[row["arm"]][row["seed"]] = unpack(row["right"], int(row["images"]))
    print("| seed | file % | twin % | file - twin, points |\n|---|---|---|---|")
    seeds = sorted(set(right["file"]) & set(right["twin"]))
    for seed in seeds:
        print(_line(seed, right["twin"][seed], right["file"][seed]))
    if seeds:
        print(_line("all", *(np.concatenate([right[arm][seed] for seed in seeds]) for arm in ("twin", "file"))))


def _line(name: str, twin: np.ndarray, file: np.ndarray) -> str:
    points, low, high = (100 * share for share in paired_gain(twin, file))
    return f"| {name} | {100 * file.mean():.2f} | {100 * twin.mean():.2f} | {points:+.2f} ({low:+.1f} to {high:+.1f}) |"


if __name__ == "__main__":
    main()
