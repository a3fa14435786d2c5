"""What the arms of a study cost: their steps beside the base arm's, in turn, so that a busy machine slows both."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgvc.ablate.study import Budget, Cell, Plan, Trial
from fgvc.bench import interleaved, step_on_one_batch
from fgvc.disk import alone
from fgvc.recipe import Recipe
from fgvc.train.events import write_atomic
from fgvc.train.runtime import runtime
from fgvc.train.session import open_session
from fgvc.types import FgvcError

PAIRS = 6


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a trial's training steps; without validation, and without what techniques do between epochs."""

    ratio: float  # one step over one of the base arm's, median of PAIRS
    step_seconds: float  # of the base arm's step times `ratio`
    steps: int  # in an epoch

    @property
    def epoch(self) -> float:
        """Seconds."""
        return self.step_seconds * self.steps


def measured(
    plan: Plan, out: Path, trials: Sequence[Trial], notify: Callable[[str], None]
) -> dict[str, Cost | FgvcError]:
    """The costs of these trials by name, or why one can't be trained; the first is to be the base. Kept in `<out>/costs.json`:
    what is there for the same settings is not measured again, and several processes share the work."""
    found: dict[str, Cost | FgvcError] = {}
    for patient in (False, True):  # first what no other process is at
        for trial in trials:
            if trial.name in found:
                continue
            first = trial.name == plan.base.name  # its seconds are the unit of all others
            with alone(out / "locks" / f"{trial.name}.cost", wait=patient or first) as mine:
                if mine:
                    found[trial.name] = _one(plan, out, trial, notify)
    return {trial.name: found[trial.name] for trial in trials}


def known(plan: Plan, out: Path) -> dict[str, Cost]:
    """Of all trials whose costs are in `<out>/costs.json` for the settings that they have now."""
    rows = _kept(out)
    found = {trial.name: _current(plan, trial, rows) for trial in plan.trials}
    return {name: cost for name, cost in found.items() if cost is not None}


def _one(plan: Plan, out: Path, trial: Trial, notify: Callable[[str], None]) -> Cost | FgvcError:
    rows = _kept(out)
    if (there := _current(plan, trial, rows)) is not None:
        return there
    try:
        cost = _measure(trial, plan.base, base_cost=_current(plan, plan.base, rows))
    except FgvcError as error:
        return error
    notify(f"{trial.name}: a step costs {cost.ratio:.2f} of {plan.base.name}'s")
    with alone(out / "locks" / "costs", wait=True):
        rows = _kept(out) | {trial.name: asdict(cost) | {"settings": _settings(plan, trial)}}
        write_atomic(out / "costs.json", json.dumps(rows, indent=1) + "\n")
    return cost


def _kept(out: Path) -> dict[str, Any]:
    path = out / "costs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _current(plan: Plan, trial: Trial, rows: Mapping[str, Any]) -> Cost | None:
    """What is kept of a trial, unless its settings or the base's have changed since."""
    row = rows.get(trial.name)
    if row is None or row["settings"] != _settings(plan, trial):
        return None
    return Cost(row["ratio"], row["step_seconds"], row["steps"])


def _settings(plan: Plan, trial: Trial) -> list[Any]:
    """What a cost depends on: the trial's settings and the base's, but for what changes no step."""
    return [
        _alone(one.recipe).model_dump(mode="json", exclude={"log", "cache", "cache_dir"}) for one in (trial, plan.base)
    ]


def _measure(trial: Trial, base: Trial, *, base_cost: Cost | None) -> Cost:
    gc.collect()  # nets lie in cycles
    recipes = [_alone(one.recipe) for one in (trial, base)]
    with runtime(recipes[0].train) as process, ExitStack() as stack:
        sessions = [stack.enter_context(open_session(recipe, process)) for recipe in recipes]
        mine, others = (step_on_one_batch(session) for session in sessions)
        found = interleaved(trial.name, mine, others, pairs=PAIRS, warm_up=1)
        if base_cost is None:  # the base itself
            return Cost(1.0, found.b_seconds, sessions[0].steps_per_epoch)
        return Cost(found.median, found.median * base_cost.step_seconds, sessions[0].steps_per_epoch)


def _alone(recipe: Recipe) -> Recipe:
    """The same without loading processes."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 0})})


def lengths(plan: Plan, costs: Mapping[str, Cost]) -> dict[tuple[str, Budget], int]:
    """Epochs by trial and budget, for the trials whose costs are known."""
    if plan.base.name not in costs:
        return {}
    planned = plan.base.recipe.train.epochs
    whole = planned * costs[plan.base.name].epoch
    found: dict[tuple[str, Budget], int] = {}
    for trial in plan.trials:
        if trial.name in costs:
            found[trial.name, "epochs"] = planned
            found[trial.name, "seconds"] = max(1, round(whole / costs[trial.name].epoch))
            found[trial.name, "own"] = trial.recipe.train.epochs
    return found


def hours(cells: Iterable[Cell], costs: Mapping[str, Cost]) -> float:
    """Of training steps alone."""
    return sum(cell.epochs * costs[cell.trial.name].epoch for cell in cells) / 3600
