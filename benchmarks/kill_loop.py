"""Kill training with SIGKILL, or damage what it left, start the same command again, and compare with an uninterrupted run.

    python benchmarks/kill_loop.py benchmarks/kill_loop.csv

Small nets on small drawn pictures, in five arms: plain, moving average, sharpness-aware steps, AE-PSL, distillation with both
caches. This process imports all packages once and forks a child for every training process. Kills are of two kinds: before an
enumerated change on the disk (a write: in the middle of it), and after a random time. A line of the CSV is a case:

    same      exit code 0, and every weight, score and state as in the uninterrupted run
    best gone after damage to the best checkpoint alone: the same, but for another best; the log says so
    start gone after damage to the start alone: the same, but for that; the log says so
    refused   after damage alone: exit code 2 and a message that names the file; no checkpoint is gone
    LOST, SILENT, REFUSED, TRACEBACK: failures, and exit code 1 of this script

Cases that the CSV has already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.io import files as disk
from fgvc.runs.environment import environment

CHANGES = ("open", "write", "pwrite", "fsync", "replace", "symlink", "unlink", "mkdir", "rmdir", "ftruncate")
ARMS = ("plain", "ema", "sam", "ae_psl", "distill")
CACHES = ("pixels", "logits")
COLUMNS = ("case", "arm", "kind", "moment", "outcome", "exit", "said", "seconds")
GOOD = ("same", "best gone", "start gone", "refused")
DEADLINE = 300.0


class Dying:
    """The `os` of `fgvc.io.files`, which counts what changes the disk and, before the change of this number, is killed."""

    def __init__(self, at: int = 0, log: Path | None = None) -> None:
        self.at, self.count, self.log = at, 0, log

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CHANGES else real

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            self.count += 1
            if self.log is not None:
                with self.log.open("a") as file:
                    file.write(f"{name} {Path(str(given[0])).name}\n")
            if self.count == self.at:
                if name == "write":
                    real(given[0], given[1][: len(given[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call


@dataclass
class Arm:
    """One kind of training, its uninterrupted run, and what that one did to the disk."""

    name: str
    place: Path
    recipe: Recipe
    changes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    result: dict[str, str] = field(default_factory=dict)
    cache: Path | None = None

    def fork(self, out: Path, log: Path, dying: Dying | None = None) -> int:
        """The process id of a new training process."""
        if pid := os.fork():
            return pid
        code = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if dying is not None:
                disk.os = dying  # type: ignore[assignment]
            try:
                api.train(self.recipe, out)
                code = 0
            except FgvcError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 2
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            log.with_suffix(".modules").write_text("\n".join(sys.modules))
        finally:
            os._exit(code)

    def run(self, out: Path, log: Path, dying: Dying | None = None, *, after: float | None = None) -> int:
        """The exit code of a training process; below 0 where it was killed, `after` so many seconds at the latest."""
        pid, started = self.fork(out, log, dying), time.monotonic()
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() - started > (DEADLINE if after is None else after):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)


def draw(root: Path) -> None:
    """Three classes of noise in a colour: 8 pictures of each to train with, 4 for validation."""
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (60, 80, 200)), ("green", (70, 170, 80)), ("red", (200, 70, 60))):
        for split, count in (("train", 8), ("val", 4)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(colour + rng.normal(0, 60, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def recipes(place: Path) -> dict[str, Recipe]:
    tree = {
        "data": {"kind": "folder", "root": str(place / "data")},
        "image": {"size": 32},
        "model": {"backbone": "test_resnet", "kwargs": {"drop_rate": 0.2}},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 2},
        "select": "best",
    }
    teacher = {"kind": "run", "path": str(place / "plain" / "whole")}
    distill = {"teachers": [teacher], "cache": str(place / "distill" / "logits")}
    added: dict[str, dict[str, Any]] = {
        "plain": {},
        "ema": {"ema": {"decay": 0.9}},
        "sam": {"optim": tree["optim"] | {"sam": {"rho": 0.05}}},  # type: ignore[operator]
        "ae_psl": {"techniques": {"ae_psl": {"rounds": 2}}, "image": {"size": 64}},  # or its maps had one cell
        "distill": {"techniques": {"distill": distill}, "cache": "disk", "cache_dir": str(place / "distill" / "pixels")},
    }
    return {name: validate(Recipe, tree | added[name], where=name) for name in ARMS}


def result(run: Path) -> dict[str, str]:
    """All of a run that may not depend on how often it was killed, by SHA-256."""
    found: dict[str, str] = {}
    for name in ("last", "best", "start"):
        for path in sorted((run / "ckpt" / name).iterdir()):
            content = path.read_bytes()
            if path.name == "meta.json":
                tree = json.loads(content)
                content = json.dumps({key: tree[key] for key in tree if key not in ("seconds", "sha256", "files")}).encode()
            found[f"{name}/{path.name}"] = hashlib.sha256(content).hexdigest()
    found["metrics.csv"] = hashlib.sha256((run / "metrics.csv").read_bytes()).hexdigest()
    found["plots"] = " ".join(sorted(path.name for path in (run / "plots").iterdir()))
    return found


def prepare(place: Path) -> list[Arm]:
    """Every arm's uninterrupted run; its packages are then imported here."""
    shutil.rmtree(place, ignore_errors=True)
    draw(place / "data")
    arms = []
    for name, recipe in recipes(place).items():
        arm = Arm(name, place / name, recipe)
        arm.place.mkdir()
        code = arm.run(arm.place / "whole", arm.place / "whole.log")
        assert code == 0, (arm.place / "whole.log").read_text()
        for module in (arm.place / "whole.modules").read_text().split():
            with suppress(Exception):
                importlib.import_module(module)
        arm.result = result(arm.place / "whole")
        started = time.monotonic()
        code = arm.run(arm.place / "again", arm.place / "again.log", Dying(log=arm.place / "changes"))
        arm.seconds = time.monotonic() - started
        assert code == 0, (arm.place / "again.log").read_text()
        assert result(arm.place / "again") == arm.result, f"{name}: two runs differ"
        arm.changes = (arm.place / "changes").read_text().splitlines()
        print(f"{name}: {arm.seconds:.1f} s, {len(arm.changes)} changes on the disk", flush=True)
        arms.append(arm)
    return arms


