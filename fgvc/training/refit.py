"""Training once more on all images, those that validation had too, once it has shown what the settings are worth."""

from __future__ import annotations

from pathlib import Path

from fgvc.config.recipe import Recipe
from fgvc.runs import checkpoint
from fgvc.runs.folder import read_run


def refit_of(run: Path) -> tuple[Recipe, Path, str]:
    """Recipe and folder of the refit of a finished run, and what to say of it. The epochs are as many as they were: there is
    nothing left to choose one by. Where validation liked no epoch better than the start, the refit is the start alone."""
    recipe = read_run(run)
    out, said = run.with_name(f"{run.name}-refit"), f"training again on training and validation images together, as {run} was"
    update: dict[str, object] = {"refit": False}
    if recipe.selected == "best":
        best = checkpoint.load(run / "ckpt", "best", say=lambda _: None).progress
        if best.step == 0:
            update["max_steps"] = 0
            said = f"no epoch of {run} was better than its start: fitting the start's head again, on validation images as well"
        elif best.epoch < recipe.train.epochs:
            said += f"; of that epoch {best.epoch} was the best, this one ends with its last"
    again = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"hold_out": False, "fold": None}),
            "train": recipe.train.model_copy(update=update),
            "select": None if recipe.select == "best" else recipe.select,
        }
    )
    return again, out, said
