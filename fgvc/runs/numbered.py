"""The default folder of a run: runs/NAME, or runs/NAME-2 and so on where another run has it."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.runs.folder import changed_settings, is_run, read_run

RUNS = Path("runs")


def default_folder(name: str, recipe: Recipe, *, anew: bool = False) -> tuple[Path, str]:
    """The first of runs/NAME, runs/NAME-2, ... that is free or holds a run that may go on with this recipe, and why it is not the
    first of them. `anew`: a free one in any case."""
    reason = ""
    for number in count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        taken = _taken(folder, recipe, anew=anew)
        if not taken:
            return folder, reason and f"{reason}: this run is {folder}"
        reason = reason or f"{folder} {taken}"
    raise AssertionError


def _taken(folder: Path, recipe: Recipe, *, anew: bool) -> str:
    """Reason why a run of this recipe can't be in a folder; empty where it can."""
    if is_run(folder):
        if anew:
            return "holds a run"
        try:
            changed = changed_settings(read_run(folder), recipe)
        except FgvcError:
            return "holds a run that can't be read"
        return f"holds a run of other settings ({', '.join(changed)})" if changed else ""
    if folder.is_dir():
        return "holds something else" if any(not path.name.startswith(".") for path in folder.iterdir()) else ""
    return "is no folder" if folder.exists() else ""
