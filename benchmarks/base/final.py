"""The last step of a study: arms on the whole train split, several seeds, and one reading of the test split.

    python benchmarks/base/final.py benchmarks/base/final-cub50.txt --work RUNS --file LITE0=FILE data.root=CUB50
    python benchmarks/base/final.py benchmarks/base/final-cub50.txt --work RUNS --read docs/results/cub50.csv

The plan: a recipe with the overrides that all arms share, the seeds, then a line an arm. The first command trains what is not
there yet, seed by seed, each arm as `fgvc train` does; the second, once all are there, evaluates them on test and writes a CSV
with the columns of a study's `runs.csv` (shares in [0,1]; `cost` is the arm's epochs over the first arm's, whatever a step is),
and the lowest recall of a class beside them.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from fgvc.config.recipe import Selected
from fgvc.evaluation.metrics import Scores, score_logits
from fgvc.io.bits import pack
from fgvc.runs.loaded import load_run

FIELDS = (
    "arm", "trial", "split", "budget", "epochs", "seed", "cost", "images", "top1", "macro_f1", "lowest_recall", "ece", "loss",
    "right", "floor", "floor_right", "settings", "graph",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="the folder of the runs")
    parser.add_argument(
        "--file", action="append", default=[], help="NAME=PATH: of weights, by the name that the plan has"
    )
    parser.add_argument("--read", type=Path, help="evaluate on test, once, into this CSV")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    shared, seeds, *arms = [line for line in given.plan.read_text().splitlines() if line and not line.startswith("#")]
    files = dict(file.split("=", 1) for file in given.file)
    config, *common = shlex.split(shared)
    plan = [(seed, *arm.split(": ", 1)) for seed in seeds.split() for arm in arms]
    if given.read:
        read(given.read, given.work, plan)
        return
    for seed, arm, text in plan:
        out = given.work / f"{arm}-{seed}"
        if (given.work / f"{arm}-{seed}.seconds").exists():
            continue
        overrides = [
            re.sub(r"\b[A-Z][A-Z0-9]+\b", lambda name: files.get(name[0], name[0]), word) for word in shlex.split(text)
        ]
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "fgvc",
            "train",
            config,
            *common,
            *given.overrides,
            *overrides,
            f"train.seed={seed}",
        ]
        subprocess.run([*command, "--out", str(out)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        (given.work / f"{arm}-{seed}.seconds").write_text(f"{time.monotonic() - start:.0f}\n")


def read(out: Path, work: Path, plan: list[tuple[str, str, str]]) -> None:
    """Evaluate every run on test; all of them, or none."""
    if missing := [f"{arm}-{seed}" for seed, arm, _ in plan if not (work / f"{arm}-{seed}.seconds").exists()]:
        sys.exit(f"test is read once, for all runs: {', '.join(missing)} are not trained yet")
    floors: dict[bytes, tuple[float, str]] = {}  # by the fitted head: the arms of a seed begin with the same one
    rows: list[dict[str, object]] = []
    for seed, arm, text in plan:
        folder = work / f"{arm}-{seed}"
        scores, right, epochs = asked(folder, None)
        head = (folder / "ckpt" / "start" / "floor.safetensors").read_bytes()
        if head not in floors:
            floor, floor_right, _ = asked(folder, "floor")
            floors[head] = floor.top1, floor_right
        recalls = scores.confusion.diagonal() / scores.confusion.sum(1)
        rows.append(
            {
                "arm": arm, "trial": 1, "split": "test", "budget": "own", "epochs": epochs, "seed": seed,
                "cost": round(epochs / int(str(rows[0]["epochs"])), 4) if rows else 1, "images": scores.images,
                **{key: round(getattr(scores, key), 6) for key in ("top1", "macro_f1", "ece", "loss")},
                "lowest_recall": round(float(recalls.min()), 6), "right": right,
                "floor": round(floors[head][0], 6), "floor_right": floors[head][1],
                "settings": text, "graph": "",
            }
        )  # fmt: skip
        print(arm, seed, rows[-1]["top1"], "floor", rows[-1]["floor"], flush=True)
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def asked(folder: Path, select: Selected | None) -> tuple[Scores, str, int]:
    """What a run's weights say of test: scores, which images were right, and the run's epochs."""
    run = load_run(folder, select)
    answers = run.answers(run.rows_of("test")[1])
    right = pack(answers.logits.argmax(1) == answers.labels)
    return score_logits(answers.logits, answers.labels), right, run.recipe.train.epochs


if __name__ == "__main__":
    main()
