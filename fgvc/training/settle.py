"""What ships of a run that few images validate: its end, or its start."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fgvc.config.recipe import Recipe
from fgvc.data.unseen import FEWEST_TO_CHOOSE
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import beats
from fgvc.runs import checkpoint
from fgvc.runs.record import NAME, load


def chooses_epochs(recipe: Recipe, images: int) -> bool:
    """Whether so many validation images choose among all epochs. With fewer than FEWEST_TO_CHOOSE the best of a dozen is the
    luckiest, and the end of the schedule is better (docs/floor.md); `train.patience` and other scores than top-1 ask for it."""
    return images >= FEWEST_TO_CHOOSE or recipe.select_by != "top1" or recipe.train.patience is not None


def settle_best(out: Path, recipe: Recipe) -> None:
    """Where too few images validate a finished run to choose among its epochs: point `ckpt/best` at its end, or at its start if
    that is better by more than one standard error. The same run gives the same choice, however often."""
    if recipe.selected != "best":
        return
    try:
        start, end = (checkpoint.load(out / "ckpt", name, say=lambda _: None).rest.get("answers") for name in ("start", "last"))
    except FgvcError:  # the start is gone
        return
    if start is None or end is None or chooses_epochs(recipe, end.shape[1]):
        return
    rows, ours, theirs = np.intersect1d(start[0].numpy(), end[0].numpy(), return_indices=True)
    labels = load(out / NAME, out).index.labels[rows]
    right = (answers[1].numpy()[at] == labels for answers, at in ((start, ours), (end, theirs)))
    checkpoint.choose_best(out / "ckpt", "start" if len(rows) and beats(*right) else "last")
