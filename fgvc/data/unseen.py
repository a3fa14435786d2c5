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
from fgvc.runtime.bundle import JUDGE, read_judge

Seen = Literal["train", "none"] | Path
FEWEST_TO_CHOOSE = 200  # unseen images, below which all of them judge and none chooses
SURE = 0.98  # share of right answers above which a file has most likely seen the images
_JUDGE: Literal["test"] = "test"  # whose random stream draws the half


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """Names of the settings, or of the command line's options, by which a user states which images a deployed file has seen."""

    seen: str
    none: str
    file: str
    folder: str


SETTINGS = Ways(seen="deploy.seen", none="deploy.seen=none", file="deploy.seen=FILE", folder="deploy.unseen=DIR")
OPTIONS = Ways(seen="--seen", none="--seen none", file="--seen FILE", folder="--unseen DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Rows of a set that the deployed classifier was not trained on, and the new one is not."""

    rows: NDArray[np.int64]
    unreadable: NDArray[np.int64]  # of the unseen images: in no row above
    copies: NDArray[np.int64]  # unseen by name, near copies of others than these: left out
    families: NDArray[np.int64]  # (N,) number of each image's group of near copies
    where: str  # which images of the set, in a word or two
    rule: str  # in words, for people and records

    @property
    def left_out(self) -> str:
        """The number of near copies that are left out, in words; empty: none."""
        return _copies(len(self.copies), "left out")

    def named(self, division: str = "") -> str:
        """Description of these images, as in "judged on 686 unseen images of ...". `division`: which of them judge."""
        remarks = [*[division] * bool(division), *[self.left_out] * bool(len(self.copies))]
        return f"{self.where} ({'; '.join(remarks)})" if remarks else self.where


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A pool by what its images may be used for."""

    pool: Pool
    choose: NDArray[np.int64]  # between settings, weights and epochs; empty where there are too few
    judge: NDArray[np.int64]  # the new classifier against the deployed one; read once
    division: str = ""  # in words

    def splits(self, images: int) -> NDArray[np.int8]:
        """The split of each of the set's images (N,): val chooses, test judges, all others are learned from."""
        splits = np.full(images, SPLITS.index("train"), np.int8)
        splits[self.choose], splits[self.judge] = SPLITS.index("val"), SPLITS.index("test")
        return splits

    @property
    def named(self) -> str:
        """Description of the images that judge, as of `Pool.named`."""
        return self.pool.named(self.division)

    def __str__(self) -> str:
        copies = len(self.pool.copies)
        left_out = f"; {_copies(copies, 'of images that it has seen left out')}" if copies else ""
        if not len(self.choose):
            few = len(self.judge) < FEWEST_TO_CHOOSE
            why = f"fewer than {FEWEST_TO_CHOOSE}" if few else "all of one group, which is not divided"
            return f"{self.pool.rule}{left_out}; {why}: none chooses, {len(self.judge)} judge"
        return f"{self.pool.rule}{left_out}; {len(self.choose)} choose, {len(self.judge)} judge"


def _copies(count: int, what: str) -> str:
    return f"{count} near {'copy' if count == 1 else 'copies'} {what}"


def judged(index: ImageIndex, split: str, images: int) -> str:
    """Description of the images that a score of a split is measured on, where the deployed classifier was not trained on them."""
    if not index.unseen or split == "train":
        return ""
    return f"{'judged on' if split == 'test' else 'chosen by'} {images} unseen images of {index.unseen}"


def unseen_rows(
    index: ImageIndex, seen: Seen, *, learned: NDArray[np.int64], beside: Path | None = None, ways: Ways = SETTINGS
) -> tuple[NDArray[np.int64], str, str]:
    """Rows that the deployed classifier was not trained on and the new one will not be (`learned`), where they are in a word or
    two, and the rule in words.

    `seen`: train: what the set says of its train split; none: it has seen no image of the set; a file: those that it names, one
    path a line, absolute or relative to the set's folder; a bundle: all but those that judge it. `beside`: the folder of unseen
    images that were added to the set, see `fgvc.data.beside`; `ways`: for messages. Raises FgvcError for a file that names no
    image of the set, and NoUnseenImagesError where no image is left.
    """
    mask = np.ones(len(index), dtype=bool)
    mask[learned] = False
    where = "the set"
    if seen == "none":
        rule = f"seen by the deployed file: none of these images ({ways.none})"
    elif isinstance(seen, Path):
        named = _named(index, seen, ways.seen)
        mask &= ~named
        rule = f"seen by the deployed file: {int(named.sum())} images that {seen} names"
    elif not index.given_splits:
        raise NoUnseenImagesError(all_seen(index.root, ways))
    else:
        given = [SPLITS.index(split) for split in index.given_splits]
        mask &= np.isin(index.splits, given)
        # Those beside the set lie outside of it.
        own = beside is None or any(not path.startswith("../") for path in index.paths[mask].tolist())
        places = [*[f"the set's own {' and '.join(index.given_splits)} split"] * own, *[f"the images of {beside}"] * bool(beside)]
        where = " and ".join([*index.given_splits] * own + ([] if beside is None else [beside.name]))
        rule = f"not seen by the deployed file: {' and '.join(places)}"
    if not mask.any():
        raise NoUnseenImagesError(
            f"{index.root}: no image is left that the deployed file has not seen and the new one does not learn from ({rule}); "
            "add some to the test split"
        )
    return np.flatnonzero(mask), where, rule


def seen_rows(index: ImageIndex, seen: Path, ways: Ways) -> NDArray[np.int64]:
    """Rows that a list of paths names, or of a bundle's set all but those that judge it. Raises FgvcError where it names none."""
    return np.flatnonzero(_named(index, seen, ways.seen))


def rows_learned_by(index: ImageIndex, bundle: Path) -> NDArray[np.int64]:
    """Rows that the net of a bundle learned from or was chosen by: of the set itself, and of the images beside it, all but those
    that the bundle lists as judging it; none of a place of which it lists nothing."""
    judging = _listed(index, read_judge(bundle)["images"])
    beside = np.fromiter((path.startswith("../") for path in index.paths), dtype=bool, count=len(index))
    learned = [place & ~judging for place in (beside, ~beside) if (place & judging).any()]
    return np.flatnonzero(np.any(learned, axis=0)) if learned else np.empty(0, np.int64)


def all_seen(root: Path, ways: Ways, evidence: str = "") -> str:
    """The message for a set without any split of its own. `evidence`: how well the file names its images."""
    return (
        f"{root}: the set brings no validation or test split along, so the deployed file may have been trained on every image of "
        f"it, and names these rightly whatever it knows{evidence and f' ({evidence})'}. Put images that it has not seen into a "
        f"test split (train/ and test/ folders), or give {ways.none} (all were collected after it was trained), {ways.file} (a "
        f"list of the paths that it has seen) or {ways.folder} (a folder of images that it has not seen)"
    )


def parse_seen(text: str | None) -> Seen | None:
    """Parse `--seen`: train, none, or a file."""
    return text if text is None or text in ("train", "none") else Path(text)  # type: ignore[return-value]


def seen_words(accuracy: float, loss: float) -> str:
    """Describe how well a classifier names images, as evidence of whether it has seen them. `accuracy`: in [0,1]; `loss`: mean,
    in nats."""
    remark = ": it has most likely seen them" if accuracy > SURE else ""
    return f"it names {100 * accuracy:.1f} % of these rightly, mean loss {loss:.2f}{remark}"


def unseen_pool(
    index: ImageIndex, seen: Seen, *, learned: NDArray[np.int64], beside: Path | None = None, ways: Ways = SETTINGS
) -> Pool:
    """The unseen images of a set, near copies of its other images left out. Raises FgvcError as `unseen_rows` does, and
    NoUnseenImagesError where all are near copies."""
    rows, where, rule = unseen_rows(index, seen, learned=learned, beside=beside, ways=ways)
    families, readable = near_copies(index, np.arange(len(index)))
    unseen = np.isin(np.arange(len(index)), rows)
    pool = readable & unseen
    copies = np.flatnonzero(pool & np.isin(families, families[readable & ~pool]))
    pool[copies] = False
    if not pool.any():
        raise NoUnseenImagesError(
            f"{index.root}: every image that could judge is a near copy of one that was seen ({len(copies)}); add others "
            "to the test split"
        )
    unreadable = np.flatnonzero(unseen & ~readable)
    return Pool(rows=np.flatnonzero(pool), unreadable=unreadable, copies=copies, families=families, where=where, rule=rule)


def divide_unseen(
    index: ImageIndex, seen: Seen, *, learned: NDArray[np.int64], beside: Path | None = None, ways: Ways = SETTINGS,
    fewest: int = 1,
) -> Unseen:
    """Divide the unseen images once: the set's own validation split chooses and its test split judges, where it brings both
    along, the former with `fewest` images or more (near copies of validation images choose, too); else a half of each class
    chooses, the other one judges, near copies of each other together. Where none would be left to judge, none chooses. Near
    copies of images that were seen or are learned from are left out.

    The same set gives the same halves on every machine. Raises FgvcError as `unseen_pool` does.
    """
    pool = unseen_pool(index, seen, learned=learned, beside=beside, ways=ways)
    rows = pool.rows
    if len(rows) < FEWEST_TO_CHOOSE:
        return Unseen(pool=pool, choose=np.empty(0, np.int64), judge=rows)
    if seen == "train" and set(index.given_splits) == {"val", "test"}:  # whoever made the set has divided them
        test = index.splits[rows] == SPLITS.index("test")
        copied = test & np.isin(pool.families[rows], pool.families[rows[~test]])
        choose, judge = rows[~test | copied], rows[test & ~copied]
        if len(choose) >= fewest and len(judge):
            moved = f", but {_copies(int(copied.sum()), 'of val')}" if copied.any() else ""
            return Unseen(pool=pool, choose=choose, judge=judge, division=f"val chooses, test judges{moved}")
    groups = pool.families[rows]
    if index.groups is not None:  # the set's own, such as photographs of one plant
        groups = joined(len(rows), links(groups), links(group_codes(index.groups[rows])))
    names = np.array([str(group) for group in groups], dtype=np.dtypes.StringDType())
    judges = stratified(index.labels[rows], 0.5, seed=0, split=_JUDGE, groups=names)
    if not judges.any():  # all belong together
        return Unseen(pool=pool, choose=np.empty(0, np.int64), judge=rows)
    return Unseen(pool=pool, choose=rows[~judges], judge=rows[judges], division="half of them")


def judged_apart(
    index: ImageIndex, seen: Seen, *, hold_out: bool = True, beside: Path | None = None
) -> ImageIndex:
    """The index for training from a deployed classifier's own weights: validation are the unseen images that choose (without
    `hold_out` learned from, too), test those that judge; all others are learned from. Errors as of `divide_unseen`."""
    unseen = divide_unseen(index, seen, learned=index.rows("train"), beside=beside)
    splits = unseen.splits(len(index))
    if not hold_out:
        splits[unseen.choose] = SPLITS.index("train")
    counts = ", ".join(f"{name} {int((splits == k).sum())}" for k, name in enumerate(SPLITS))
    recognised = f"{index.recognised}; {unseen}: {counts}"
    return replace(index, splits=splits, unseen=unseen.named, recognised=recognised)


def _named(index: ImageIndex, file: Path, key: str) -> NDArray[np.bool_]:
    """Mask (N,) of the rows that a list of paths names, or of a bundle's set all but those that judge it; `key`: what names the
    file, for messages."""
    if file.is_dir():
        if not (file / JUDGE).is_file():
            raise FgvcError(
                f"{key}: {file}: is a folder without {JUDGE}; name a bundle of fgvc's, which lists there what judges it, or a "
                "list of paths, one a line"
            )
        return ~_among(index, read_judge(file)["images"], file / JUDGE, key)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FgvcError(f"{key}: {file}: can't be read as a list of paths, one a line ({error})") from error
    return _among(index, lines, file, key)


def _among(index: ImageIndex, lines: Iterable[str], file: Path, key: str) -> NDArray[np.bool_]:
    """Mask (N,) of the rows that the lines of `file` name by their paths."""
    lines = list(lines)
    named = _listed(index, lines)
    if not named.any():
        raise FgvcError(
            f"{key}: {file}: names none of the {len(index)} images in {index.root} ({some(lines, 2)}); paths are "
            "relative to that folder, or absolute"
        )
    return named


def _listed(index: ImageIndex, paths: Iterable[str]) -> NDArray[np.bool_]:
    """Mask (N,) of the rows with these paths."""
    listed = set(_relative(paths, index.root))
    return np.fromiter((path in listed for path in index.paths), dtype=bool, count=len(index))


def _relative(lines: Iterable[str], root: Path) -> Iterable[str]:
    resolved = root.resolve()
    for line in lines:
        path = Path(line)
        if line and path.is_absolute():
            if path.resolve().is_relative_to(resolved):
                yield str(PurePosixPath(path.resolve().relative_to(resolved)))
        elif line:
            yield str(PurePosixPath(line.replace("\\", "/")))
