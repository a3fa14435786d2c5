"""Verdict on the new classifier against the deployed one, by the images that judge, which are read once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from fgvc.evaluation.paired import Gate, Paired, gain_interval

ALPHA = 0.03  # of the exact test, two-sided: of a thousand classifiers that are no better, 15 are called so, and hardly ever 25
MOST = 1000.0  # times the images, beyond which no number of them is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Comparison of the two classifiers on the images that judge; shares in [0,1]."""

    better: bool
    failures: tuple[str, ...]  # of the gates
    images: int
    old: float  # accuracy
    new: float
    low: float  # 95 % interval of new - old
    high: float
    p: float  # McNemar's exact test
    repaired: int
    broken: int
    would_decide: int | None  # images that would show this gain; None: it is shown, or there is none
    others: Mapping[str, float]  # accuracy of the plain recipe, the floor ...
    deployed: bool = True  # whether the old one is a deployed file; False: the plain recipe of a net without one

    @property
    def gain(self) -> float:
        return self.new - self.old

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self, name: str) -> str:
        """The verdict as a sentence."""
        moved = f"{100 * self.old:.1f} % to {100 * self.new:.1f} % on {self.images} images that it has not seen"
        interval = f"({100 * self.gain:+.1f} points, 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f})"
        more = f" About {self.would_decide:,} images would show a gain of this size." if self.would_decide else ""
        if not self.deployed and not self.failures:
            shown = "Better than" if self.better else "Not shown to be better than"
            rest = "" if self.better else f" The latter is proved, and may be used all the same.{more}"
            return f"{shown} the plain recipe of {name}: from {moved} {interval}.{rest}"
        if self.better:
            return f"Better: {name} goes from {moved} {interval}."
        if self.failures:
            return f"Not shipped: from {moved} {interval}, but {'; '.join(self.failures)}."
        return f"No better file is shown: from {moved} {interval}.{more}"


def judge(pair: Paired, gate: Gate, others: Mapping[str, NDArray[np.bool_]], *, deployed: bool = True) -> Verdict:
    """Judge B, the new classifier, against A, the deployed one. It is better where the interval of the gain lies above 0, as
    McNemar's exact test says too, and all gates hold. `others`: whether other classifiers name each image rightly; `deployed`: as
    of `Verdict`."""
    failures = tuple(gate.failures(pair))
    shown = _shown(int(pair.positive.sum()), int(pair.negative.sum()), pair.images)
    return Verdict(
        better=shown and not failures,
        failures=failures,
        images=pair.images,
        old=float(pair.a_right.mean()),
        new=float(pair.b_right.mean()),
        low=pair.low,
        high=pair.high,
        p=pair.p,
        repaired=int(pair.positive.sum()),
        broken=int(pair.negative.sum()),
        would_decide=None if shown else images_that_would_decide(pair),
        others={name: float(right.mean()) for name, right in others.items()},
        deployed=deployed,
    )


def _shown(wins: float, losses: float, images: float) -> bool:
    """Whether these numbers of repaired and broken images show a gain."""
    return gain_interval(wins, losses, images)[0] > 0 and binomtest(round(wins), round(wins + losses)).pvalue < ALPHA


def least_gain(images: int) -> float:
    """The smallest gain, a share in [0,1], that so many images can show: where none is broken. More than 1: none."""
    return next((wins for wins in range(1, images + 1) if _shown(wins, 0, images)), images + 1) / images


def images_that_would_decide(pair: Paired) -> int | None:
    """Number of images that would show the gain, with flips in these shares; None: the gain is not above 0, or MOST times as many
    images would not do."""
    wins, losses, images = int(pair.positive.sum()), int(pair.negative.sum()), pair.images

    def shown(times: float) -> bool:
        return _shown(wins * times, losses * times, images * times)

    if wins <= losses or not shown(MOST):
        return None
    low, high = 1.0, MOST
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if shown(middle) else (middle, high)
    return math.ceil(high * images)


def read_verdict(stored: Mapping[str, Any]) -> Verdict:
    """The verdict from its record in JSON."""
    return Verdict(**{**stored, "failures": tuple(stored["failures"])})
