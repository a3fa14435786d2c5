"""Costs of a study's arms: their steps beside the base arm's, in turn, so that a busy machine slows both."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.io.files import as_json, file_lock, write_atomic
from fgvc.runs.distributed import process_group
from fgvc.runtime.bundle import read_json
from fgvc.studies.identity import digest
from fgvc.studies.speed import interleaved, step_on_one_batch
from fgvc.studies.study import Budget, Cell, Plan, Trial
from fgvc.training.session import open_session

PAIRS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a trial's epoch of training steps, without validation and without what techniques do between epochs. Teachers
    always compute: a cost must not depend on a cache of logits."""

    ratio: float  # over the base trial's epoch
    epoch: float  # seconds, here


def measure_costs(
    plan: Plan, out: Path, trials: Sequence[Trial], notify: Callable[[str], None]
) -> dict[str, Cost | FgvcError]:
    """Measure the costs of these trials, by name, or the error of one that can't be trained; the first must be the base. Stored
    in `<out>/costs.json`: costs there of the same settings are not measured again, and several processes share the work.

    Raises FgvcError where the base can't be trained.
    """
    costs: dict[str, Cost | FgvcError] = {}
    for patient in (False, True):  # first what no other process is at
        for trial in trials:
            if trial.name in costs:
                continue
            first = trial is plan.base  # its seconds are the unit of all others
            with file_lock(out / "locks" / f"{trial.name}.cost", wait=math.inf if patient or first else 0.0) as locked:
                if not locked:
                    continue
                try:
                    costs[trial.name] = _trial_cost(plan, out, trial, notify)
                except (FgvcError, RuntimeError) as error:
                    if first:
                        raise FgvcError(f"{plan.path}: arms.{trial.arm}: {error}") from error
                    costs[trial.name] = FgvcError(str(error))
    return {trial.name: costs[trial.name] for trial in trials}


def stored_costs(plan: Plan, out: Path) -> dict[str, Cost]:
    """Read the costs of all trials that are in `<out>/costs.json` for their present settings."""
    rows, costs = _read_costs(out), {}
    for trial in plan.trials:
        with suppress(FgvcError):  # it can't be trained here, as its teacher is gone
            if (cost := _current(plan, trial, rows)) is not None:
                costs[trial.name] = cost
    return costs


def import_costs(plan: Plan, out: Path, ratios: Mapping[str, float]) -> None:
    """Store the costs of trials that were measured elsewhere, unless they were measured here: so equal seconds are as many epochs
    as there."""
    with file_lock(out / "locks" / "costs", wait=math.inf):
        rows = _read_costs(out)
        for trial in plan.trials[1:]:
            if trial.name in ratios and rows.get(trial.name, {}).get("settings") != _settings(plan, trial):
                rows[trial.name] = {"ratio": ratios[trial.name], "settings": _settings(plan, trial)}
        write_atomic(out / "costs.json", as_json(rows))


def _trial_cost(plan: Plan, out: Path, trial: Trial, notify: Callable[[str], None]) -> Cost:
    rows = _read_costs(out)
    if (stored := _current(plan, trial, rows)) is not None:
        return stored
    ratio, seconds = _measure(trial.recipe, plan.base.recipe)
    if trial is plan.base:
        facts = {"ratio": 1.0, "seconds": seconds}
    else:
        facts = {"ratio": ratio}
        notify(f"{trial.name}: an epoch costs {ratio:.2f} of {plan.base.name}'s")
    with file_lock(out / "locks" / "costs", wait=math.inf):
        rows = _read_costs(out) | {trial.name: facts | {"settings": _settings(plan, trial)}}
        write_atomic(out / "costs.json", as_json(rows))
    cost = _current(plan, trial, rows)
    assert cost is not None  # the base is measured before all others
    return cost


def _read_costs(out: Path) -> dict[str, Any]:
    path = out / "costs.json"
    return read_json(path, dict) if path.is_file() else {}


def _current(plan: Plan, trial: Trial, rows: Mapping[str, Any]) -> Cost | None:
    """Stored cost of a trial; None where its settings or the base's have changed since."""
    row, base = rows.get(trial.name), rows.get(plan.base.name)
    if row is None or base is None or row["settings"] != _settings(plan, trial):
        return None
    return Cost(row["ratio"], row["ratio"] * base["seconds"])


def _settings(plan: Plan, trial: Trial) -> list[str]:
    """Digests of the settings that a cost depends on: the trial's and the base's."""
    return [digest(trial.recipe), digest(plan.base.recipe)]


def _measure(recipe: Recipe, base: Recipe) -> tuple[float, float]:
    """Measure the ratio of an epoch to one of the base's, and the seconds of the base's."""
    gc.collect()  # nets lie in cycles
    recipes = [_without_workers(recipe), _without_workers(base)]
    with process_group(recipes[0].train) as process, ExitStack() as stack:
        sessions = [stack.enter_context(open_session(recipe, process, teachers="to time")) for recipe in recipes]
        step, base_step = (step_on_one_batch(session) for session in sessions)
        ratio = interleaved("", step, base_step, pairs=PAIRS, warm_up=1)
        steps, base_steps = (session.steps_per_epoch for session in sessions)
        return ratio.total * steps / base_steps, ratio.b_seconds * base_steps


def _without_workers(recipe: Recipe) -> Recipe:
    """Copy a recipe without loading processes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 0})})


def epochs_by_budget(plan: Plan, costs: Mapping[str, Cost]) -> dict[tuple[str, Budget], int]:
    """Epochs by trial and budget; in equal seconds of the trials whose costs are known."""
    planned = plan.base.recipe.train.epochs
    epochs: dict[tuple[str, Budget], int] = {}
    for trial in plan.trials:
        epochs[trial.name, "epochs"] = planned
        epochs[trial.name, "own"] = trial.recipe.train.epochs
        if trial.name in costs:
            epochs[trial.name, "seconds"] = max(1, round(planned / costs[trial.name].ratio))
    return epochs


def training_hours(cells: Iterable[Cell], costs: Mapping[str, Cost]) -> float:
    """Hours of training steps alone."""
    return sum(cell.epochs * costs[cell.trial.name].epoch for cell in cells) / 3600
