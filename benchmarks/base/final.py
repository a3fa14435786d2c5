"""The last step of a study: arms on the whole train split, several seeds, and one reading of the test split.

    python benchmarks/base/final.py benchmarks/base/final-cub50.txt --work RUNS --file LITE0=FILE data.root=CUB50
    python benchmarks/base/final.py benchmarks/base/final-cub50.txt --work RUNS --read

The plan: a recipe with the overrides that all arms share, the seeds, then a line an arm. The first command trains what is not
there yet, seed by seed, each arm as `fgvc train` does; the second one, once all are there, evaluates them on test and writes the
CSV of the plan's name: top-1, macro-F1 and the lowest recall of a class, in %, and which images were right.
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

FIELDS = (
    "arm",
    "seed",
    "seconds",
    "top1",
    "floor_top1",
    "macro_f1",
    "lowest_recall",
    "overrides",
    "right",
    "floor_right",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="the folder of the runs")
    parser.add_argument(
        "--file", action="append", default=[], help="NAME=PATH: of weights, by the name that the plan has"
    )
    parser.add_argument("--read", action="store_true", help="evaluate on test; once")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    shared, seeds, *arms = [line for line in given.plan.read_text().splitlines() if line and not line.startswith("#")]
    files = dict(file.split("=", 1) for file in given.file)
    config, *common = shlex.split(shared)
    plan = [(seed, *arm.split(": ", 1)) for seed in seeds.split() for arm in arms]
    if given.read:
        read(given.plan.with_suffix(".csv"), given.work, plan)
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
    from sklearn.metrics import f1_score, recall_score

    from fgvc.io.bits import pack
    from fgvc.runs.loaded import load_run

    if missing := [f"{arm}-{seed}" for seed, arm, _ in plan if not (work / f"{arm}-{seed}.seconds").exists()]:
        sys.exit(f"test is read once, for all runs: {', '.join(missing)} are not trained yet")
    rows = []
    for seed, arm, text in plan:
        folder, right, scores = work / f"{arm}-{seed}", {}, {}
        for select in (None, "floor"):
            run = load_run(folder, select)
            answers = run.answers(run.rows_of("test")[1])
            predicted = answers.logits.argmax(1)
            right[select] = predicted == answers.labels
            scores[select] = (
                f1_score(answers.labels, predicted, average="macro"),
                recall_score(answers.labels, predicted, average=None),
            )
        rows.append(
            {
                "arm": arm, "seed": seed, "seconds": (work / f"{arm}-{seed}.seconds").read_text().strip(),
                "top1": f"{100 * right[None].mean():.2f}", "floor_top1": f"{100 * right['floor'].mean():.2f}",
                "macro_f1": f"{100 * scores[None][0]:.2f}", "lowest_recall": f"{100 * scores[None][1].min():.2f}",
                "overrides": text, "right": pack(right[None]),
                "floor_right": pack(right["floor"]),
            }
        )  # fmt: skip
        print(arm, seed, rows[-1]["top1"], "floor", rows[-1]["floor_top1"], flush=True)
    with out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
