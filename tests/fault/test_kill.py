"""A run that is killed at any step and started again ends with the bits of an uninterrupted one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import yaml

from fgvc.cli.app import main
from tests.processes import fgvc, start

DEADLINE = 120.0


QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


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
        "train": {"epochs": 4, "batch_size": 8, "workers": 1, "device": "cpu"},
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
    uninterrupted = fgvc(tmp_path / "printed", "train", recipe, "train.workers=2", "--out", whole, env=QUIET)
    killed = tmp_path / "killed"
    for at in (4, 11):
        child = fgvc(tmp_path / f"printed{at}", "train", recipe, "--out", killed, env=QUIET)
        until = time.monotonic() + DEADLINE
        while steps_done(killed) < at and child.returncode is None and time.monotonic() < until:
            time.sleep(0.005)
        assert child.returncode is None, f"it ended before it could be killed: {child.stderr}"
        child.send_signal(signal.SIGKILL)
        assert child.wait().returncode == -signal.SIGKILL
        assert steps_done(killed) < 24
    last = fgvc(tmp_path / "last", "train", recipe, "--out", killed, env=QUIET).wait()
    assert last.returncode == 0, last.stderr
    assert "going on at step" in last.stderr
    assert uninterrupted.wait().returncode == 0, uninterrupted.stderr
    assert weights(killed) == weights(whole)
    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_sigterm_saves_and_says_how_to_go_on(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "run"
    child = fgvc(tmp_path / "printed", "train", recipe, "train.epochs=400", "--out", out, env=QUIET)
    until = time.monotonic() + DEADLINE
    while steps_done(out) < 4 and child.returncode is None and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait().returncode == 130, child.stderr
    assert "the same command goes on" in child.stderr
    saved = json.loads((out / "ckpt/last/meta.json").read_text())
    assert saved["step"] >= steps_done(out) > 0
    assert not saved["finished"]


def torchrun(arguments: list[str]) -> None:
    """`torchrun --standalone --nproc-per-node=2 -m fgvc ARGUMENTS...`, but that its processes are forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
        max_restarts=0,
    )  # fmt: skip
    elastic_launch(config, main)(arguments)


def test_two_processes_learn_the_same_weights(tmp_path: Path, recipe: Path) -> None:
    """DDP over gloo: a smoke test that both ranks agree, validation included, and that the run can be evaluated."""
    out = tmp_path / "run"
    arguments = ["train", str(recipe), "train.epochs=2", "train.workers=0", "--out", str(out)]
    process = start(tmp_path / "torchrun", torchrun, arguments, env=QUIET).wait()
    assert process.returncode == 0, process.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert len(epochs) == 2, "rank 1 writes nothing"
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    from fgvc import api

    scored = api.evaluate(out, "val")
    assert scored.scores.images == 12
    assert scored.scores.top1 == pytest.approx(epochs[-1]["val_top1"]), "both ranks' shares were summed"