@dataclass(frozen=True)
class Case:
    arm: Arm
    kind: str
    number: int
    rng: random.Random

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.arm.name}-{self.number}"


def cases(arms: list[Arm], counts: dict[str, int], seed: int) -> Iterator[Case]:
    for kind, count in counts.items():
        for number in range(count):
            arm = arms[number % len(arms)]
            yield Case(arm, kind, number // len(arms), random.Random(f"{seed} {kind} {arm.name} {number}"))


def killed(case: Case, out: Path, log: Path, count: int) -> str:
    """Kill a new run once; `count`: cases of this kind and arm. Returns when that was, in words."""
    arm = case.arm
    if case.kind == "random":
        after = case.rng.uniform(0, arm.seconds)
        code = arm.run(out, log, after=after)
        return f"after {after:.3f} s" + ("" if code == -signal.SIGKILL else " (it had ended)")
    step = len(arm.changes) / count
    at = min(1 + int(step * (case.number + case.rng.random())), len(arm.changes))
    code = arm.run(out, log, Dying(at))
    assert code == -signal.SIGKILL, f"{case.name}: exit code {code}"
    return f"before change {at} of {len(arm.changes)}: {arm.changes[at - 1]}"


def damage(case: Case, out: Path) -> str:
    """Damage one file of an unfinished run, or of its caches. Returns what was done, in words."""
    rng, arm = case.rng, case.arm
    places = [path for path in out.rglob("*") if path.is_file() and not path.is_symlink() and path.name[0] != "."]
    places += [path for cache in CACHES for path in (arm.place / cache).rglob("*") if path.is_file()]
    inside = [path for path in places if path.parent.name.startswith(("step-", "start"))]
    path = rng.choice(sorted(inside if rng.random() < 0.7 else places))
    kind = rng.choice(["bit", "bit", "bit", "bits", "cut", "empty", "gone", "extra", "last gone", "zeros"])
    content = bytearray(path.read_bytes())
    where = path.relative_to(out if out in path.parents else arm.place)
    if kind == "last gone":
        (out / "ckpt" / "last").unlink()
        return "ckpt/last: gone"
    if kind == "extra":
        (path.parent / "ema2.safetensors").write_bytes(bytes(content))
        return f"{where.parent}/ema2.safetensors: put there"
    if kind == "gone" or not content:
        path.unlink()
        return f"{where}: gone"
    at = rng.randrange(len(content))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else 20):
            content[at] ^= 1 << rng.randrange(8)
            last, at = at, rng.randrange(len(content))
        kind = f"{kind} at {last}"
    elif kind == "cut":
        del content[at:]
        kind = f"cut at {at}"
    elif kind == "zeros":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        kind = f"zeros from {at}"
    else:
        content.clear()
    path.write_bytes(bytes(content))
    return f"{where}: {kind}"


