"""What ships of a run that validation has scored: an epoch, its end or its start; and what is said where few images did."""

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
    """Point `ckpt/best` of a finished run at what ships (docs/floor.md). Where enough images validate: the best of its epochs, if
    that is better than the start by more than one standard error, else the start. Where fewer do: its end, or its start if that
    is better by as much. The same run gives the same choice, however often."""
    if recipe.selected != "best" or recipe.select_by != "top1":
        return
    try:
        images = len(named_rightly(out)[0])
        chooses = chooses_epochs(recipe, images)
        if not images or (chooses and images < FEWEST_TO_CHOOSE):  # patience: the epoch that few chose ships
            return
        (start_rows, start), (rows, trained) = named_rightly(out, "start"), named_rightly(out, "best" if chooses else "last")
    except FgvcError:  # it is gone
        return
    _, ours, theirs = np.intersect1d(start_rows, rows, return_indices=True)
    if not len(ours):
        return
    if chooses and not beats(start[ours], trained[theirs]):
        checkpoint.choose_best(out / "ckpt", "start")
    elif not chooses:
        checkpoint.choose_best(out / "ckpt", "start" if beats(trained[theirs], start[ours]) else "last")
