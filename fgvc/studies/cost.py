"""What the arms of a study cost: their steps beside the base arm's, in turn, so that a busy machine slows both."""

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
from fgvc.runs.distributed import runtime
from fgvc.runtime.bundle import read_json
from fgvc.studies.identity import digest
from fgvc.studies.speed import interleaved, step_on_one_batch
from fgvc.studies.study import Budget, Cell, Plan, Trial
from fgvc.training.session import open_session

PAIRS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a trial's epoch of training steps; without validation, and without what techniques do between epochs. A teacher is
    always asked: a cost must not depend on who filled a cache of logits first."""

    ratio: float  # over the base trial's epoch
    epoch: float  # seconds, here


def measured(
    plan: Plan, out: Path, trials: Sequence[Trial], notify: Callable[[str], None]
) -> dict[str, Cost | FgvcError]:
    """The costs of these trials by name, or why one can't be trained; the first is to be the base. Kept in `<out>/costs.json`:
    what is there for the same settings is not measured again, and several processes share the work.

    Raises FgvcError where the base can't be trained.
    """
    found: dict[str, Cost | FgvcError] = {}
    for patient in (False, True):  # first what no other process is at
        for trial in trials:
            if trial.name in found:
                continue
            first = trial is plan.base  # its seconds are the unit of all others
            with file_lock(out / "locks" / f"{trial.name}.cost", wait=math.inf if patient or first else 0.0) as mine:
                if not mine:
                    continue
                try:
                    found[trial.name] = _one(plan, out, trial, notify)
                except (FgvcError, RuntimeError) as error:
                    if first:
                        raise FgvcError(f"{plan.path}: arms.{trial.arm}: {error}") from error
                    found[trial.name] = FgvcError(str(error))
    return {trial.name: found[trial.name] for trial in trials}


def known(plan: Plan, out: Path) -> dict[str, Cost]:
    """Of all trials whose costs are in `<out>/costs.json` for the settings that they have now."""
    rows, found = _kept(out), {}
    for trial in plan.trials:
        with suppress(FgvcError):  # it can't be trained here, as its teacher is gone
            if (cost := _current(plan, trial, rows)) is not None:
                found[trial.name] = cost
    return found


def adopt_costs(plan: Plan, out: Path, ratios: Mapping[str, float]) -> None:
    """Take the costs of trials from where they were measured, unless they are known here: so equal seconds are as many epochs
    as there."""
    with file_lock(out / "locks" / "costs", wait=math.inf):
        rows = _kept(out)
        for trial in plan.trials[1:]:
            if trial.name in ratios and rows.get(trial.name, {}).get("settings") != _settings(plan, trial):
                rows[trial.name] = {"ratio": ratios[trial.name], "settings": _settings(plan, trial)}
        write_atomic(out / "costs.json", as_json(rows))


def _one(plan: Plan, out: Path, trial: Trial, notify: Callable[[str], None]) -> Cost:
    rows = _kept(out)
    if (there := _current(plan, trial, rows)) is not None:
        return there
    ratio, seconds = _measure(trial.recipe, plan.base.recipe)
    if trial is plan.base:
        facts = {"ratio": 1.0, "seconds": seconds}
    else:
        facts = {"ratio": ratio}
        notify(f"{trial.name}: an epoch costs {ratio:.2f} of {plan.base.name}'s")
    with file_lock(out / "locks" / "costs", wait=math.inf):
        rows = _kept(out) | {trial.name: facts | {"settings": _settings(plan, trial)}}
        write_atomic(out / "costs.json", as_json(rows))
    cost = _current(plan, trial, rows)
    assert cost is not None  # the base is measured before all others
    return cost


def _kept(out: Path) -> dict[str, Any]:
    path = out / "costs.json"
    return read_json(path, dict) if path.is_file() else {}


def _current(plan: Plan, trial: Trial, rows: Mapping[str, Any]) -> Cost | None:
    """What is kept of a trial, unless its settings or the base's have changed since."""
    row, base = rows.get(trial.name), rows.get(plan.base.name)
    if row is None or base is None or row["settings"] != _settings(plan, trial):
        return None
    return Cost(row["ratio"], row["ratio"] * base["seconds"])


def _settings(plan: Plan, trial: Trial) -> list[str]:
    """What a cost depends on: the trial's settings and the base's."""
    return [digest(trial.recipe), digest(plan.base.recipe)]


def _measure(recipe: Recipe, base: Recipe) -> tuple[float, float]:
    """An epoch over one of the base's, and the seconds of the base's."""
    gc.collect()  # nets lie in cycles
    recipes = [_alone(one) for one in (recipe, base)]
    with runtime(recipes[0].train) as process, ExitStack() as stack:
        sessions = [stack.enter_context(open_session(one, process, teachers="to time")) for one in recipes]
        mine, others = (step_on_one_batch(session) for session in sessions)
        found = interleaved("", mine, others, pairs=PAIRS, warm_up=1)
        steps, of_base = (session.steps_per_epoch for session in sessions)
        return found.total * steps / of_base, found.b_seconds * of_base


def _alone(recipe: Recipe) -> Recipe:
    """The same without loading processes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 0})})


def lengths(plan: Plan, costs: Mapping[str, Cost]) -> dict[tuple[str, Budget], int]:
    """Epochs by trial and budget; in equal seconds of the trials whose costs are known."""
    planned = plan.base.recipe.train.epochs
    found: dict[tuple[str, Budget], int] = {}
    for trial in plan.trials:
        found[trial.name, "epochs"] = planned
        found[trial.name, "own"] = trial.recipe.train.epochs
        if trial.name in costs:
            found[trial.name, "seconds"] = max(1, round(planned / costs[trial.name].ratio))
    return found


def hours(cells: Iterable[Cell], costs: Mapping[str, Cost]) -> float:
    """Of training steps alone."""
    return sum(cell.epochs * costs[cell.trial.name].epoch for cell in cells) / 3600
