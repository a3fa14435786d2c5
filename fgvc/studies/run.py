"""Running of a study (`fgvc ablate`): train and measure the runs that have no result yet, and write its tables.

Its folder: `study.yaml`; `costs.json`, what a step of each trial costs; `runs/`, each a run of fgvc like any other; `results/`, a
file for each line of the tables; `test.json`, what was chosen when the test split was read; `runs.csv`, `table.md`, `table.html`.
A run that has its line is never trained or measured again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from fgvc.config.loading import dump
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.io.files import as_json, file_lock, write_atomic, writing
from fgvc.io.times import about
from fgvc.runs.images import first_index, read_index
from fgvc.runtime.bundle import read_json
from fgvc.studies.cost import Cost, epochs_by_budget, import_costs, measure_costs, stored_costs, training_hours
from fgvc.studies.identity import ScoredSplit, digest, scored_split
from fgvc.studies.page import write_tables
from fgvc.studies.result import Result, finished, measure, read_lines, train_cell
from fgvc.studies.study import Budget, Cell, Plan, cells
from fgvc.studies.table import best_trials, fold_of


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that failed, or a trial that can't be trained."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """Work that a study has left, and its hours."""

    costs: dict[str, Cost]
    epochs: dict[tuple[str, Budget], int]  # by trial and budget
    cells: list[Cell]  # those that have no result yet
    done: int
    hours: float  # of training steps; those of runs that have begun are counted in full
    refused: list[Failure]  # trials that can't be trained
    localises: bool  # whether localisation is measured


def estimate(plan: Plan, out: Path, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> Estimate:
    """Measure the steps of the trials (some seconds each) and count what is left. `arms`, `seeds`: only these.

    Raises FgvcError where results are there of other settings, or the base can't be trained.
    """
    is_selected = _cell_filter(plan, arms, seeds)
    index, split = read_index(plan.base.recipe), _scored(plan)
    _make_folder(plan, out)
    _rows(plan, out)  # are of these settings
    trials = [plan.base, *(trial for trial in plan.trials[1:] if not arms or {trial.arm, trial.name} & set(arms))]
    results = measure_costs(plan, out, trials, _say)
    refused = [Failure(name, str(error)) for name, error in results.items() if isinstance(error, FgvcError)]
    costs = {name: cost for name, cost in results.items() if isinstance(cost, Cost)}
    epochs = epochs_by_budget(plan, costs)
    requested = [cell for cell in cells(plan, epochs) if cell.trial.name in costs and is_selected(cell)]
    localises = plan.study.localise and index.boxes is not None
    left = [cell for cell in requested if not _has_result(out, cell, split, localises=localises)]
    shown_epochs = {
        (name, budget): epochs[name, budget] for name, budget in epochs if budget in plan.study.budget and name in costs
    }
    return Estimate(costs, shown_epochs, left, len(requested) - len(left), training_hours(left, costs), refused, localises)


def ablate(plan: Plan, out: Path, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Failure]:
    """Train and measure on validation all runs that have no result, and write the tables after each. Killed at any time and
    started again it goes on from the last checkpoint; started twice, the two share the work. `arms`, `seeds`: only these.

    A run that fails is reported and left out; it is tried again the next time. Raises KeyboardInterrupt after saving.
    """
    todo = estimate(plan, out, arms=arms, seeds=seeds)
    failures = list(todo.refused)
    if (split := _scored(plan)) == "test":
        _say(f"fewer than {FEWEST_TO_CHOOSE} images that the deployed file has not seen: none chooses, all score the arms")
    _say(f"{todo.done} runs are done, {len(todo.cells)} to do: {about(3600 * todo.hours)} of training steps")
    for number, cell in enumerate(todo.cells, 1):
        with file_lock(out / "locks" / cell.name) as locked:
            if not locked or _has_result(out, cell, split, localises=todo.localises):  # another process has it
                continue
            _say(f"[{number}/{len(todo.cells)}] {cell.name}")
            try:
                train_cell(cell, out / "runs" / cell.name)
                _measure(plan, out, cell, split, todo.costs)
            except (FgvcError, RuntimeError, OSError) as error:  # the others go on
                failures.append(Failure(cell.name, str(error)))
                _say(f"{cell.name} FAILED: {error}")
        write_tables(plan, out, _rows(plan, out))
    write_tables(plan, out, _rows(plan, out))
    return failures


def import_results(plan: Plan, out: Path, table: Path) -> int:
    """Import the lines of a runs.csv of another machine or study as results of the runs with the same settings, whatever the arm
    was called there; returns the number of runs. Lines of the test split are shown once `read_test` has chosen their runs. Where
    it has a run of the base, the costs of the arms are imported, too, unless they were measured here. Raises FgvcError where it
    is no such file."""
    lines = [row for row in read_lines(table) if row["split"] in get_args(ScoredSplit)]
    fitting: list[tuple[Cell, Result]] = []
    for trial in plan.trials:
        try:
            matches = [(Cell(trial, row["epochs"], row["seed"], fold_of(row), ()), row) for row in lines]
            fitting += [(cell, row) for cell, row in matches if digest(cell.recipe) == row["recipe"]]
        except FgvcError as error:  # it can't be trained here, as its teacher is gone
            _say(f"{trial.name}: {error}")
    # A line's cost is that of the whole run, over the base's there, which may have been another, shorter or longer.
    epoch = {cell.trial.name: row["cost"] / cell.epochs for cell, row in fitting}
    _make_folder(plan, out)
    if plan.base.name in epoch:
        import_costs(plan, out, {name: cost / epoch[plan.base.name] for name, cost in epoch.items()})
    planned = [(cell, row) for cell, row in fitting if cell.seed in plan.study.seeds and cell.fold in plan.study.each_fold]
    for cell, row in planned:
        if not (path := _result(out, cell, row["split"])).is_file():
            named = {"arm": cell.trial.arm, "trial": cell.trial.number, "settings": cell.trial.overrides}
            write_atomic(path, as_json(row | named))
    return len({cell.name for cell, _ in planned})


def read_test(plan: Plan, out: Path) -> None:
    """Score on the test split, once, the trial of each arm that validation chose, and record that it was read.

    Raises FgvcError where runs are missing, or where it was read before of other runs: a test split that helps to choose is a
    validation split.
    """
    _make_folder(plan, out)
    with file_lock(out / "locks" / "test", wait=math.inf):
        _read_test(plan, out)


def _read_test(plan: Plan, out: Path) -> None:
    todo = estimate(plan, out)
    if missing := [*(cell.name for cell in todo.cells), *(failure.run for failure in todo.refused)]:
        raise FgvcError(
            f"{out}: {len(missing)} runs are missing, such as {missing[0]}: finish the study first, or take an arm that can't "
            "be trained out of it"
        )
    if not len(first_index(plan.base.recipe).rows("test")):
        raise FgvcError(f"{plan.path}: the data have no test split")
    if _scored(plan) == "test":
        raise FgvcError(f"{out}: nothing is left to read: the test images, which judge, are those that the arms are scored on")
    chosen_cells = _chosen_cells(plan, todo.costs, _rows(plan, out))
    unread = [cell for cell in chosen_cells if not _result(out, cell, "test").is_file()]
    for cell in unread:
        if not finished(cell, run := out / "runs" / cell.name):
            raise FgvcError(
                f"{run}: no finished run is here, only its result; copy the run from where it was trained, or remove "
                f"{_result(out, cell, 'val')} to train it here"
            )
    runs = {cell.name: {"recipe": digest(cell.recipe), "budgets": list(cell.budgets)} for cell in chosen_cells}
    record = out / "test.json"
    if record.is_file():
        before = read_json(record, dict)
        if before["runs"] != runs:
            raise FgvcError(
                f"{record}: the test split was read on {before['read']}, of other runs than validation chooses now; it can't be "
                "read again for a new choice. Compare new arms in a study of its own, in another --out"
            )
    else:
        write_atomic(record, as_json({"read": time.strftime("%Y-%m-%d %H:%M:%S"), "runs": runs}))
    for cell in unread:
        _say(f"test: {cell.name}")
        _measure(plan, out, cell, "test", todo.costs)
    write_tables(plan, out, _rows(plan, out))


def _chosen_cells(plan: Plan, costs: dict[str, Cost], rows: Sequence[Result]) -> list[Cell]:
    """Runs of the trials that validation chose, each with the budgets under which it was chosen."""
    best = {budget: best_trials(rows, budget=budget) for budget in plan.study.budget}
    chosen = []
    for cell in cells(plan, epochs_by_budget(plan, costs)):
        under = tuple(budget for budget in cell.budgets if best[budget][cell.trial.arm] == cell.trial.number)
        chosen += [replace(cell, budgets=under)] if under else []
    return chosen


def _rows(plan: Plan, out: Path) -> list[Result]:
    """Read the results of this plan's runs. Raises FgvcError for one that is of other settings than the plan has now."""
    record = out / "test.json"
    tested = read_json(record, dict)["runs"] if record.is_file() else {}
    rows, scored = [], _scored(plan)
    costs = stored_costs(plan, out)
    for cell in cells(plan, epochs_by_budget(plan, costs)):
        for split in get_args(ScoredSplit):
            path = _result(out, cell, split)
            if not path.is_file():
                continue
            row = read_json(path, dict)
            if row.get("recipe") != digest(cell.recipe):
                raise FgvcError(
                    f"{path}: this result is of other settings than the study has now; choose another --out or another name "
                    f"for the arm, or remove it and {out / 'runs' / cell.name}"
                )
            budgets = cell.budgets if split == scored else tested.get(cell.name, {}).get("budgets", ())
            if cell.trial.name in costs:  # over the base of this study, whoever wrote the line
                row |= {"cost": round(_run_cost(plan, cell, costs), 4)}
            rows += [row | {"budget": "+".join(budgets)}] if budgets else []
    return rows


