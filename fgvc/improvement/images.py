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
from fgvc.data.quality.copies import together
from fgvc.data.sources.read import read_source
from fgvc.data.splits import carve
from fgvc.data.unseen import FEWEST_TO_CHOOSE, OPTIONS, Seen, divide_unseen, rows_learned_by, seen_rows
from fgvc.errors import FgvcError, NoUnseenImagesError
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
    that judge it, and has learned from the others of its set. `in_folds`: where no weights have seen the images,
    and the share of them that would choose is small, all choose in turn.

    Raises FgvcError where a set can't be read or has one class, and NoUnseenImagesError where no image is left to judge.
    """
    index = read_folder(root)
    if index.contents is not None:
        raise FgvcError(f"{root}: has its images inside of tables; give a folder, or a table that names files")
    if len(index.classes) < 2:
        raise FgvcError(f"{root}: {len(index.classes)} class; a classifier needs two")
    return _for_file(root, index, seen, unseen, bundle) if deployed else _for_net(root, index, in_folds=in_folds)


def _for_net(root: Path, index: ImageIndex, *, in_folds: bool) -> Divided:
    """The set of a net that has seen none of its images. Of the splits that it does not bring along, test is drawn first; a
    validation split of its own is the test split where it brings no other, as in ImageNet's layout."""
    folds = 1
    if set(index.given_splits) == {"val"}:
        splits = index.splits.copy()
        splits[index.rows("val")] = SPLITS.index("test")
        recognised = f"{index.recognised}; its validation split judges"
        whole = replace(index, splits=splits, given_splits=("test",), recognised=recognised)
        chosen = carve(index.labels, splits, split="val", fraction=CHOOSE, seed=0, groups=index.groups)
        drawn = replace(whole, splits=chosen)
    else:
        whole = read_source(AutoData(root=root, val_fraction=0.0))
        drawn = whole if "val" in index.given_splits else read_source(AutoData(root=root, val_fraction=CHOOSE))
    index = together(drawn)
    if in_folds and "val" not in index.given_splits and len(index.rows("val")) < FEWEST_TO_CHOOSE:
        folds, index = FOLDS, together(whole)
    if not len(index.rows("test")):
        raise NoUnseenImagesError(f"{index.root}: no image could judge; put some into a test split (train/ and test/ folders)")
    rule = f"no weights have seen these images; {index.recognised}"
    return Divided(index=index, rows=np.arange(len(index)), rule=rule, folds=folds)


def _for_file(root: Path, index: ImageIndex, seen: Seen, unseen: Path | None, bundle: Path | None) -> Divided:
    """The set of a deployed file, which has seen what `seen` says."""
    flat = not index.given_splits
    if unseen is not None:
        if seen != "train":
            raise FgvcError(f"--unseen {unseen}: says which images the file has not seen, and --seen {seen} does, too: give one")
        index = with_folder(index, unseen, where="--unseen")
    elif flat and seen == "train" and bundle is not None:
        seen = bundle
    elif flat and seen == "none":
        index = read_source(AutoData(root=root, val_fraction=CHOOSE))
    learned, remark = index.rows("train"), ""
    if flat and isinstance(seen, Path):  # all that it names is learned from, and nothing else
        learned = seen_rows(index, seen, OPTIONS)
    elif bundle is not None and seen == "train" and len(own := rows_learned_by(index, bundle)):
        learned, remark = np.union1d(learned, own), f"; {bundle} lists those that judge it, and has learned from the others"
    apart = divide_unseen(index, seen, learned=learned, beside=unseen, ways=OPTIONS, fewest=FEWEST_TO_CHOOSE // 2)
    if not len(apart.choose) and len(apart.judge) >= FEWEST_TO_CHOOSE:
        raise NoUnseenImagesError(
            f"{index.root}: the {len(apart.judge)} images that the file has not seen belong to one group, or are near copies of "
            "one image, so that none can choose while others judge; add others to the test split"
        )
    rows = np.setdiff1d(np.arange(len(index)), np.union1d(apart.pool.copies, apart.pool.unreadable))
    return Divided(index=replace(index, splits=apart.splits(len(index))), rows=rows, rule=f"{apart}{remark}")


def refuse_faulty(divided: Divided) -> tuple[str, ...]:
    """Check every image, as `fgvc data check` does; returns the warnings. Raises FgvcError where there are errors."""
    report = check(divided.index)
    if report.errors:
        raise FgvcError("\n".join(report.errors))
    return tuple(warning for warning in report.warnings if warning != no_split("val"))  # it was divided here
