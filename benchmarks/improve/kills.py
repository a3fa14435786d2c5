"""Kills `fgvc improve` at random moments after its plan, and compares what it chooses in the end with an uninterrupted one.

python benchmarks/improve/kills.py WORK [--kills 10] [--seed 0] [--out kills.csv]

A small set of four kinds of beetle is drawn, a network is trained plainly for an epoch and exported; then one improvement is
planned, its folder is copied, and the two copies are finished: one as it is, the other killed (SIGKILL) again and again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fgvc.data.drawn.beetles import draw_demo

FGVC = [sys.executable, "-m", "fgvc"]


def improve(work: Path, folder: Path, *more: str) -> list[str]:
    """The command."""
    deployed, data = work / "deployed" / "model.onnx", work / "data"
    return [*FGVC, "improve", str(deployed), str(data), "--budget", "60m", "-o", str(folder), *more]


def prepare(work: Path) -> None:
    """The set, and a deployed file."""
    if not (work / "data").exists():
        draw_demo(work / "data", classes=4, train_per_class=24, test_per_class=60)
    if not (work / "deployed").exists():
        settings = [f"data.root={work / 'data'}", "image.size=64", "train.epochs=1"]
        subprocess.run([*FGVC, "train", "any/plain", *settings, "--out", str(work / "plain")], check=True)
        subprocess.run([*FGVC, "export", str(work / "plain"), "-o", str(work / "deployed")], check=True)


def outcome(folder: Path) -> dict[str, Any]:
    """What an improvement chose, and what its images said."""
    rungs, verdict = (json.loads((folder / name).read_text()) for name in ("rungs.json", "verdict.json"))
    right = {name: row["right"] for name, row in rungs["outcomes"].items()}
    return {"choices": rungs["choices"], "right": right, "new": verdict["new"], "better": verdict["better"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("work", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kills.csv"))
    options = parser.parse_args()
    work, chance = options.work, random.Random(options.seed)
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    whole, killed = work / "whole", work / "killed"
    if not (whole / "verdict.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        shutil.rmtree(killed, ignore_errors=True)
        subprocess.run(improve(work, whole, "--dry-run"), check=True)
        shutil.copytree(whole, killed)
        for record in ("task.json", "plan.json"):  # a copy's own table of images and file
            text = (killed / record).read_text().replace(str(whole.absolute()), str(killed.absolute()))
            (killed / record).write_text(text)
        started = time.monotonic()
        subprocess.run(improve(work, whole), check=False)
        (work / "seconds").write_text(str(time.monotonic() - started))
    seconds = float((work / "seconds").read_text())
    rows, kills = list[dict[str, Any]](), 0
    while not (killed / "verdict.json").exists():
        process = subprocess.Popen(improve(work, killed))
        if kills < options.kills:
            wait = chance.uniform(7, 7 + 2 * seconds / options.kills)  # imports take some
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                done = json.loads((killed / "rungs.json").read_text()) if (killed / "rungs.json").exists() else {"outcomes": {}}
                rows.append({"kill": kills, "after": round(wait, 1), "rungs_done": " ".join(done["outcomes"])})
        else:
            process.wait()
    same = outcome(whole) == outcome(killed)
    rows.append({"kill": "end", "after": "", "rungs_done": "same outcome" if same else f"{outcome(whole)} != {outcome(killed)}"})
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kill", "after", "rungs_done"])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{kills} kills, {'the same choices and answers' if same else 'NOT the same'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
