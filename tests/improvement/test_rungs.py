"""What ships, by what became of the rungs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fgvc.improvement.clock import Clock
from fgvc.improvement.ladder import BASE, FINAL, PLAIN, Plan, Rung
from fgvc.improvement.rungs import Ladder, Outcome
from fgvc.improvement.side_by_side import Workers
from fgvc.improvement.task import Task

WEIGHTS = {"model": {"weights": "deployed", "head": "probe"}}
DONE = Outcome(status="done")


@pytest.fixture
def ladder(tmp_path: Path) -> Ladder:
    """A ladder whose stages were all run."""
    task = Task(
        name="net.onnx", file="net.onnx", twin=None, classes=("a", "b"), counts={"train": 9, "val": 9, "test": 9}, rule="",
        recipe={}, starts=(), teachers=(),
    )  # fmt: skip
    stages = {"probe-deployed": "probe", BASE: "tune", FINAL: "ship", PLAIN: "ship"}
    rungs = tuple(
        Rung(name=name, stage=stage, what="", settings=WEIGHTS if stage == "probe" else {}, epochs=1, seconds=1)
        for name, stage in stages.items()
    )  # fmt: skip
    plan = Plan(budget=600, slots=1, shipping=30, rungs=rungs, left_out={})
    made = Ladder(
        task, plan, tmp_path, Clock(tmp_path / "clock.json"), Workers(), say=lambda line: None, tick=lambda running: None,
        command="", standing=np.empty(0, bool),
    )  # fmt: skip
    made.choices |= {"start": BASE, "best": BASE, "share": 1.0}
    return made


def test_where_the_last_run_failed_the_best_ships_as_it_was_chosen(ladder: Ladder) -> None:
    ladder.outcomes |= {BASE: DONE, FINAL: Outcome(status="failed"), PLAIN: DONE}
    ladder.choices["share"] = 0.5
    ladder.run(f"{BASE}-between").mkdir(parents=True)
    ladder._ship()
    assert ladder.ships == ladder.run(f"{BASE}-between")


@pytest.mark.parametrize("start", [BASE, "probe-deployed"])
def test_the_plain_recipe_runs_beside_all_that_is_another(
    ladder: Ladder, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "_run", lambda stage: [])
    ladder.outcomes |= {BASE: DONE, FINAL: DONE}
    ladder.choices["start"] = start
    ladder._ship()
    assert (PLAIN in ladder.outcomes) == (start == BASE)


def test_a_baseline_is_a_run_that_reached_its_end(ladder: Ladder) -> None:
    ladder.outcomes[PLAIN] = Outcome(status="dropped", reason="its time was up")
    assert not ladder.has_run(PLAIN)
    ladder.outcomes[PLAIN] = DONE
    assert ladder.has_run(PLAIN)


def test_runs_are_compared_where_each_is_best(ladder: Ladder) -> None:
    """Not where they end: 6 of 9 at the end are fewer than 8 half way."""
    half_way, end = np.arange(9) < 8, np.arange(9) < 6
    ladder._answers |= {BASE: end, "probe-deployed": half_way}
    assert ladder.share(BASE) == 1
    ladder.outcomes |= {BASE: DONE, "probe-deployed": DONE}
    del ladder.choices["best"]
    ladder._choose("best", [BASE, "probe-deployed"])
    assert ladder.choices["best"] == "probe-deployed"
    between = ladder.run(f"{BASE}-between")
    between.mkdir(parents=True)
    (between / "interpolation.json").write_text('{"share": 0.4}')
    assert ladder.share(BASE) == 0.4
    assert ladder._best_point(BASE) == between


def test_a_quota_that_is_used_up_is_no_fault_of_a_rung(ladder: Ladder) -> None:
    assert ladder._is_full("runs/base: can't write: Disk quota exceeded")
    assert not ladder._is_full("no such file")
