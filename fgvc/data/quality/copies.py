"""Near copies in the splits that fgvc draws: they stay together."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import SPLITS, Split
from fgvc.data.cache import BROKEN, stamps
from fgvc.data.index import ImageIndex, decode_row
from fgvc.data.quality.duplicates import Fingerprints, alike, fingerprint, joined, links
from fgvc.data.splits import group_codes
from fgvc.errors import FgvcError, ImageError
from fgvc.io.files import cache_folder, write_atomic

MOST = 50_000  # pictures that are compared
QUIET = 1000  # pictures that are compared without a word
_VERSION = 2


def together(index: ImageIndex) -> ImageIndex:
    """The index with the near copies of a picture in one split, among those that fgvc drew: where the first of them is, so that
    splits keep their sizes on average, and a picture is validated in one of several folds.

    Splits that the set brings along, and a set without near copies across, stay as they are. Pictures are read once; what was
    found is kept in the user's cache. Of more than MOST pictures none is compared, which a warning says."""
    own: tuple[Split, ...] = ("val", "test")
    drawn = [split for split in own if split not in index.given_splits and len(index.rows(split))]
    if not drawn or not len(index.rows("train")):
        return index
    rows = np.flatnonzero(np.isin(index.splits, [SPLITS.index(split) for split in ("train", *drawn)]))
    if len(rows) > MOST:
        words = (
            f"near copies were not looked for among {len(rows):,} pictures (up to {MOST:,}): some may lie on both sides of the "
            f"{' and '.join(drawn)} split that fgvc draws"
        )
        return replace(index, warnings=(*index.warnings, words))
    splits = in_one_split(index, _families(index, rows), drawn)
    moved = int((splits != index.splits).sum())
    if not moved:
        return index
    counts = ", ".join(f"{name} {int((splits == k).sum())}" for k, name in enumerate(SPLITS))
    recognised = f"{index.recognised}; {moved} of these moved to their near copies: {counts}"
    return replace(index, splits=splits, joined=moved, recognised=recognised)


def in_one_split(index: ImageIndex, families: NDArray[np.int64], drawn: Sequence[Split]) -> NDArray[np.int8]:
    """A copy of the splits (N,) in which no family, by its number (N,), has rows both in train and in a `drawn` split, or in two
    of these: all go where the first is, and to train where a class would have no other row there."""
    splits = index.splits.copy()
    train = SPLITS.index("train")
    movable = np.isin(splits, [train, *(SPLITS.index(split) for split in drawn)])
    order = np.argsort(families, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(families[order])) + 1)
    learned = np.bincount(index.labels[splits == train], minlength=len(index.classes))
    for run in runs:
        family = run[movable[run]]
        if len(family) < 2 or len(set(splits[family].tolist())) < 2:
            continue
        target = int(splits[family[0]])
        leaving = np.bincount(index.labels[family[splits[family] == train]], minlength=len(index.classes))
        if target != train and ((leaving > 0) & (learned <= leaving)).any():
            target = train
        learned += np.bincount(index.labels[family], minlength=len(index.classes)) * (target == train) - leaving
        splits[family] = target
    return splits


def _families(index: ImageIndex, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers (N,) of the rows that belong together: as near copies among `rows`, or by the set's groups."""
    numbers, _ = near_copies(index, rows)
    named = [links(group_codes(index.groups))] if index.groups is not None else []
    return joined(len(index), links(numbers), *named)


def near_copies(index: ImageIndex, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Number (N,) of each row's group of near copies, upright or mirrored, among `rows`, and whether the picture (N,) is one of
    these and could be read; the others are alone. Copies of copies are of one group. Pictures are read once: what was found
    among an unchanged set is kept in the user's cache."""
    place = cache_folder() / "copies" / f"{stamps(index, rows, f'copies {_VERSION} {index.max_pixels}')[:24]}.npz"
    with contextlib.suppress(*BROKEN), np.load(place, allow_pickle=False) as kept:
        return np.asarray(kept["numbers"], np.int64), np.asarray(kept["readable"], np.bool_)
    if len(rows) > QUIET:
        print(f"{index.root}: looking for near copies among {len(rows):,} pictures, once", file=sys.stderr, flush=True)
    numbers, readable = _compared(index, rows)
    with contextlib.suppress(OSError, FgvcError):  # where it can't be kept it is made anew
        place.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        np.savez_compressed(stream, numbers=numbers, readable=readable)
        write_atomic(place, stream.getvalue())
    return numbers, readable


def _compared(index: ImageIndex, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Compute `near_copies` from the pictures."""
    prints = Fingerprints.empty(len(index))
    readable = np.zeros(len(index), bool)

    def look(row: int) -> None:
        try:
            prints.put(row, fingerprint(decode_row(index, row)))
        except ImageError:
            return
        readable[row] = True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(look, rows.tolist()):
            pass
    numbers = np.arange(len(index))
    for pairs, _ in alike(prints, rows[readable[rows]]):
        numbers = joined(len(index), links(numbers), pairs)
    return numbers, readable
