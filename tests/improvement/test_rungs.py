"""What ships, by what became of the rungs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fgvc.errors import FgvcError
from fgvc.improvement.clock import Clock
from fgvc.improvement.ladder import BASE, FINAL, PLAIN, STUDENT, Plan, Rung
from fgvc.improvement.outcome import Outcome
from fgvc.improvement.rungs import Ladder
from fgvc.improvement.side_by_side import Ended, Job, Workers
from fgvc.improvement.task import Task
from fgvc.io.bits import pack
from fgvc.runs import checkpoint

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
    write_points(ladder, BASE, {0.5: [1] * 9}, 0.5)
    ladder._ship()
    assert ladder.ships == ladder.run(f"{BASE}-between")


def test_what_failed_and_alone_could_ship_is_tried_again(ladder: Ladder) -> None:
    ladder.outcomes |= {FINAL: Outcome(status="failed", reason="killed by signal 9"), PLAIN: DONE}
    del ladder.choices["best"]
    with pytest.raises(FgvcError, match="killed by signal 9, .*the same command tries again"):
        ladder._ship()
    assert FINAL not in json.loads((ladder.out / "rungs.json").read_text())["outcomes"]


def test_a_run_that_ended_before_a_kill_counts_though_the_time_is_up(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(pool: Workers, jobs: Sequence[Job], **options: object) -> None:
        assert not jobs

    write_points(ladder, BASE, {0.5: [1, 1, 1, 0], 1.0: [1, 0, 0, 0]}, 0.5)
    monkeypatch.setattr(Workers, "run", run)
    monkeypatch.setattr(checkpoint, "is_finished", lambda folder: folder.parent.name == BASE)
    monkeypatch.setattr(ladder, "_seconds", lambda name, seconds: 60.0)
    assert ladder._run("tune") == [BASE]
    assert (ladder.outcomes[BASE].right, ladder.outcomes[BASE].share) == (3, 0.5)


def test_the_longest_runs_begin_first_as_planned(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def run(pool: Workers, jobs: Sequence[Job], **options: object) -> None:
        begun.extend(job.name for job in jobs)

    tuned = [Rung(name=name, stage="tune", what="", settings={}, epochs=1, seconds=seconds)
             for name, seconds in ((BASE, 8), ("heads", 9), ("taught", 13))]  # fmt: skip
    ladder.plan = replace(ladder.plan, rungs=tuple(tuned))
    monkeypatch.setattr("fgvc.improvement.rungs.write_recipe", lambda tree, path: None)
    monkeypatch.setattr(Workers, "run", run)
    ladder._run("tune")
    assert begun == ["taught", "heads", BASE]


def test_what_ships_has_fewer_epochs_where_the_machine_became_slow(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    base, final = (Rung(name=name, stage=stage, what="", settings={}, epochs=10, seconds=200)
                   for name, stage in ((BASE, "tune"), (FINAL, "ship")))  # fmt: skip
    ladder.plan = replace(ladder.plan, rungs=(base, final))  # 600 s, 30 of them for shipping
    monkeypatch.setattr(Clock, "seconds", property(lambda clock: 330.0))
    lines: list[str] = []
    monkeypatch.setattr(ladder, "say", lines.append)
    for seconds, epochs in ((150, 10), (200, 10), (300, 8)):  # 240 s are left, for 200 or 300
        ladder.choices.pop("length", None)
        ladder.outcomes[BASE] = replace(DONE, seconds=seconds)
        ladder._shorten()
        assert (ladder.epochs(base), ladder.epochs(final)) == (10, epochs)
    assert lines == ["less time is left than was planned; epochs of what ships: final 8"]
    ladder.outcomes[BASE] = replace(DONE, seconds=900)
    ladder._shorten()
    assert ladder.epochs(final) == 8, "decided once"


def test_the_base_may_take_the_time_that_what_ships_can_spare(ladder: Ladder, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []

    def run(pool: Workers, jobs: Sequence[Job], *, until: Callable[[], bool], **options: object) -> None:
        for seconds in range(0, 600, 10):
            monkeypatch.setattr(Clock, "seconds", property(lambda clock, now=seconds: now))
            if until():
                ends.append(seconds)
                break

    base, final = (Rung(name=name, stage=stage, what="", settings={}, epochs=10, seconds=200)
                   for name, stage in ((BASE, "tune"), (FINAL, "ship")))  # fmt: skip
    ladder.plan = replace(ladder.plan, rungs=(replace(base, latest_start=150), final))
    monkeypatch.setattr("fgvc.improvement.rungs.write_recipe", lambda tree, path: None)
    monkeypatch.setattr(Workers, "run", run)
    ladder._run("tune")
    assert ends == [460], "planned until 350, and a half of 200 seconds more"


@pytest.mark.parametrize("start", [BASE, "probe-deployed"])
def test_the_plain_recipe_runs_beside_all_that_is_another(
    ladder: Ladder, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "_run", lambda stage: [])
    ladder.outcomes |= {BASE: DONE, FINAL: DONE}
    ladder.choices["start"] = start
    ladder._ship()
    assert (PLAIN in ladder.outcomes) == (start == BASE)
    assert ladder.settings(FINAL).get("train") == ({"floor": True} if start == BASE else None)


def test_all_rungs_have_the_precision_that_was_faster(ladder: Ladder) -> None:
    ladder.plan = replace(ladder.plan, precision="bf16")
    assert ladder._recipe({"train": {"epochs": 3}})["train"] == {"precision": "bf16", "epochs": 3}


def test_a_baseline_is_a_run_that_reached_its_end(ladder: Ladder) -> None:
    ladder.outcomes[PLAIN] = Outcome(status="dropped", reason="its time was up")
    assert not ladder.has_run(PLAIN)
    ladder.outcomes[PLAIN] = DONE
    assert ladder.has_run(PLAIN)


def write_points(ladder: Ladder, name: str, points: dict[float, list[int]], share: float) -> None:
    between = ladder.run(f"{name}-between")
    between.mkdir(parents=True)
    scores = [
        {"share": at, "images": len(right), "right": pack(np.array(right, bool))} for at, right in points.items()
    ]
    (between / "interpolation.json").write_text(json.dumps({"share": share, "scores": scores}))


def test_runs_are_compared_where_each_is_best(ladder: Ladder) -> None:
    """Not where they end."""
    ladder.outcomes |= {BASE: DONE, "probe-deployed": DONE}
    write_points(ladder, BASE, {0.5: [1, 1, 1, 1, 1, 0, 0, 0, 0], 1.0: [1, 1, 0, 0, 0, 0, 0, 0, 0]}, 0.5)
    write_points(ladder, "probe-deployed", {0.5: [1] * 9, 0.8: [1] * 9, 1.0: [0] * 9}, 0.5)
    del ladder.choices["best"]
    ladder._choose("best", [BASE, "probe-deployed"])
    assert ladder.choices["best"] == "probe-deployed"
    assert ladder.share("probe-deployed") == 0.5
    assert ladder._at(BASE, 0.5) == ladder.run(f"{BASE}-between")
    assert ladder._at(BASE, 1.0) == ladder.run(BASE)


def test_where_flips_cost_the_way_ends_where_few_are_lost(ladder: Ladder) -> None:
    ladder.standing = np.array([1, 1, 1, 0, 0, 0], bool)
    points = {0.2: [1, 1, 1, 1, 0, 0], 0.6: [1, 1, 0, 1, 1, 1], 1.0: [0, 0, 1, 1, 1, 1]}
    write_points(ladder, BASE, points, 0.6)
    shares = {}
    for most in (None, 0.0, 0.2, 0.5):
        ladder.flips = most
        shares[most] = ladder.share(BASE)
    assert shares == {None: 0.6, 0.0: 0.2, 0.2: 0.6, 0.5: 0.6}
    del ladder._answers[BASE]
    write_points(ladder, PLAIN, {0.6: [0, 1, 1, 1, 1, 1], 1.0: [0, 0, 1, 1, 1, 1]}, 0.6)
    ladder.flips = 0.0
    assert ladder.share(PLAIN) == 0.6, "where they are fewest"


def test_of_a_rung_in_folds_all_images_choose(ladder: Ladder) -> None:
    """One share for all of its runs, by all their images; a fold's student has the teachers that did not see its images."""
    folded = Rung(name=BASE, stage="tune", what="", settings={}, epochs=1, seconds=1, runs=2)
    student = replace(folded, name=STUDENT, stage="teach")
    ladder.plan = replace(ladder.plan, rungs=(folded, student))
    ladder.outcomes[BASE] = DONE
    assert ladder.runs(folded) == ["base-fold0", "base-fold1"]
    write_points(ladder, "base-fold0", {0.5: [1, 1, 0], 1.0: [1, 1, 1]}, 1.0)
    write_points(ladder, "base-fold1", {0.5: [1, 1], 1.0: [0, 0]}, 0.5)
    assert ladder.share(BASE) == 0.5
    assert ladder._right(BASE).tolist() == [True, True, False, True, True]
    assert ladder._at("base-fold1", 0.5) == ladder.run("base-fold1-between")
    ladder.run("base-fold0-at-0.5").mkdir()
    teachers = [ladder.settings(STUDENT, fold)["techniques"]["distill"]["teachers"] for fold in (0, 1)]
    assert [Path(one["path"]).name for (one,) in teachers] == ["base-fold0-at-0.5", "base-fold1-between"]


def test_a_rung_in_folds_has_an_outcome_when_its_last_run_ends(ladder: Ladder) -> None:
    folded = Rung(name=BASE, stage="tune", what="", settings={}, epochs=1, seconds=1, runs=2)
    ladder._ended[BASE] = []
    first, last = (Job(name, (), ladder.out / "log") for name in ladder.runs(folded))
    ladder._note(Ended(first, 1, False, 3.0), folded)
    assert BASE not in ladder.outcomes
    ladder._note(Ended(last, 0, False, 4.0), folded)
    assert (ladder.outcomes[BASE].status, ladder.outcomes[BASE].seconds) == ("failed", 7.0)


def test_a_quota_that_is_used_up_is_no_fault_of_a_rung(ladder: Ladder) -> None:
    assert ladder._is_full("runs/base: can't write: Disk quota exceeded")
    assert not ladder._is_full("no such file")
