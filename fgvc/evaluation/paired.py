"""Paired comparison of two classifiers on the same images: gain, its interval, and flips."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student_t

from fgvc.errors import FgvcError

LEVEL = 0.95  # of the interval
ONE_ERROR = 0.6827  # of an interval of one standard error to each side
LIMIT = re.compile(r"(\d+)|(\d+(?:\.\d+)?) ?%")
Truths = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Paired comparison of A and B on N images; shares in [0,1], a gain is B's minus A's."""

    labels: NDArray[np.int64] = field(repr=False)  # (N,)
    a_right: Truths = field(repr=False)  # (N,)
    b_right: Truths = field(repr=False)  # (N,)
    low: float  # interval of the gain
    high: float
    p: float  # of a difference at least as large by chance alone

    @property
    def images(self) -> int:
        """Number N of images."""
        return len(self.labels)

    @property
    def verdict(self) -> Literal["gain", "loss", "unclear"]:
        """Whether B gains or loses against A, where chance alone would seldom do this (p below 1 - LEVEL); else unclear."""
        return "unclear" if self.p >= 1 - LEVEL else "gain" if self.gain > 0 else "loss"

    @property
    def negative(self) -> Truths:
        """Negative flips (N,): A is right, B is wrong; what a release breaks, however high its accuracy."""
        return self.a_right & ~self.b_right

    @property
    def positive(self) -> Truths:
        """Positive flips (N,): A is wrong, B is right."""
        return ~self.a_right & self.b_right

    @property
    def gain(self) -> float:
        """Top-1 of B minus top-1 of A, a share."""
        return float(self.b_right.mean() - self.a_right.mean())

    @property
    def negative_flip_rate(self) -> float:
        """NFR: negative flips over all images (Yan et al., CVPR 2021, arXiv:2011.09161)."""
        return float(self.negative.mean())

    def by_class(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Table of one row a class that has images, the largest loss first: images, recalls, change and flips."""
        count = np.bincount(self.labels, minlength=len(classes))
        columns = {"a": self.a_right, "b": self.b_right, "negative": self.negative, "positive": self.positive}
        of = {name: np.bincount(self.labels[hit], minlength=len(classes)) for name, hit in columns.items()}
        change = (of["b"] - of["a"]) / np.maximum(count, 1)
        return [
            {
                "class": classes[k],
                "images": int(count[k]),
                "a_recall": round(float(of["a"][k] / count[k]), 6),
                "b_recall": round(float(of["b"][k] / count[k]), 6),
                "change": round(float(change[k]), 6),
                "negative_flips": int(of["negative"][k]),
                "positive_flips": int(of["positive"][k]),
            }
            for k in np.lexsort((-of["negative"], change))
            if count[k]
        ]


def compare_predictions(labels: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Paired:
    """Compare the classes (N,) that A and B predict for N images with labels (N,). Raises FgvcError without any image.

    p: McNemar's test, exact and two-sided: of the images on which one alone is right, is either one right as often? Exact
    never claims too much, at any number of images (Fagerland et al. 2013 call it a little cautious).
    """
    y = np.asarray(labels, dtype=np.int64)
    return compare_right(y, np.asarray(a) == y, np.asarray(b) == y)


def compare_right(y: NDArray[np.int64], a_right: Truths, b_right: Truths) -> Paired:
    """Compare A and B as `compare_predictions` does, by whether each names the images with labels y (N,) rightly (N,).

    Raises FgvcError without any image."""
    if not len(y):
        raise FgvcError("nothing to compare: no image that can be read")
    losses, wins = int((a_right & ~b_right).sum()), int((~a_right & b_right).sum())
    low, high = gain_interval(wins, losses, len(y))
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Paired(labels=y, a_right=a_right, b_right=b_right, low=low, high=high, p=p)


def standing(pair: Paired) -> dict[str, float]:
    """Return the record of B beside its floor A: top-1 of both, shares in [0,1]; the gain is B's minus A's."""
    shares = {"top1": pair.b_right.mean(), "floor": pair.a_right.mean(), "gain": pair.gain}
    return {name: round(float(value), 6) for name, value in (shares | {"low": pair.low, "high": pair.high}).items()}


def beside_floor(pair: Paired) -> str:
    """Describe B's floor A and B's gain over it, in words."""
    return (
        f"the floor (logistic regression on the frozen net) {100 * pair.a_right.mean():.2f} %: {100 * pair.gain:+.2f} points, "
        f"95 % interval {100 * pair.low:+.1f} to {100 * pair.high:+.1f}"
    )


def gain_interval(wins: float, losses: float, images: float, *, level: float = LEVEL) -> tuple[float, float]:
    """Interval of (wins - losses) / images by inverting the score test of a paired difference (Tango, Statistics in
    Medicine 17, 1998): all differences that the counts do not contradict. Holds its level for few images and for no flip at
    all, where Wald's interval is a point."""
    z = float(norm.ppf((1 + level) / 2))
    gain = (wins - losses) / images

    def score(d: float) -> float:
        linear = (2 * images - wins + losses) * d - wins - losses
        lost = (math.sqrt(max(0.0, linear**2 + 8 * images * losses * d * (1 - d))) - linear) / (4 * images)
        return (wins - losses - images * d) / math.sqrt(images * max(1e-15, 2 * lost + d * (1 - d)))

    edge = 1 - 1e-12
    low = brentq(lambda d: score(d) - z, -edge, gain) if gain > -edge and score(-edge) > z else -1.0
    high = brentq(lambda d: score(d) + z, gain, edge) if gain < edge and score(edge) < -z else 1.0
    return float(low), float(high)


def paired_gain(old: Truths, new: Truths, *, level: float = LEVEL) -> tuple[float, float, float]:
    """Share of the same images (N,) that `new` names rightly less that of `old`, and its interval (see `gain_interval`)."""
    wins, losses = int((new & ~old).sum()), int((old & ~new).sum())
    return (wins - losses) / len(new), *gain_interval(wins, losses, len(new), level=level)


def beats(old: Truths, new: Truths) -> bool:
    """Whether `new` names the same images (N,) better than `old`, the simpler one, by more than one standard error (Breiman et
    al. 1984, in their section 3.4.3)."""
    _, low, _ = paired_gain(old, new, level=ONE_ERROR)
    return low > 0


def wilson(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of `count` images (Wilson 1927): it stays within [0,1] and is right near its ends."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits that a release must keep. Raises FgvcError where a limit makes no sense, before anything is compared."""

    max_negative_flips: str | None = None  # a number of images (`12`) or a share of them (`0.5%`)
    min_gain: float | None = None  # points of accuracy, may be negative

    def __post_init__(self) -> None:
        flips, gain = self.max_negative_flips, self.min_gain
        if flips is not None and ((limit := LIMIT.fullmatch(flips.strip())) is None or float(limit[2] or 0) > 100):
            raise FgvcError(
                f"--max-negative-flips {flips}: a number of images (12) or a share of them (0.5%), up to 100%"
            )
        if gain is not None and not -100 <= gain <= 100:
            raise FgvcError(f"--min-gain {gain:g}: points of accuracy, between -100 and 100")

    @property
    def shut(self) -> bool:
        """Whether there is any limit."""
        return self.max_negative_flips is not None or self.min_gain is not None

    def flip_share(self, images: int) -> float | None:
        """The most negative flips as a share of so many images; None: there is no limit."""
        if self.max_negative_flips is None or (limit := LIMIT.fullmatch(self.max_negative_flips.strip())) is None:
            return None
        return int(limit[1]) / images if limit[1] else float(limit[2]) / 100

    def failures(self, pair: Paired) -> list[str]:
        """Describe the limits that B breaks, one line each. The gain itself is compared with its limit, not its interval."""
        failures = []
        if self.max_negative_flips is not None and (limit := LIMIT.fullmatch(self.max_negative_flips.strip())):
            flips, share = int(pair.negative.sum()), 100 * pair.negative_flip_rate
            most = float(limit[2] or math.inf)
            if (flips > int(limit[1])) if limit[1] else (share > most + 1e-9):
                percent = f"{share:.{_decimals(share, most)}f} %"
                failures.append(f"{flips} negative flips of {pair.images} images ({percent}), more than {limit[0]}")
        if self.min_gain is not None and 100 * pair.gain < self.min_gain - 1e-9:
            gain = 100 * pair.gain
            failures.append(f"a gain of {gain:+.{_decimals(gain, self.min_gain)}f} points, less than {self.min_gain:+g}")
        return failures


def _decimals(value: float, limit: float) -> int:
    """Number of decimals, two at least, with which `value` is printed on its side of `limit`."""
    return next((d for d in range(2, 10) if (round(value, d) - limit) * (value - limit) > 0), 10)


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Student's interval of a mean; without end for fewer than two values."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = student_t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)
