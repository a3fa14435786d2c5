"""Learning curve of a logistic regression on frozen features: held-out accuracy by the number of images learned from.

Cross-validated: each image is judged once, by a probe that learned from the other folds, and from a half and a quarter of those.
Arrays of N images are in one order throughout, so that two nets, or two sizes of one, are compared image by image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fgvc.data.splits import fold_numbers, group_codes, stratified
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import gain_interval, wilson
from fgvc.models.probe import fit_probe

FOLDS = 5
SHARES = (1.0, 0.5, 0.25)  # of the images that a fold learns from, each within the one before
Labels = NDArray[np.integer]
Right = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fold:
    """Positions of the images that one fold holds out, and of those that it learns from, for each of SHARES."""

    held_out: NDArray[np.int64]
    train: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """A share of N images, in [0,1], with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """Cross-validated learning curve of one net's features."""

    right: Right  # (len(SHARES),N): whether the probe's class is the image's; False where it was not judged
    held_out: NDArray[np.bool_]  # (N,): held out in some fold
    strength: float  # of the fits against their penalty (scikit-learn's C)
    groups: NDArray[np.int64] | None  # (N,)

    def accuracy(self, share: float = 1.0) -> Share:
        """Top-1 on held-out images after learning from this one of SHARES; by Wilson (1927), see `weight_of`."""
        right = self.right[SHARES.index(share), self.held_out]
        value = float(right.mean())
        return Share(value, *wilson(value, len(right) * weight_of(right - value, self._groups)))

    def gain(self, other: Curve | None = None, *, share: float = 1.0) -> Share:
        """Accuracy minus the other's on the same images; without another, minus its own after learning from `share`. By Tango
        (1998), see `weight_of`."""
        a = (other or self).right[SHARES.index(share if other is None else 1.0), self.held_out]
        b = self.right[0, self.held_out]
        change = b.astype(np.float64) - a
        weight = weight_of(change - change.mean(), self._groups)
        wins, losses = float((b & ~a).sum()), float((a & ~b).sum())
        return Share(float(change.mean()), *gain_interval(wins * weight, losses * weight, len(a) * weight))

    @property
    def _groups(self) -> NDArray[np.int64] | None:
        return None if self.groups is None else self.groups[self.held_out]


def make_folds(labels: Labels, groups: NDArray[np.str_] | None, *, seed: int) -> list[Fold]:
    """Make FOLDS of images with labels (N,), by whole groups (N,) where there are groups; those whose class would be left
    without an image are learned from and never judged. Raises FgvcError where no image can be judged."""
    numbers = fold_numbers(labels, folds=FOLDS, seed=seed, groups=groups)
    folds = []
    for number in range(FOLDS):
        held_out = np.flatnonzero(numbers == number)
        train = [np.flatnonzero(numbers != number)]
        for _ in SHARES[1:]:  # half of what was taken before
            last = train[-1]
            group_names = None if groups is None else groups[last]
            train.append(last[stratified(labels[last], 0.5, seed=seed + number, split="val", groups=group_names)])
        if len(held_out):
            folds.append(Fold(held_out, tuple(train)))
    if not folds:
        raise FgvcError("no image can be held out: each class needs two images, or two groups")
    return folds


def learning_curve(
    vectors: NDArray[np.float32],
    labels: Labels,
    folds: list[Fold],
    *,
    groups: NDArray[np.str_] | None = None,
    strength: float | None = None,
    seed: int = 0,
) -> Curve:
    """Judge features (N,D) of labels (N,) by `folds`.

    `strength`: of all fits; by default chosen once, by cross-validation within what the first fold learns from: of eight values,
    so that the other folds' images had a say in it, which favours nobody by more than the noise of the figure. A class of which
    nothing was learned counts as named wrongly. Raises FgvcError where a fit is not possible.
    """
    codes = None if groups is None else group_codes(groups).astype(np.int64)
    classes = int(labels.max(initial=0)) + 1
    right = np.zeros((len(SHARES), len(labels)), bool)
    held_out = np.zeros(len(labels), bool)
    for fold in folds:
        held_out[fold.held_out] = True
        for at, learned in enumerate(fold.train):
            if len(np.unique(labels[learned])) < 2:
                continue
            options: dict[str, tuple[float, ...]] = {} if strength is None else {"strengths": (strength,)}
            inner = None if codes is None else codes[learned]
            probe = fit_probe(vectors[learned], labels[learned], classes=classes, groups=inner, seed=seed, **options)
            strength = probe.strength
            right[at, fold.held_out] = probe.logits(vectors[fold.held_out]).argmax(1) == labels[fold.held_out]
    if strength is None:  # such as where the images of all other classes can't be read
        raise FgvcError("no fold has images of two classes to learn from, of those that can be read")
    return Curve(right, held_out, strength, codes)


def weight_of(rest: NDArray[np.float64], groups: NDArray[np.int64] | None) -> float:
    """Share of an independent image that one of N counts for, in (0,1], by deviations from a mean (N,): images of a group are
    alike, so that N of them say less (the inverse of Kish's design effect). 1 without groups."""
    if groups is None or not len(rest):
        return 1.0
    _, codes = np.unique(groups, return_inverse=True)
    alone, together = float((rest**2).sum()), float((np.bincount(codes, rest) ** 2).sum())
    if not alone:  # all alike: nothing tells by how much
        return (int(codes.max()) + 1) / len(rest)
    return min(1.0, alone / together) if together else 1.0