def _measure(plan: Plan, out: Path, cell: Cell, split: ScoredSplit, costs: dict[str, Cost]) -> None:
    cost = _run_cost(plan, cell, costs)
    row = measure(cell, out / "runs" / cell.name, split, cost=cost, localise=plan.study.localise)
    write_atomic(_result(out, cell, split), as_json(row))


def _run_cost(plan: Plan, cell: Cell, costs: Mapping[str, Cost]) -> float:
    """Cost of a run's training steps, over those of the base arm's run."""
    return cell.epochs * costs[cell.trial.name].ratio / plan.base.recipe.train.epochs


def _scored(plan: Plan) -> ScoredSplit:
    """The split that scores the runs, see `scored_split`. Raises FgvcError where there is none, or where it may not choose
    between the trials of an arm."""
    split = scored_split(plan.base.recipe)
    if split is None:
        raise FgvcError(f"{plan.path}: the data have no validation split to choose by; give data.val_fraction above 0")
    if split == "test" and (several := next((trial.arm for trial in plan.trials if trial.number > 1), None)) is not None:
        raise NoUnseenImagesError(
            f"{plan.path}: arms.{several}: of fewer than {FEWEST_TO_CHOOSE} images that the deployed file has not seen none may "
            "choose between the trials of an arm; give each one"
        )
    return split


