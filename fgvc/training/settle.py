"""Choice of the weights that ship after validation has scored a run: its best epoch, its end or its start."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fgvc.config.recipe import Recipe
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import FEWEST
from fgvc.evaluation.paired import beats
from fgvc.runs import checkpoint
from fgvc.runs.validated import named_rightly


def chooses_epochs(recipe: Recipe, images: int) -> bool:
    """Whether this number of validation images is enough to choose the best epoch. With fewer than FEWEST_TO_CHOOSE the best of a
    dozen is the luckiest, and the end of the schedule is better (docs/floor.md); `train.patience` and other scores than top-1 ask
    for it."""
    return images >= FEWEST_TO_CHOOSE or recipe.select_by != "top1" or recipe.train.patience is not None


def needs_margin(recipe: Recipe, images: int) -> bool:
    """Whether an epoch ships only if it is better than the start by more than one standard error, with this number of validation
    images."""
    return images >= FEWEST_TO_CHOOSE and recipe.select_by == "top1"


def few_words(images: int) -> list[str]:
    """The remark that the validation images are few, as a list of one line; empty where they are enough, or none."""
    if not 0 < images < FEWEST:
        return []
    return [
        f"{images} validation images are few to choose by, and too few for calibrated probabilities ({FEWEST}): "
        "data.val_fraction sets aside more"
    ]


def settle_best(out: Path, recipe: Recipe) -> None:
    """Point `ckpt/best` of a finished run at what ships (docs/floor.md). Where enough images validate: the best of its epochs, if
    that is better than the start by more than one standard error, else the start. Where fewer do: its end, or its start if that
    is better by as much. The same run gives the same choice, however often."""
    if recipe.selected != "best":
        return
    try:
        rows, trained = named_rightly(out)
        few = not chooses_epochs(recipe, len(rows))
        if not len(rows) or not (few or needs_margin(recipe, len(rows))):
            return
        if not few:
            rows, trained = named_rightly(out, "best")
        start_rows, start = named_rightly(out, "start")
    except FgvcError:  # it is gone
        return
    _, ours, theirs = np.intersect1d(start_rows, rows, return_indices=True)
    start, trained = start[ours], trained[theirs]
    if not len(start):
        return
    if few:
        checkpoint.choose_best(out / "ckpt", "start" if beats(trained, start) else "last")
    elif not beats(start, trained):
        checkpoint.choose_best(out / "ckpt", "start")
