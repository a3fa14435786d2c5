"""The ladder fits its budget, is richer where there is more time, and says what it left out."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgvc.errors import FgvcError
from fgvc.improvement.clock import seconds_of
from fgvc.improvement.ladder import (
    BASE,
    FINAL,
    PLAIN,
    SAFETY,
    STUDENT,
    TAUGHT,
    TEACHER,
    Plan,
    Rung,
    makespan,
    plan_ladder,
    portfolio,
    taught,
)
from fgvc.improvement.task import Task
from fgvc.improvement.work import Timing
from fgvc.io.files import as_json

FIRST = portfolio()[0]["name"]


def task(*, train: int = 1500, choose: int = 700, judge: int = 690, teacher: bool = False) -> Task:
    return Task(
        name="net.onnx", file="net.onnx", twin=None, classes=("a", "b"), counts={"train": train, "val": choose, "test": judge},
        rule="", recipe={"image": {"size": [160, 160]}}, starts=(),
        teachers=({"backbone": "resnet50", "weights": "file", "kwargs": {}},) if teacher else (),
    )  # fmt: skip


def in_folds(asked: Task, folds: int) -> Task:
    """300 images of a net without a file, which choose in turn."""
    recipe = {"image": {"size": [160, 160]}, "model": {"backbone": "resnet18", "weights": "hub"}}
    return replace(asked, file=None, counts={"train": 300, "val": 0, "test": 150}, folds=folds, recipe=recipe)


def timings(step: float = 0.9, *, portfolio_too: bool = True, teacher: bool = False) -> dict[str, Timing]:
    def timed(factor: float) -> Timing:
        return Timing(start=6, step=step * factor, batch=32, look=step / 90, peak_bytes=10**9, device="cpu")

    own = replace(timed(1.5), teacher_look=step / 45)
    times = {BASE: timed(1)} | ({FIRST: timed(1.1), TAUGHT: own} if portfolio_too else {})
    return times | ({TAUGHT: replace(timed(1.7), teacher_look=step / 20), TEACHER: timed(3)} if teacher else {})


def names(plan: Plan) -> list[str]:
    return [rung.name for rung in plan.rungs]


def test_more_time_makes_a_richer_ladder() -> None:
    ladders = [
        names(plan_ladder(task(), timings(), budget=60 * minutes, spent=60, slots=2)) for minutes in (10, 30, 60, 240)
    ]
    assert ladders[0] == [BASE, FINAL]
    assert ladders[1] == ["probe-deployed", BASE, TAUGHT, FINAL, PLAIN]
    assert {FIRST, TAUGHT} < set(ladders[2])
    assert {FIRST, TAUGHT, STUDENT} < set(ladders[3])
    assert [len(ladder) for ladder in ladders] == sorted(len(ladder) for ladder in ladders)


def test_what_ships_has_more_epochs_than_a_short_ladder_has() -> None:
    plan = plan_ladder(task(choose=100), timings(), budget=1800, spent=60, slots=2)
    epochs = {rung.name: rung.epochs for rung in plan.rungs}
    assert epochs[BASE] == epochs[TAUGHT] <= epochs[FINAL] <= 12
    final = next(rung for rung in plan.rungs if rung.name == FINAL)
    assert final.epochs_of[TAUGHT] == final.epochs < final.epochs_of[BASE] <= 12


def test_the_deployed_file_itself_teaches_at_a_larger_size_and_where_flips_cost() -> None:
    distill = taught(task())["techniques"]["distill"]
    assert distill["teachers"] == [{"kind": "probe", "onnx": "net.onnx", "size": [224, 224]}]
    kept = taught(replace(task(teacher=True), keeps_answers=True))["techniques"]["distill"]["teachers"]
    assert [teacher["kind"] for teacher in kept] == ["probe", "bundle"]
    assert kept[0]["backbone"] == "resnet50"


def test_images_without_labels_are_for_a_student() -> None:
    plan = plan_ladder(replace(task(), unlabelled=("a.png",) * 50), timings(), budget=1200, spent=60, slots=2)
    assert names(plan) == [BASE, STUDENT, FINAL, PLAIN]
    for budget in range(1200, 14400, 600):  # whoever gives them wants them learned from, before any other rung
        plan = plan_ladder(replace(task(), unlabelled=("a.png",) * 50), timings(), budget=budget, spent=60, slots=2)
        assert STUDENT in names(plan), budget


def test_a_larger_net_at_hand_teaches_and_is_tuned_where_there_is_time() -> None:
    short, long = (
        plan_ladder(task(teacher=True), timings(teacher=True), budget=3600 * hours, spent=60, slots=2) for hours in (1, 4)
    )
    assert TAUGHT in names(short)
    assert {TEACHER, STUDENT} < set(names(long))
    assert next(rung for rung in long.rungs if rung.name == TEACHER).settings["image"]["size"] == [224, 224]


def test_a_teacher_that_can_not_be_timed_teaches_nothing() -> None:
    known = {name: timing for name, timing in timings().items() if name != TAUGHT}
    plan = plan_ladder(task(teacher=True), known, budget=4 * 3600, spent=60, slots=2)
    assert {TAUGHT, TEACHER}.isdisjoint(names(plan))
    assert {FIRST, STUDENT} < set(names(plan))


@given(
    budget=st.floats(130, 40_000), spent=st.floats(0, 60), step=st.floats(0.01, 5), slots=st.integers(1, 4),
    choose=st.sampled_from([0, 200, 5000]), teacher=st.booleans(), folds=st.sampled_from([1, 3]),
)  # fmt: skip
def test_a_plan_fits_its_budget(
    budget: float, spent: float, step: float, slots: int, choose: int, teacher: bool, folds: int
) -> None:
    asked = task(choose=choose, teacher=teacher)
    if folds > 1:
        asked = in_folds(asked, folds)
    try:
        plan = plan_ladder(asked, timings(step, teacher=teacher), budget=budget, spent=spent, slots=slots)
    except FgvcError:
        return
    assert spent + plan.seconds <= budget + 1e-6
    assert all(rung.seconds <= budget / 4 + 1e-6 for rung in plan.rungs if rung.name == PLAIN and rung.epochs > 1)
    ship = makespan(plan.of("ship"), slots)
    for rung in plan.rungs:
        assert (rung.latest_start is None) == (rung.stage == "ship")
        if rung.latest_start is not None:  # it may begin as long as what ships still fits
            assert rung.latest_start + makespan([rung], slots) + ship + plan.shipping <= budget + 1e-6
    assert set(plan.left_out).isdisjoint(names(plan))


def test_a_budget_for_no_epoch_is_refused_with_what_is_needed() -> None:
    with pytest.raises(FgvcError, match=r"too few for a rung of a single epoch: about \d+ min are needed"):
        plan_ladder(task(), timings(30), budget=300, spent=20, slots=2)


def test_without_images_that_choose_the_recipe_that_won_elsewhere_ships() -> None:
    plan = plan_ladder(task(choose=0), timings(), budget=3600, spent=60, slots=2)
    assert names(plan) == [FINAL, PLAIN]
    techniques = plan.rungs[0].settings["techniques"]
    assert techniques == portfolio()[0]["settings"]["techniques"] | taught(task(choose=0))["techniques"]
    assert plan.rungs[1].settings == {"data": {"hold_out": False}, "train": {"floor": True}}


def test_a_plan_is_read_as_it_was_written() -> None:
    plan = plan_ladder(task(teacher=True), timings(teacher=True), budget=3600, spent=60, slots=2)
    assert Plan.read(json.loads(as_json(plan.record))) == Plan.read(plan.record)
    assert names(Plan.read(json.loads(as_json(plan.record)))) == names(plan)


def test_runs_side_by_side() -> None:
    one = Rung(name="one", stage="tune", what="", settings={}, epochs=1, seconds=3)
    two = replace(one, name="two", seconds=2, runs=2)
    assert makespan([one, two], 2) == 4
    assert makespan([one, two], 1) == 7
    assert makespan([], 2) == 0


def test_where_all_images_choose_in_turn_a_rung_is_a_run_for_each_fold() -> None:
    """Three runs of two thirds of the images cost twice as many steps as one run of all, and three times as many starts."""
    small = in_folds(task(), 3)
    assert (small.to_learn, small.to_choose, small.chooses) == (200, 100, True)
    step = Timing(start=6, step=0.9, batch=25, look=0.01, peak_bytes=10**9, device="cpu")
    plan = plan_ladder(small, {BASE: step}, budget=3600, spent=60, slots=1)
    base, final = plan.rungs
    assert (base.runs, final.runs) == (3, 1)
    between = (base.seconds / SAFETY - 6) - base.epochs * 8 * 0.9  # 200 images, 25 a step
    assert between == pytest.approx((11 * 100 + 512) * 0.01 + 600 * (0.01 + 2e-4))  # looks, and the fit of a head to 3 views
    assert plan.seconds == pytest.approx(3 * base.seconds + final.seconds + plan.shipping)


@pytest.mark.parametrize(("text", "seconds"), [("20m", 1200), ("1.5h", 5400), ("2 d", 172_800), ("150s", 150)])
def test_budgets(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["20", "m", "-5m", "1m", "soon"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(FgvcError, match="--budget"):
        seconds_of(text)


def test_the_portfolio_is_what_the_tables_of_results_say() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "improve" / "portfolio.py"
    made = runpy.run_path(str(script))["entries"]()
    assert made == list(portfolio())
    for entry in made:
        assert min(entry["gained"]) > 0
