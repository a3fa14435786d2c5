"""A confusion matrix as a table with numbers: all of it, or of many classes those with the most mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WHOLE = 20  # classes up to which the matrix is shown as it is
WORST = 12  # of more classes, those with the most mistakes


@dataclass(frozen=True, slots=True)
class Cell:
    """Images of a true class that were named so. `own`: rightly; `shade`: of its colour, in per cent."""

    images: int
    own: bool
    shade: int


@dataclass(frozen=True, slots=True)
class Row:
    """A true class: its number from 1, its name, and the classes that its images were taken for."""

    number: int
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class ConfusionTable:
    """Rows of classes, in columns the same classes; not `whole`: and at the end all others together."""

    rows: tuple[Row, ...]
    classes: int
    whole: bool


def confusion_table(counts: NDArray[np.int64], classes: Sequence[str]) -> ConfusionTable:
    """Make the table of counts (K,K): row = true class, column = named."""
    count = len(classes)
    mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    chosen = np.arange(count) if count <= WHOLE else np.sort(np.argsort(-mistakes, kind="stable")[:WORST])
    whole = len(chosen) == count
    rows = []
    for k in chosen.tolist():
        named = counts[k][chosen].tolist() + ([] if whole else [int(counts[k].sum() - counts[k][chosen].sum())])
        total = max(int(counts[k].sum()), 1)
        own = [*(j == k for j in chosen.tolist()), *([] if whole else [False])]
        cells = (Cell(n, right, round(10 + 60 * n / total)) for n, right in zip(named, own, strict=True))
        rows.append(Row(k + 1, classes[k], tuple(cells)))
    return ConfusionTable(tuple(rows), count, whole)
