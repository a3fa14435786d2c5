"""Stratified splits and folds of labelled rows, by whole groups if there are groups.

Pure functions of the columns: the same labels, groups and seed give the same split on every machine and for every
training seed. Readers sort their rows, so that the order of the file system doesn't matter.
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
    mask = stratified(labels[train], fraction, seed=seed, split=split, groups=None if groups is None else groups[train])
    carved = splits.copy()
    carved[train[mask]] = SPLITS.index(split)
    return carved


def stratified(
    labels: np.ndarray, fraction: float, *, seed: int, split: Split, groups: np.ndarray | None = None
) -> np.ndarray:
    """Mask (N,) of the rows to set aside: `fraction` of every class, rounded so that the total is right, too.

    Each class gives the floor or the ceiling of its share and always keeps a row. With `groups` (N,) whole groups
    move (an empty name is a group of its own), and the shares are met as closely as the groups allow.
    """
    labels = np.asarray(labels)
    rng = generator(SPLIT, seed, SPLITS.index(split))
    if groups is not None:
        return _by_group(labels, fraction, group_codes(groups), rng)
    counts = np.bincount(labels) if len(labels) else np.zeros(1, np.int64)
    return _drawn(labels, _quotas(counts, fraction, rng), rng)


def sampled(labels: np.ndarray, count: int, *, least: int, seed: int) -> np.ndarray:
    """Mask (N,) of about `count` of the rows, as many of each class as its share, but `least` or all that it has: so that none is
    missing. They are more than `count` by what these lack."""
    labels = np.asarray(labels)
    if len(labels) <= count:
        return np.ones(len(labels), bool)
    mask = stratified(labels, count / len(labels), seed=seed, split="train")
    counts = np.bincount(labels)
    lacking = np.minimum(counts, least) - np.bincount(labels[mask], minlength=len(counts))
    rest = np.flatnonzero(~mask)
    mask[rest[_drawn(labels[rest], lacking, generator(SPLIT, seed, len(SPLITS) + 1))]] = True
    return mask


def fold_numbers(labels: np.ndarray, *, folds: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The fold in [0, folds) of each row, (N,) int64, for cross-validation; -1 if a class would have no other row to learn.

    Every class is spread as evenly as its rows, or its `groups` (N,) as a whole, allow."""
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
    """Compute `fold_numbers` by groups, greedily: the largest groups first, each to the fold with the fewest rows of its
    classes."""
    codes = np.unique(groups, return_inverse=True)[1]
    pairs, counts = np.unique(np.stack([codes, labels]), axis=1, return_counts=True)  # by group, then class
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    sizes = [(pairs[1][rows], counts[rows]) for rows in map(slice, starts, np.r_[starts[1:], pairs.shape[1]])]
    taken = np.zeros((int(labels.max(initial=0)) + 1, folds), np.int64)
    fold = np.full(len(sizes), -1, np.int64)
    order = np.lexsort((rng.random(len(sizes)), -np.array([n.sum() for _, n in sizes], np.int64)))
    for group in order.tolist():
        classes, n = sizes[group]
        fold[group] = np.lexsort((taken.sum(axis=0), n @ taken[classes]))[0]
        taken[classes, fold[group]] += n
    for group in order[::-1].tolist():  # a class that lies in one fold only would never be learned
        classes, n = sizes[group]
        if fold[group] >= 0 and (taken[classes].sum(axis=1) == taken[classes, fold[group]]).any():
            taken[classes, fold[group]] -= n
            taken[classes] += folds  # it now has rows that are always learned
            fold[group] = -1
    return fold[codes]


def group_codes(groups: np.ndarray) -> np.ndarray:
    """The number of each row's group, (N,) int64; a row with an empty name is a group of its own."""
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


def _drawn(labels: np.ndarray, quota: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mask (N,) of so many rows of each class (K,), at random."""
    counts = np.bincount(labels, minlength=len(quota))
    order = np.lexsort((rng.random(len(labels)), labels))  # by class, at random within it
    mask = np.zeros(len(labels), bool)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask[order[rank < np.repeat(quota, counts)]] = True
    return mask


def _quotas(counts: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Number of rows that each class gives: by largest remainders, ties at random, never a class's last row."""
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
    """Compute `stratified` by groups, greedily: in random order, each group is taken if that brings the classes nearer to their
    shares.

    With one class per group the result is within half a group of the share (the last row of a class aside).
    """
    classes = int(labels.max()) + 1 if len(labels) else 1
    pairs, counts = np.unique(groups * classes + labels, return_counts=True)  # group-major
    pair_groups, pair_classes = pairs // classes, (pairs % classes).tolist()
    size = counts.tolist()
    starts = np.flatnonzero(np.r_[True, pair_groups[1:] != pair_groups[:-1]])
    ends = np.r_[starts[1:], len(pairs)].tolist()
    total = np.bincount(labels, minlength=classes)
    missing, remaining = (total * fraction).tolist(), total.tolist()
    taken = np.zeros(len(starts), bool)
    first = starts.tolist()
    for g in rng.permutation(len(starts)).tolist() if len(pairs) else []:
        pair_range = range(first[g], ends[g])
        gain = sum(size[k] * (2 * missing[pair_classes[k]] - size[k]) for k in pair_range)  # fall of the squared distance
        if gain > 0 and all(remaining[pair_classes[k]] > size[k] for k in pair_range):
            taken[g] = True
            for k in pair_range:
                missing[pair_classes[k]] -= size[k]
                remaining[pair_classes[k]] -= size[k]
    return np.isin(groups, pair_groups[starts[taken]]) if len(pairs) else np.zeros(0, bool)