def _has_result(out: Path, cell: Cell, split: ScoredSplit, *, localises: bool) -> bool:
    """Whether the run has its result, with localisation if the study now measures that and the run is here."""
    path = _result(out, cell, split)
    if not path.is_file():
        return False
    if not localises or not (out / "runs" / cell.name).is_dir():
        return True
    return bool({"max_box_acc_v2", "no_maps"} & read_json(path, dict).keys())


def _make_folder(plan: Plan, out: Path) -> None:
    """Make the study's folder, its study.yaml first. Raises FgvcError where something else is there."""
    mark, title = out / "study.yaml", f"# fgvc ablate {plan.name}"
    if mark.is_file():
        first = mark.read_text(encoding="utf-8").partition("\n")[0]
        if first != title:
            raise FgvcError(f"{out}: the folder of another study ({first.removeprefix('# ')}); choose another --out")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise FgvcError(f"{out}: not empty and not the folder of a study; choose another --out")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_atomic(mark, "\n".join([title, *(f"# {text}" for text in plan.overrides), dump(plan.study)]))
    with writing(out):
        for folder in (out / "runs", out / "results", out / "locks"):
            folder.mkdir(exist_ok=True)


def _cell_filter(plan: Plan, arms: Sequence[str], seeds: Sequence[int]) -> Callable[[Cell], bool]:
    """Filter of runs by arms (or trials) and seeds; () for all. Raises FgvcError for one that the study does not have."""
    names = {name for trial in plan.trials for name in (trial.name, trial.arm)}
    if unknown := [arm for arm in arms if arm not in names]:
        raise FgvcError(f"--arm {unknown[0]}: the study has {', '.join(dict.fromkeys(t.arm for t in plan.trials))}")
    if unknown_seeds := [seed for seed in seeds if seed not in plan.study.seeds]:
        raise FgvcError(f"--seed {unknown_seeds[0]}: the study has {', '.join(map(str, plan.study.seeds))}")

    def is_selected(cell: Cell) -> bool:
        named = not arms or cell.trial.arm in arms or cell.trial.name in arms
        return named and (not seeds or cell.seed in seeds)

    return is_selected


def _result(out: Path, cell: Cell, split: ScoredSplit) -> Path:
    return out / "results" / f"{cell.name}.{split}.json"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
