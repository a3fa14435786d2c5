"""Labels that look wrong, by the probabilities of a probe on images that it did not learn from.

Confident learning (Northcutt et al., JAIR 2021, arXiv:1911.00068; cleanlab) estimates their number; images are ranked by the
probability of their label. The probe reads frozen features, so nothing is trained but a logistic regression per fold.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fgvc.errors import FgvcError

FOLDS, ROUNDS = 5, 3  # rounds of other folds, whose probabilities are averaged
STRENGTH = 0.01  # of the fit against the penalty (scikit-learn's C); see docs/measurements.md


@dataclass(frozen=True, slots=True)
class Suspect:
    """An image whose label may be wrong."""

    row: int  # of the index
    label: int
    suggested: int  # the likeliest other class
    p_label: float  # probability of the label, by a probe that did not learn from the image; low is suspect
    p_suggested: float  # probability of the suggested class


@dataclass(frozen=True, slots=True)
class Suspects:
    """The suspects of a set, and the estimated number of wrong labels."""

    listed: tuple[Suspect, ...]  # images with a likelier class than their label; the least likely labels first
    wrong: int  # number of wrong labels in the set, by confident learning
    unjudged: int = 0  # images of classes too small to hold any out


def suspects(
    features: NDArray[np.float32],
    labels: NDArray[np.int32],
    *,
    rows: NDArray[np.int64],
    families: NDArray[np.int64],
    seed: int = 0,
) -> Suspects:
    """The images whose labels look wrong; features (N,D) and labels (N,) of `rows` (N,).

    `families` (N,): rows of one number never lie on both sides of a fold, since a copy of an image would confirm its label.
    Raises FgvcError if there are too few images to hold any out.
    """
    from cleanlab.count import num_label_issues
    from cleanlab.rank import get_label_quality_scores

    if not np.isfinite(features).all():
        raise FgvcError("suspects: the features have values that are no numbers; the weights are broken")
    positions = _several_families(labels, families)
    present, y = np.unique(labels[positions], return_inverse=True)
    p, rounds = _held_out_probabilities(features[positions], y, families[positions], seed)
    scored = rounds > 0
    positions, y, p = positions[scored], y[scored], p[scored] / rounds[scored, None]
    if len(np.unique(y)) < 2:
        raise FgvcError(
            f"suspects: {len(labels)} readable images of {len(np.unique(labels))} classes are too few to hold some of them out: "
            "two classes must have two images or more that do not belong together"
        )
    score, other = get_label_quality_scores(y, p, method="self_confidence"), p.copy()
    other[np.arange(len(y)), y] = -1
    best = other.argmax(axis=1)
    order = np.lexsort((rows[positions], score))
    listed = tuple(
        Suspect(
            row=int(rows[positions[at]]),
            label=int(present[y[at]]),
            suggested=int(present[best[at]]),
            p_label=float(score[at]),
            p_suggested=float(other[at, best[at]]),
        )
        for at in order[other[order, best[order]] > score[order]]
    )
    return Suspects(listed, int(num_label_issues(y, p)), len(labels) - len(positions))


def _several_families(labels: NDArray[np.int32], families: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions of the images whose class has two families or more, so that one can be held out."""
    pairs = np.unique(np.stack([labels.astype(np.int64), families], axis=1), axis=0)
    present, counts = np.unique(pairs[:, 0], return_counts=True)
    return np.flatnonzero(np.isin(labels, present[counts > 1]))


def _held_out_probabilities(
    features: NDArray[np.float32], y: NDArray[np.int64], families: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Probabilities (N,K) of every image by probes that did not learn from its family, summed over rounds, and the number of
    rounds (N,) in which the probe knew its class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    p, rounds = np.zeros((len(y), int(y.max(initial=0)) + 1)), np.zeros(len(y), np.int64)
    splits = min(FOLDS, len(np.unique(families)), int(np.bincount(y, minlength=1).max(initial=0)))
    if splits < 2:
        return p, rounds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds, and of fits that stop early
        for number in range(ROUNDS):
            folds = StratifiedGroupKFold(splits, shuffle=True, random_state=seed + number)
            for learn, judge in folds.split(features, y, families):
                if len(np.unique(y[learn])) < 2:
                    continue
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=300))
                probe.fit(features[learn], y[learn])
                scored = judge[np.isin(y[judge], probe[-1].classes_)]
                if len(scored):
                    p[np.ix_(scored, probe[-1].classes_)] += probe.predict_proba(features[scored])
                    rounds[scored] += 1
    return p, rounds
