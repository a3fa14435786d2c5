"""A run that few images validate: what ships, its end or its start, and what is said."""

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
    """Whether so many validation images choose among all epochs. With fewer than FEWEST_TO_CHOOSE the best of a dozen is the
    luckiest, and the end of the schedule is better (docs/floor.md); `train.patience` and other scores than top-1 ask for it."""
    return images >= FEWEST_TO_CHOOSE or recipe.select_by != "top1" or recipe.train.patience is not None


def few_words(images: int) -> list[str]:
    """Words on validation images that are too few to rest on."""
    if not 0 < images < FEWEST:
        return []
    return [
        f"{images} validation images are few to choose by, and too few for calibrated probabilities ({FEWEST}): "
        "data.val_fraction sets aside more"
    ]


def settle_best(out: Path, recipe: Recipe) -> None:
    """Where too few images validate a finished run to choose among its epochs: point `ckpt/best` at its end, or at its start if
    that is better by more than one standard error. The same run gives the same choice, however often."""
    if recipe.selected != "best":
        return
    try:
        rows, end = named_rightly(out)
        if not len(rows) or chooses_epochs(recipe, len(rows)):
            return
        others, start = named_rightly(out, "start")
    except FgvcError:  # it is gone
        return
    if not len(others):
        return
    both, ours, theirs = np.intersect1d(others, rows, return_indices=True)
    checkpoint.choose_best(out / "ckpt", "start" if len(both) and beats(end[theirs], start[ours]) else "last")
