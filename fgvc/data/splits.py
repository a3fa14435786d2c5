"""Which rows are set aside for validation and test: stratified by class, by whole groups where there are groups.

Pure functions of the columns: the same labels, groups and seed give the same split on every machine and for every
training seed. Readers hand over rows in an order that the file system has no say in.
"""

from __future__ import annotations

import numpy as np

from fgvc.config.data import SPLITS, Split
from fgvc.rng import SPLIT, generator


def carve(
    labels: np.ndarray, splits: np.ndarray, *, split: Split, fraction: float, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """A copy of `splits` (N,) int8 in which a share of the train rows has moved to `split`."""
    train = np.flatnonzero(splits == SPLITS.index("train"))
    held = stratified(labels[train], fraction, seed=seed, split=split, groups=None if groups is None else groups[train])
    carved = splits.copy()
    carved[train[held]] = SPLITS.index(split)
    return carved


def stratified(
    labels: np.ndarray, fraction: float, *, seed: int, split: Split, groups: np.ndarray | None = None
) -> np.ndarray:
    """Mask (N,) of the rows to set aside: `fraction` of every class, rounded so that the total is right as well.

    Each class gives the floor or the ceiling of its share and always keeps a row. With `groups` (N,) whole groups
    move (an empty name is a group of its own), and the shares are met as closely as the groups allow.
    """
    labels = np.asarray(labels)
    rng = generator(SPLIT, seed, SPLITS.index(split))
    if groups is not None:
        return _by_group(labels, fraction, group_codes(groups), rng)
    counts = np.bincount(labels) if len(labels) else np.zeros(1, np.int64)
    quota = _quotas(counts, fraction, rng)
    order = np.lexsort((rng.random(len(labels)), labels))  # by class, at random within it
    held = np.zeros(len(labels), bool)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    held[order[rank < np.repeat(quota, counts)]] = True
    return held


def fold_numbers(labels: np.ndarray, *, folds: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) int64 fold in [0, folds) of each row, for cross-validation: every class as evenly spread as its rows, or its `groups`
    (N,) as a whole, allow. -1 where holding a row out would leave a class without any other."""
    labels = np.asarray(labels)
    rng = generator(SPLIT, seed, len(SPLITS))
    if groups is not None:
        return _group_folds(labels, group_codes(groups), folds, rng)
    numbers = np.full(len(labels), -1, np.int64)
    order = np.lexsort((rng.random(len(labels)), labels))  # by class, at random within it
    order = order[(np.bincount(labels) if len(labels) else np.zeros(1))[labels[order]] > 1]
    numbers[order] = np.arange(len(order)) % folds
    return numbers


def _group_folds(labels: np.ndarray, groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy: the largest groups first, each to the fold that has the fewest rows of its classes."""
    codes = np.unique(groups, return_inverse=True)[1]
    pairs, counts = np.unique(np.stack([codes, labels]), axis=1, return_counts=True)  # by group, then class
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    parts = [(pairs[1][own], counts[own]) for own in map(slice, starts, np.r_[starts[1:], pairs.shape[1]])]
    taken = np.zeros((int(labels.max(initial=0)) + 1, folds), np.int64)
    fold = np.full(len(parts), -1, np.int64)
    order = np.lexsort((rng.random(len(parts)), -np.array([n.sum() for _, n in parts], np.int64)))
    for group in order.tolist():
        own, n = parts[group]
        fold[group] = np.lexsort((taken.sum(axis=0), n @ taken[own]))[0]
        taken[own, fold[group]] += n
    for group in order[::-1].tolist():  # a class that lies in one fold alone would never be learned
        own, n = parts[group]
        if fold[group] >= 0 and (taken[own].sum(axis=1) == taken[own, fold[group]]).any():
            taken[own, fold[group]] -= n
            taken[own] += folds  # it has rows that are always learned
            fold[group] = -1
    return fold[codes]


def group_codes(groups: np.ndarray) -> np.ndarray:
    """(N,) int64 number of each row's group; a row without a group name is a group of its own."""
    names, codes = np.unique(groups, return_inverse=True)
    alone = np.flatnonzero(groups == "")
    codes[alone] = len(names) + np.arange(len(alone))
    return codes


def straddling(groups: np.ndarray, splits: np.ndarray) -> list[str]:
    """Names of the groups with rows in more than one split, sorted."""
    if not len(groups):
        return []
    names, codes = np.unique(groups, return_inverse=True)
    low = np.full(len(names), len(SPLITS), np.int8)
    high = np.full(len(names), -1, np.int8)
    np.minimum.at(low, codes, splits)
    np.maximum.at(high, codes, splits)
    return [name for name in names[low < high].tolist() if name]


def _quotas(counts: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """How many rows each class gives: largest remainders first, ties at random, never a class's last row."""
    share = counts * fraction
    # A share such as 30 * 0.1 is 3 and not 2.9999999999999996 or 3.0000000000000004.
    share = np.where(np.abs(share - np.rint(share)) < 1e-9 * counts, np.rint(share), share)
    quota = np.floor(share).astype(np.int64)
    room = (quota < share) & (quota + 1 < counts)
    left = min(int(np.rint(share.sum())) - int(quota.sum()), int(room.sum()))
    order = np.lexsort((rng.random(len(counts)), -(share - quota), ~room))
    quota[order[:left]] += 1
    return quota


def _by_group(labels: np.ndarray, fraction: float, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Greedy: groups in random order, each taken where that brings the classes nearer to their shares.

    With one class per group the result is within half a group of the share (the last row of a class aside).
    """
    classes = int(labels.max()) + 1 if len(labels) else 1
    pairs, counts = np.unique(groups * classes + labels, return_counts=True)  # group-major
    of_group, of_class = pairs // classes, (pairs % classes).tolist()
    size = counts.tolist()
    starts = np.flatnonzero(np.r_[True, of_group[1:] != of_group[:-1]])
    ends = np.r_[starts[1:], len(pairs)].tolist()
    total = np.bincount(labels, minlength=classes)
    wanted, kept = (total * fraction).tolist(), total.tolist()
    taken = np.zeros(len(starts), bool)
    first = starts.tolist()
    for g in rng.permutation(len(starts)).tolist() if len(pairs) else []:
        part = range(first[g], ends[g])
        gain = sum(size[k] * (2 * wanted[of_class[k]] - size[k]) for k in part)  # fall of the squared distance
        if gain > 0 and all(kept[of_class[k]] > size[k] for k in part):
            taken[g] = True
            for k in part:
                wanted[of_class[k]] -= size[k]
                kept[of_class[k]] -= size[k]
    return np.isin(groups, of_group[starts[taken]]) if len(pairs) else np.zeros(0, bool)
