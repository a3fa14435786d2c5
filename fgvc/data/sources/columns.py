"""Functions that all readers of sets share: columns of an index, class numbers, splits."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.dtypes import StringDType

from fgvc.config.data import SPLITS, Source, Split
from fgvc.data.splits import carve, fold_numbers
from fgvc.errors import FgvcError
from fgvc.io.names import one_line, refuse_breaking, some

TEXT = StringDType()
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "validating", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
_SPLIT_SUFFIXES = ("set", "data", "dataset", "split", "part", "images", "imgs")  # "train_set", "Training Images"


def split_named(name: str) -> Split | None:
    """The split that the name of a folder, or a cell of a table, stands for, in any capitals; None if it stands for none."""
    words = re.findall("[a-z]+", name.lower()) if re.fullmatch("[A-Za-z _-]+", name.strip()) else []
    while len(words) > 1 and words[-1] in _SPLIT_SUFFIXES:
        words.pop()
    joined = "".join(words).removesuffix("set")
    return next((split for split, names in _SPLIT_NAMES.items() if joined in names), None)


class StringColumn:
    """A column of text that grows without keeping a Python object per row."""

    def __init__(self) -> None:
        self._chunks: list[np.ndarray] = []
        self._fresh: list[str] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, text: str) -> None:
        self._length += 1
        self._fresh.append(text)
        if len(self._fresh) >= 65536:
            self._flush()

    def extend(self, texts: Sequence[str]) -> None:
        for start in range(0, len(texts), 65536):
            self._length += len(texts[start : start + 65536])
            self._fresh += texts[start : start + 65536]
            if len(self._fresh) >= 65536:
                self._flush()

    def array(self) -> np.ndarray:
        """The column as an array (N,) of StringDType; ends it."""
        self._flush()
        chunks, self._chunks = self._chunks, []
        return np.concatenate(chunks) if chunks else np.empty(0, TEXT)

    def _flush(self) -> None:
        """Move new texts into a chunk. Raises FgvcError for text that is not UTF-8, as some files' names."""
        if self._fresh:
            try:
                self._chunks.append(np.array(self._fresh, dtype=TEXT))
            except UnicodeEncodeError as error:
                raise FgvcError(f"{one_line(error.object)}: the name is not UTF-8: rename the file") from error
            self._fresh = []


