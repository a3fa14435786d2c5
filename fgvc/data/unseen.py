"""Which images may choose between classifiers, and which may judge a deployed one: only those that it was not trained on.

A classifier names the images that it learned from rightly, so that on them nothing is ever better than it. It is assumed to have
learned from the train split of its set, and from validation and test splits that fgvc draws itself: whoever trained it did not
know of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import SPLITS
from fgvc.data.index import ImageIndex
from fgvc.data.quality.copies import near_copies
from fgvc.data.quality.duplicates import joined, links
from fgvc.data.splits import group_codes, stratified
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.io.names import some

Seen = Literal["train", "none"] | Path
FEWEST_TO_CHOOSE = 200  # unseen images, below which all of them judge and none chooses
_JUDGE: Literal["test"] = "test"  # whose random stream draws the half


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """Rows of a set by what they may be used for, all of images that the deployed classifier was not trained on."""

    choose: NDArray[np.int64]  # between settings, weights and epochs; empty where there are too few
    judge: NDArray[np.int64]  # the new classifier against the deployed one; read once
    copies: NDArray[np.int64]  # unseen by name, near copies of seen ones: left out
    rule: str  # in words, for people and records

    def __str__(self) -> str:
        left_out = f"; {len(self.copies)} near copies of images that it has seen are left out" if len(self.copies) else ""
        if not len(self.choose):
            return f"{self.rule}{left_out}; fewer than {FEWEST_TO_CHOOSE}: none chooses, {len(self.judge)} judge"
        return f"{self.rule}{left_out}; {len(self.choose)} choose, {len(self.judge)} judge"


def unseen_rows(index: ImageIndex, seen: Seen, *, learned: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """Rows that the deployed classifier was not trained on and the new one will not be (`learned`), and the rule in words.

    `seen`: train: what the set says of its train split; none: it has seen no image of the set; a file: those that it names, one
    path a line, absolute or relative to the set's folder. Raises FgvcError for a file that names no image of the set, and
    NoUnseenImagesError where no image is left.
    """
    mask = np.ones(len(index), dtype=bool)
    mask[learned] = False
    if seen == "none":
        rule = "seen by the deployed file: none of these images (deploy.seen: none)"
    elif isinstance(seen, Path):
        named = _named(index, seen)
        mask &= ~named
        rule = f"seen by the deployed file: {int(named.sum())} images that {seen} names"
    elif not index.given_splits:
        raise NoUnseenImagesError(
            f"{index.root}: the set brings no validation or test split along, so the deployed file may have been trained on "
            "every image of it, and names these rightly whatever it knows. Put images that it has not seen into a test split "
            "(train/ and test/ folders), or say what it has seen: deploy.seen=none (all were collected after it was trained) or "
            "deploy.seen=FILE (a list of paths)"
        )
    else:
        given = [SPLITS.index(split) for split in index.given_splits]
        mask &= np.isin(index.splits, given)
        rule = f"not seen by the deployed file: the set's own {' and '.join(index.given_splits)} split"
    if not mask.any():
        raise NoUnseenImagesError(
            f"{index.root}: no image is left that the deployed file has not seen and the new one does not learn from ({rule}); "
            "add some to the test split"
        )
    return np.flatnonzero(mask), rule


def divide_unseen(index: ImageIndex, seen: Seen, *, learned: NDArray[np.int64]) -> Unseen:
    """Divide the unseen images once: the set's own validation split chooses and its test split judges, where it brings both
    along; else a half of each class chooses, the other one judges, near copies of each other together. Near copies of images that
    were seen or are learned from are left out.

    The same set gives the same halves on every machine. Raises FgvcError as `unseen_rows` does, and NoUnseenImagesError where
    all are near copies.
    """
    rows, rule = unseen_rows(index, seen, learned=learned)
    numbers, readable = near_copies(index, np.arange(len(index)))
    pool = readable & np.isin(np.arange(len(index)), rows)
    copies = np.flatnonzero(pool & np.isin(numbers, numbers[readable & ~pool]))
    pool[copies] = False
    rows = np.flatnonzero(pool)
    if not len(rows):
        raise NoUnseenImagesError(
            f"{index.root}: every image that could judge is a near copy of one that was seen ({len(copies)}); add others "
            "to the test split"
        )
    if len(rows) < FEWEST_TO_CHOOSE:
        return Unseen(choose=np.empty(0, np.int64), judge=rows, copies=copies, rule=rule)
    if seen == "train" and set(index.given_splits) == {"val", "test"}:  # whoever made the set has divided them
        given = [rows[index.splits[rows] == SPLITS.index(split)] for split in ("val", "test")]
        if all(len(some_rows) for some_rows in given):
            return Unseen(choose=given[0], judge=given[1], copies=copies, rule=rule)
    groups = numbers[rows]
    if index.groups is not None:  # the set's own, such as photographs of one plant
        groups = joined(len(rows), links(groups), links(group_codes(index.groups[rows])))
    names = np.array([str(group) for group in groups], dtype=np.dtypes.StringDType())
    judges = stratified(index.labels[rows], 0.5, seed=0, split=_JUDGE, groups=names)
    return Unseen(choose=rows[~judges], judge=rows[judges], copies=copies, rule=rule)


def judged_apart(index: ImageIndex, seen: Seen, *, hold_out: bool = True) -> ImageIndex:
    """The index for training from a deployed classifier's own weights: validation are the unseen images that choose (without
    `hold_out` learned from, too), test those that judge; all others are learned from. Errors as of `divide_unseen`."""
    unseen = divide_unseen(index, seen, learned=index.rows("train"))
    splits = np.full(len(index), SPLITS.index("train"), np.int8)
    splits[unseen.judge] = SPLITS.index("test")
    if hold_out:
        splits[unseen.choose] = SPLITS.index("val")
    counts = ", ".join(f"{name} {int((splits == k).sum())}" for k, name in enumerate(SPLITS))
    recognised = f"{index.recognised}; {unseen}: {counts}"
    return replace(index, splits=splits, unseen=unseen.rule, recognised=recognised)


def _named(index: ImageIndex, file: Path) -> NDArray[np.bool_]:
    """Which rows a list of paths names."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FgvcError(f"deploy.seen: {file}: can't be read as a list of paths, one a line ({error})") from error
    wanted = set(_relative(lines, index.root))
    named = np.fromiter((str(path) in wanted for path in index.paths), dtype=bool, count=len(index))
    if not named.any():
        raise FgvcError(
            f"deploy.seen: {file}: names none of the {len(index)} images in {index.root} ({some(lines, 2)}); paths are "
            "relative to that folder, or absolute"
        )
    return named


def _relative(lines: Iterable[str], root: Path) -> Iterable[str]:
    resolved = root.resolve()
    for line in lines:
        path = Path(line)
        if line and path.is_absolute():
            if path.resolve().is_relative_to(resolved):
                yield str(PurePosixPath(path.resolve().relative_to(resolved)))
        elif line:
            yield str(PurePosixPath(line.replace("\\", "/")))
