"""Linear probe: a head fitted before training, by multinomial logistic regression on the pooled features of the frozen net.

A head that is trained from random weights sends its first, arbitrary gradients through the pretrained net and distorts it; one
that is fitted first does not (Kumar et al., ICLR 2022, arXiv:2202.10054). Standardisation is folded into weight and bias, so the
result is a plain head.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.models.backbone import zeros_through
from fgvc.models.classifier import as_classifier

STRENGTHS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # inverses of the penalty (scikit-learn's C)
FOLDS = 3
PASSED = 2  # strengths without a smaller loss, after which no weaker penalty is tried
FLOOR = 0.3  # least spread, in medians of all: a feature that hardly varies would get a huge weight, and huge first gradients


Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Probe:
    """A linear classifier of features that are not standardised."""

    weight: NDArray[np.float32]  # (K,D)
    bias: NDArray[np.float32]  # (K,)
    strength: float  # one of STRENGTHS
    loss: float  # mean cross-entropy of held-out features at that strength, nats; NaN if none could be held out

    def logits(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits (N,K) of features (N,D)."""
        return vectors @ self.weight.T + self.bias


def fit_probe(
    vectors: NDArray[np.float32],
    labels: NDArray[np.integer],
    *,
    classes: int,
    groups: NDArray[np.int64] | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Fit logistic regression on features (N,D) of labels (N,) in [0, classes), the penalty chosen by FOLDS-fold cross-entropy.

    `groups` (N,): rows of one number, such as views of one image, are held out together. A class without an image has a weight
    of 0 and a bias of the lowest logit that any image has. Raises FgvcError for features that are not finite, and if fewer than
    two classes have an image.
    """
    if not np.isfinite(vectors).all():
        raise FgvcError("the frozen net's features have values that are no numbers; its weights are broken")
    present, y = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise FgvcError("a probe needs images of two classes or more")
    mean, spread = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    varying = spread[spread > 0]
    spread = np.maximum(spread, FLOOR * float(np.median(varying)) if len(varying) else 1.0)
    x = ((vectors - mean) / spread).astype(np.float32)
    groups = np.arange(len(y)) if groups is None else groups
    with threadpool_limits(1):  # matrices this small gain nothing from threads, and lose much where others compute
        losses = _held_out_losses(x, y, groups, strengths, seed) if len(strengths) > 1 else {}
        best = min(losses, key=lambda strength: losses[strength]) if losses else strengths[len(strengths) // 2]
        w, b = _coefficients(x, y, best)
    weight, bias = np.zeros((classes, x.shape[1])), np.zeros(classes)
    bias[:] = float((x @ w.T + b).min())
    weight[present] = w / spread
    bias[present] = b - weight[present] @ mean
    return Probe(weight.astype(np.float32), bias.astype(np.float32), best, losses.get(best, float("nan")))


def _held_out_losses(
    x: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64], strengths: tuple[float, ...], seed: int
) -> dict[float, float]:
    """Mean cross-entropy of held-out rows at each strength up to PASSED beyond the best, without rows of classes that a fold does
    not learn; empty if no row can be held out."""
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(FOLDS, len(np.unique(groups)), int(np.bincount(y).max()))  # scikit-learn refuses more than any class has rows
    if folds < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds
        splits = list(StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(x, y, groups))
    scored = [_Fold(x, y, learn, held_out) for learn, held_out in splits]
    scored = [fold for fold in scored if len(fold.learned) > 1 and len(fold.scored)]
    losses: dict[float, float] = {}
    for strength in sorted(strengths):
        if len(losses) > PASSED and min(losses.values()) < min(list(losses.values())[-PASSED:]):
            break  # the least loss lies behind: the weaker the penalty, the longer a fit takes
        losses[strength] = sum(fold.loss(strength) for fold in scored)
    count = sum(len(fold.scored) for fold in scored)
    return {strength: total / count for strength, total in losses.items()} if count else {}


class _Fold:
    """Rows that are held out, and the rest that is learned from, at one strength after the other."""

    def __init__(self, x: NDArray[np.float32], y: NDArray[np.int64], learn: Rows, held_out: Rows) -> None:
        self._x, self._y, self._learn = x, y, learn
        self.learned, self._inverse = np.unique(y[learn], return_inverse=True)  # classes
        self.scored = held_out[np.isin(y[held_out], self.learned)]
        self._start: NDArray[np.float32] | None = None  # the fit before

    def loss(self, strength: float) -> float:
        """Sum of the cross-entropy over the rows that are held out."""
        w, b = _coefficients(self._x[self._learn], self._inverse, strength, start=self._start)
        self._start = np.column_stack([w, b]).astype(np.float32)
        z = torch.from_numpy(self._x[self.scored] @ w.T + b).double()
        target = torch.from_numpy(np.searchsorted(self.learned, self._y[self.scored]))
        return float(nn.functional.cross_entropy(z, target, reduction="sum"))


def _coefficients(
    x: NDArray[np.float32], y: NDArray[np.int64], strength: float, *, start: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weight (K,D) and bias (K,) for labels 0..K-1, all of which occur. `start` (K,D+1): initial values."""
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(C=strength, max_iter=500, warm_start=start is not None)
    binary = y.max() == 1
    if start is not None:
        initial = start[1:] - start[:1] if binary else start
        regression.coef_, regression.intercept_ = initial[:, :-1].copy(), initial[:, -1].copy()
        regression.classes_ = np.arange(int(y.max()) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops early is good enough for a start
        regression.fit(x, y)
    w, b = regression.coef_.astype(np.float32), regression.intercept_.astype(np.float32)
    return (np.concatenate([-w / 2, w / 2]), np.concatenate([-b / 2, b / 2])) if binary else (w, b)


def linear_head(net: nn.Module) -> nn.Linear | nn.Conv2d:
    """The last layer of timm's classifier, if that is one linear layer (or the 1x1 convolution that some nets have instead).

    Raises FgvcError if it is neither, as in nets with two heads.
    """
    classifier = as_classifier(net).get_classifier()
    if isinstance(classifier, nn.Linear):
        return classifier
    if isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1) and classifier.groups == 1:
        return classifier
    raise FgvcError(f"the classifier of a {type(net).__name__} is no linear layer ({type(classifier).__name__})")


def require_linear_head(net: nn.Module, size: tuple[int, int], name: str, *, way: str) -> None:
    """Raise FgvcError unless the logits of the net called `name` are a linear layer, with a bias, of its pooled features. `way`:
    what to do else, for the message."""
    try:
        head = linear_head(net)
        (_, vectors), (_, z) = zeros_through(net, size, pre_logits=True), zeros_through(net, size)
        fits = head.bias is not None and torch.allclose(
            nn.functional.linear(vectors.flatten(1), head.weight.flatten(1), head.bias), z, rtol=1e-3, atol=1e-4
        )
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError, FgvcError):
        fits = False
    if not fits:
        raise FgvcError(f"{name} has no linear head (with a bias) on pooled features, which is what can be fitted; {way}")


def put_head(net: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write weight (K,D) and bias (K,) into the net's linear head, in place. Raises FgvcError if their shapes do not fit."""
    head = linear_head(net)
    if head.weight.shape[:2] != weight.shape or head.bias is None:
        raise FgvcError(
            f"model.head: a head of {tuple(head.weight.shape)} {'without a bias ' * (head.bias is None)}can't take weights of "
            f"{tuple(weight.shape)}; set model.head to timm"
        )
    with torch.no_grad():
        head.weight.copy_(weight.view_as(head.weight))
        head.bias.copy_(bias)


def zero_head(net: nn.Module) -> None:
    """Set the linear head to zero: equal logits for all K classes, a loss of ln K. Raises FgvcError without a linear head."""
    head = linear_head(net)
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
