"""A run that is killed at any step and started again ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.processes import fgvc

DEADLINE = 120.0


def command(recipe: Path, out: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "fgvc", "train", str(recipe), *overrides, "--out", str(out)]


QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def environment() -> dict[str, str]:
    return os.environ | QUIET


def steps_done(out: Path) -> int:
    events = out / "events.jsonl"
    lines = events.read_text().splitlines() if events.is_file() else []
    return max((event.get("step", 0) for event in map(read_line, lines)), default=0)


def read_line(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


@pytest.fixture
def recipe(tmp_path: Path, recipe_tree: dict) -> Path:
    tree = recipe_tree | {
        "train": {"epochs": 6, "batch_size": 8, "workers": 1, "device": "cpu"},
        "ema": {"decay": 0.9},
        "techniques": {"mixup": {}, "acb": {}},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 1},
        "model": {"backbone": "test_resnet", "kwargs": {"drop_rate": 0.2}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def weights(out: Path) -> dict[str, bytes]:
    return {
        f"{at} {name}": (out / "ckpt" / at / f"{name}.safetensors").read_bytes()
        for at in ("last", "start")
        for name in ("net", "branches", "ema")
    }


def test_sigkill_and_again(tmp_path: Path, recipe: Path) -> None:
    whole = tmp_path / "whole"
    # another number of workers draws the same images
    uninterrupted = fgvc(tmp_path / "said", "train", recipe, "train.workers=2", "--out", whole, env=QUIET)
    killed = tmp_path / "killed"
    for at in (4, 17):
        child = fgvc(tmp_path / f"said{at}", "train", recipe, "--out", killed, env=QUIET)
        until = time.monotonic() + DEADLINE
        while steps_done(killed) < at and child.returncode is None and time.monotonic() < until:
            time.sleep(0.005)
        assert child.returncode is None, f"it ended before it could be killed: {child.stderr}"
        child.send_signal(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
        assert steps_done(killed) < 36
    last = fgvc(tmp_path / "last", "train", recipe, "--out", killed, env=QUIET).wait()
    assert last.returncode == 0, last.stderr
    assert "going on at step" in last.stderr
    assert uninterrupted.wait().returncode == 0, uninterrupted.stderr
    assert weights(killed) == weights(whole)
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "run"
    child = subprocess.Popen(
        command(recipe, out, "train.epochs=400"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + DEADLINE
    while steps_done(out) < 4 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=DEADLINE)
    assert child.returncode == 130
    assert "the same command goes on" in said
    saved = json.loads((out / "ckpt/last/meta.json").read_text())
    assert saved["step"] >= steps_done(out) > 0
    assert not saved["finished"]


def test_two_processes_learn_the_same_weights(tmp_path: Path, recipe: Path) -> None:
    """DDP over gloo: a smoke test that both ranks agree, validation included, and that the run can be evaluated."""
    out = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    arguments = ["fgvc", "train", str(recipe), "train.epochs=2", "train.workers=0", "--out", str(out)]
    done = subprocess.run(
        [*launch, *arguments], env=environment(), capture_output=True, text=True, check=False, timeout=DEADLINE
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert len(epochs) == 2, "rank 1 writes nothing"
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    from fgvc import api

    scored = api.evaluate(out, "val")
    assert scored.scores.images == 12
    assert scored.scores.top1 == pytest.approx(epochs[-1]["val_top1"]), "both ranks' shares were summed"
