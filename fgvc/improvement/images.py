"""The images of an improvement in their three splits: those that are learned from, that choose, and that judge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import SPLITS, AutoData
from fgvc.data.beside import read_folder, with_folder
from fgvc.data.index import ImageIndex
from fgvc.data.quality.checks import check, no_split
from fgvc.data.sources.read import read_source
from fgvc.data.unseen import FEWEST_TO_CHOOSE, OPTIONS, Seen, divide_unseen
from fgvc.errors import FgvcError
from fgvc.io.tables import as_csv

COLUMNS = ("path", "label", "split")
CHOOSE = 0.15  # share of the images to learn from that is set aside, where no weights have seen them
FOLDS = 3  # in which all of these choose in turn, where that share is too few


@dataclass(frozen=True, slots=True, kw_only=True)
class Divided:
    """A set with each image in one split: train is learned from, val chooses, test judges. Left-out images are in none."""

    index: ImageIndex
    rows: NDArray[np.int64]  # (N,) of the index, ascending: those that are used
    rule: str  # in words
    folds: int = 1  # of train that choose in turn; 1: val chooses

    @property
    def counts(self) -> dict[str, int]:
        splits = self.index.splits[self.rows]
        return {name: int((splits == number).sum()) for number, name in enumerate(SPLITS)}

    @property
    def unjudged(self) -> ImageIndex:
        """The images that are learned from or choose."""
        rows = self.rows[self.index.splits[self.rows] != SPLITS.index("test")]
        columns = {name: getattr(self.index, name)[rows] for name in ("paths", "labels", "splits")}
        return replace(self.index, **columns, groups=None, boxes=None, parts=None, part_names=())

    def table(self) -> str:
        """The images as CSV, for `data.kind: csv`."""
        index = self.index
        groups = index.groups if self.folds > 1 else None  # no fold divides them; val and test are drawn already
        return as_csv(
            [
                {
                    "path": str(index.paths[row]), "label": index.classes[index.labels[row]],
                    "split": SPLITS[index.splits[row]], **({} if groups is None else {"group": str(groups[row])}),
                }
                for row in self.rows
            ],
            COLUMNS,
        )  # fmt: skip


def divide(
    root: Path,
    *,
    deployed: bool,
    seen: Seen = "train",
    unseen: Path | None = None,
    bundle: Path | None = None,
    in_folds: bool = False,
) -> Divided:
    """Read a set and divide it. `deployed`: the first weights are a file's, which may have seen it, see `fgvc.data.unseen`;
    `seen`, `unseen`: what it has seen, and a folder of more images that it has not; `bundle`: the file's, which lists the images
    that judge it: what it has seen where neither these nor the set say that. `in_folds`: where no weights have seen the images,
    and the share of them that would choose is small, all choose in turn.

    Raises FgvcError where a set can't be read or has one class, and NoUnseenImagesError where no image is left to judge.
    """
    index = read_folder(root)
    if len(index.classes) < 2:
        raise FgvcError(f"{root}: {len(index.classes)} class; a classifier needs two")
    given = set(index.given_splits)
    if bundle is not None and seen == "train" and unseen is None and not given:
        seen = bundle
    if unseen is not None:
        if seen != "train":
            raise FgvcError(f"--unseen {unseen}: says which images the file has not seen, and --seen {seen} does, too: give one")
        index = with_folder(index, unseen, where="--unseen")
    elif not deployed or (seen != "train" and not given):
        index = read_source(AutoData(root=root, val_fraction=0.0 if "val" in given else CHOOSE))
    if not deployed:
        folds = 1
        if in_folds and "val" not in given and len(index.rows("val")) < FEWEST_TO_CHOOSE:
            folds, index = FOLDS, read_source(AutoData(root=root, val_fraction=0.0))
        rule = f"no weights have seen these images; {index.recognised}"
        return Divided(index=index, rows=np.arange(len(index)), rule=rule, folds=folds)
    apart = divide_unseen(index, seen, learned=index.rows("train"), beside=unseen, ways=OPTIONS)
    splits = np.full(len(index), SPLITS.index("train"), np.int8)
    splits[apart.choose], splits[apart.judge] = SPLITS.index("val"), SPLITS.index("test")
    rows = np.setdiff1d(np.arange(len(index)), np.union1d(apart.pool.copies, apart.pool.unreadable))
    return Divided(index=replace(index, splits=splits), rows=rows, rule=str(apart))


def refuse_faulty(divided: Divided) -> tuple[str, ...]:
    """Check every image, as `fgvc data check` does; returns the warnings. Raises FgvcError where there are errors."""
    report = check(divided.index)
    if report.errors:
        raise FgvcError("\n".join(report.errors))
    return tuple(warning for warning in report.warnings if warning != no_split("val"))  # it was divided here