def unfinished(arm: Arm) -> Path:
    """A run that was killed at about four fifths of its way, with the caches of that moment."""
    out = arm.place / "unfinished"
    if not out.is_dir():
        for folder in CACHES:
            shutil.rmtree(arm.place / folder, ignore_errors=True)
        at = int(0.8 * len(arm.changes))
        code = arm.run(out, arm.place / "unfinished.log", Dying(at))
        assert code == -signal.SIGKILL
    return out


def checkpoints(run: Path) -> set[str]:
    return {path.name.removeprefix("damaged-") for kind in ("*step-*", "*start") for path in (run / "ckpt").glob(kind)}


def judge(case: Case, out: Path, log: Path, before: set[str], code: int) -> str:
    said = log.read_text(errors="replace")
    if code not in (0, 2) or "Traceback" in said:
        return "TRACEBACK"
    if code == 0:
        found, expected = result(out), case.arm.result
        if found == expected:
            return "same"
        for name, words in (("best", "ckpt/best: gone or damaged"), ("start", "ckpt/start: ")):
            of_it = {key for key in expected if key.startswith(f"{name}/")} | ({"last/meta.json"} if name == "best" else set())
            others = all(found.get(key) == expected[key] for key in expected.keys() - of_it)
            if case.kind == "damage" and others and words in said:
                return f"{name} gone"
        return "SILENT"
    if case.kind != "damage":
        return "REFUSED"
    return "refused" if before <= checkpoints(out) else "LOST"


def one(case: Case, place: Path, count: int) -> dict[str, Any]:
    """A line of the CSV."""
    out, log, started = place / "run", place / "log", time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    caches = [case.arm.place / folder for folder in CACHES]
    if case.kind == "damage":
        base = unfinished(case.arm)
        shutil.copytree(base, out, symlinks=True)
        for folder in caches:  # as they were, whatever the last case did to them
            kept = case.arm.place / "kept" / folder.name
            if folder.exists() and not kept.exists():
                shutil.copytree(folder, kept)
            if kept.exists():
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(kept, folder)
        moment = damage(case, out)
    else:
        for folder in caches if case.rng.random() < 0.5 else []:  # killed while they are made, too
            shutil.rmtree(folder, ignore_errors=True)
        moment = killed(case, out, log, count)
    before = checkpoints(out) if out.is_dir() else set()
    code = case.arm.run(out, log)
    outcome = judge(case, out, log, before, code)
    words = ("WARNING: /", "error", "damaged", "anew")
    lines = [line for line in log.read_text(errors="replace").splitlines() if any(word in line for word in words)]
    if outcome not in GOOD:
        shutil.copytree(place, place.parent / f"bad-{case.name}", symlinks=True, dirs_exist_ok=True)
    return {
        "case": case.name, "arm": case.arm.name, "kind": case.kind, "moment": moment, "outcome": outcome, "exit": code,
        "said": (lines or [""])[0].replace(str(place) + "/", "")[:300], "seconds": f"{time.monotonic() - started:.2f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill and damage runs, start them again, compare.")
    parser.add_argument("out", type=Path, help="CSV to write, or to go on with")
    parser.add_argument("--work", type=Path, default=Path("kill-loop"), help="a folder for the runs; what is bad stays there")
    parser.add_argument("--enumerated", type=int, default=100)
    parser.add_argument("--random", type=int, default=100)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts = {"enumerated": given.enumerated, "random": given.random, "damage": given.damages}
    text = given.out.read_text(encoding="utf-8") if given.out.is_file() else ""
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    done = {row["case"] for row in rows if row["outcome"] in GOOD}
    rows = [row for row in rows if row["case"] in done]
    arms = prepare(given.work.resolve() / "arms")
    for case in cases(arms, counts, given.seed):
        if case.name in done:
            continue
        rows.append(one(case, given.work.resolve() / "case", -(-counts[case.kind] // len(arms))))
        print(" ".join(str(rows[-1][key]) for key in ("case", "moment", "outcome", "said")), flush=True)
        write(given, rows)
    bad = [row for row in rows if row["outcome"] not in GOOD]
    print(f"{len(rows)} cases, {len(bad)} bad")
    sys.exit(1 if bad else 0)


def write(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = {"command": "python " + " ".join(sys.argv), "seed": given.seed, **environment()}
    stream = io.StringIO()
    stream.writelines(f"# {key}: {value}\n" for key, value in facts.items())
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    disk.write_atomic(given.out, stream.getvalue())


if __name__ == "__main__":
    main()