def number_classes(
    names: Sequence[str], setting: Sequence[str] | None, *, where: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """The class order and the number of each of `names` in it, (len(names),) int32.

    `setting` is `data.classes`, which may list classes without images; FgvcError is raised for a name that it lacks, for names
    that occur twice or have control characters, and if there are none.
    """
    order = tuple(names if setting is None else setting)
    refuse_breaking(order, where=where)
    if not order:
        raise FgvcError(f"{where}: no labelled image found")
    number = {name: k for k, name in enumerate(order)}
    if len(number) < len(order):
        twice = sorted({name for name in order if order.count(name) > 1})
        raise FgvcError(
            f"{where}: {'data.classes' if setting is not None else 'the class list'} has {some(twice)} twice"
        )
    unknown = [name for name in names if name not in number]
    if unknown:
        raise FgvcError(
            f"{where}: the set has classes that data.classes lacks: {some(unknown)}; add them or remove their images"
        )
    return order, np.array([number[name] for name in names], np.int32)


def written_alike(classes: Sequence[str]) -> list[str]:
    """A warning of classes whose names differ only in capitals, spaces, dashes or forms of Unicode, if there are any."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        plain = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name)).strip().casefold()
        spellings.setdefault(plain, []).append(name)
    twice = [" and ".join(map(repr, names)) for names in spellings.values() if len(names) > 1]
    return [f"classes whose names are all but the same, are they one? {some(twice)}"] if twice else []


def given_splits(source: Source, splits: np.ndarray) -> tuple[Split, ...]:
    """The splits, of validation and test, that the set itself has in `splits` (N,), and that therefore stay as they are."""
    present: list[Split] = [name for name in ("val", "test") if (splits == SPLITS.index(name)).any()]
    drawn_anew = source.fold is not None or not source.hold_out
    return tuple(name for name in present if not (name == "val" and drawn_anew))


def finish_splits(
    source: Source,
    labels: np.ndarray,
    splits: np.ndarray,
    *,
    test_fraction: float = 0.0,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, str]:
    """Set aside the splits that the set lacks; returns the splits (N,) int8 and the rule in words."""
    rule = "splits as given"
    seed, shares = source.split_seed, []
    if test_fraction:
        splits = carve(labels, splits, split="test", fraction=test_fraction, seed=seed, groups=groups)
        shares.append(f"{test_fraction:.4g} of all for test")
    if not source.hold_out:
        splits = np.where(splits == SPLITS.index("val"), SPLITS.index("train"), splits).astype(np.int8)
    elif source.fold is not None:
        splits = _with_fold(labels, splits, source.fold, seed, groups)
        shares.append(f"fold {source.fold[0]} of {source.fold[1]} of train for validation")
    elif source.val_fraction and not (splits == SPLITS.index("val")).any():
        splits = carve(labels, splits, split="val", fraction=source.val_fraction, seed=seed, groups=groups)
        shares.append(f"{source.val_fraction:.4g} of train for validation")
    if shares:
        how = "by group" if groups is not None else "stratified"
        rule = f"set aside {how} with seed {seed}: {', '.join(shares)}"
    if not source.hold_out:
        rule += "; no validation split, its images are learned from"
    counts = ", ".join(f"{name} {int((splits == k).sum())}" for k, name in enumerate(SPLITS))
    return splits, f"{rule}; {counts}"


def _with_fold(
    labels: np.ndarray, splits: np.ndarray, fold: tuple[int, int], seed: int, groups: np.ndarray | None
) -> np.ndarray:
    """A copy of `splits` (N,) int8 in which validation is one fold of the former train and validation rows. Raises FgvcError
    where that is empty."""
    val, train = SPLITS.index("val"), SPLITS.index("train")
    rows = np.flatnonzero((splits == val) | (splits == train))
    numbers = fold_numbers(labels[rows], folds=fold[1], seed=seed, groups=None if groups is None else groups[rows])
    if not (numbers == fold[0]).any():
        filled = np.unique(numbers[numbers >= 0]).tolist()
        kind = "images" if groups is None else "groups of images"
        have = f"{len(filled)} of {fold[1]} folds have some ({some(filled)})" if filled else "nor has any other"
        way = "name one of these, or fewer folds" if filled else "leave it out: each class keeps its only one to learn from"
        raise FgvcError(f"data.fold: fold {fold[0]} has no images, {have}, for want of {kind}; {way}")
    folded = splits.copy()
    folded[rows] = np.where(numbers == fold[0], val, train)
    return folded


def repeated(
    root: Path, paths: np.ndarray, labels: np.ndarray, splits: np.ndarray, classes: Sequence[str]
) -> tuple[str, ...]:
    """Warnings of rows (N,) that name the same file, also by another spelling of the path or by a link of a folder."""
    real: dict[str, str] = {}  # real paths of folders

    def place(row: int) -> tuple[str, str]:
        folder, name = os.path.split(str(paths[row]))
        if folder not in real:
            real[folder] = os.path.realpath(root / folder)
        return real[folder], name

    # By hashes first: a million names as Python objects would take hundreds of MB.
    hashes = np.fromiter((hash(place(row)) for row in range(len(paths))), np.int64, len(paths))
    order = np.argsort(hashes, kind="stable")
    equal_hashes = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    first_rows: dict[tuple[str, str], int] = {}
    twice: list[tuple[int, int]] = []
    for row in np.unique(order[[equal_hashes, equal_hashes + 1]]).tolist():
        if (first := first_rows.setdefault(place(row), row)) != row:
            twice.append((first, row))
    warnings = []
    for attribute, column, values in (("labels", labels, classes), ("splits", splits, SPLITS)):
        if across := [(a, b) for a, b in twice if column[a] != column[b]]:
            names = [f"{paths[b]} ({values[column[a]]} and {values[column[b]]})" for a, b in across]
            warnings.append(
                f"{len(across)} rows name an image again, with two {attribute}: {some(names, 3)}; remove one of each"
            )
    if rest := [paths[b] for a, b in twice if labels[a] == labels[b] and splits[a] == splits[b]]:
        warnings.append(f"{len(rest)} rows name an image again: {some(rest, 3)}; remove them, unless it is to count twice")
    return tuple(warnings)
