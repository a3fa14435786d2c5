"""Validation answers of a run, by its checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fgvc.runs import checkpoint
from fgvc.runs.record import NAME, load


def named_rightly(run: Path, name: checkpoint.Name = "last") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows (N,) of the images that the validation of a checkpoint could read, ascending, and whether its net names each rightly;
    both empty without validation. Raises FgvcError where the checkpoint is gone or damaged."""
    answers = checkpoint.load(run / "ckpt", name, say=lambda _: None).rest.get("answers")
    index = load(run / NAME, run).index
    if answers is None or not len(index.rows("val")):
        return np.empty(0, np.int64), np.empty(0, bool)
    rows, classes = answers.numpy()
    order = np.argsort(rows)
    return rows[order], np.asarray(index.labels[rows[order]] == classes[order])
