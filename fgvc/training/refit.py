"""Refit of a finished run: training again on the training and validation images together."""

from __future__ import annotations

from pathlib import Path

from fgvc.config.recipe import Recipe
from fgvc.runs import checkpoint
from fgvc.runs.folder import read_run


def refit_recipe(run: Path) -> tuple[Recipe | None, Path, str]:
    """Return recipe and folder of the refit of a finished run, and a message about it. It trains for all epochs of the run: no
    validation is left to choose one by. Where no epoch was clearly better than the start, the refit is the start alone, its head
    fitted anew; where no head is fitted, that would be the same weights again: the recipe is None, and the folder the run's."""
    recipe = read_run(run)
    out, message = run.with_name(f"{run.name}-refit"), f"training again on training and validation images together, as {run} was"
    update: dict[str, object] = {"refit": False, "patience": None}
    if recipe.selected == "best":
        best = checkpoint.load(run / "ckpt", "best", say=lambda _: None).progress
        if best.step == 0 and recipe.model.head != "probe":
            return None, run, "no epoch was clearly better than its start, which ships: more images would not change it"
        if best.step == 0:
            update["max_steps"] = 0
            message = f"no epoch of {run} was clearly better than its start: fitting its head again, on validation images as well"
        elif best.epoch < recipe.train.epochs:
            message += f"; of that epoch {best.epoch} was the best, this one ends with its last"
    refit = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"hold_out": False, "fold": None}),
            "train": recipe.train.model_copy(update=update),
            "select": None if recipe.select == "best" else recipe.select,
        }
    )
    return refit, out, message
