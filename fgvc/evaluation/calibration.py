"""Calibration of a classifier's probabilities: temperature, calibration error, and the threshold of "none of these".

`calibrate` fits on logits of the validation split, so the network and its graph stay as they are; `measure` evaluates what was
fitted on any other split. Needs numpy and scipy, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.calibration import HIGHEST, LOWEST, Calibration
from fgvc.config.images import Ending
from fgvc.data.index import spread

BINS = 15  # of the calibration error (Guo et al. 2017)
FEWEST = 50  # images; with fewer, the fit would be noise
KEEP = 0.95  # share of the right answers that the threshold is to keep
MAX_IMAGES, MAX_LOGITS = 10_000, 20_000_000  # one temperature needs no more, and memory stays bounded

Floats = NDArray[np.float64]
LabelledLogits = tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]
"""Logits (N,K), labels (N,), and whether each answer is right (N,)."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence and accuracy in bins of confidence (k/BINS, (k+1)/BINS]; empty bins are NaN."""

    images: NDArray[np.int64] = field(repr=False)  # (BINS,)
    confidence: Floats = field(repr=False)  # (BINS,) mean
    accuracy: Floats = field(repr=False)  # (BINS,)

    @property
    def ece(self) -> float:
        """Expected calibration error in [0,1]: mean |confidence - accuracy|, weighted by images."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.images).sum() / max(1, self.images.sum()))


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Risk-coverage curve, the most confident answers first (Geifman & El-Yaniv, NeurIPS 2017, arXiv:1705.08500)."""

    coverage: Floats = field(repr=False)  # (N,) share of the images that get an answer, ascending to 1
    risk: Floats = field(repr=False)  # (N,) share of those answers that are wrong
    confidence: Floats = field(repr=False)  # (N,) of the least confident of them

    @property
    def area(self) -> float:
        """AURC: the mean risk over all coverages. 0 is best; without any ranking it is the error rate."""
        return float(self.risk.mean())

    def rows(self, steps: int = 100) -> list[dict[str, float]]:
        """Rows of a table: the curve at `steps` coverages, evenly spread."""
        at = np.unique(np.ceil(np.arange(1, steps + 1) / steps * len(self.risk)).astype(int)) - 1
        columns = {"coverage": self.coverage, "risk": self.risk, "confidence": self.confidence}
        return [{name: round(float(values[k]), 6) for name, values in columns.items()} for k in at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """Measurement of a classifier's confidence, its largest probability, on N labelled images.

    Where temperature and threshold were fitted on these images, `*_after`, `after`, `kept`, `coverage` and `accuracy` are
    cross-fitted: fitted on one half, measured on the other, both ways; so no figure is measured where it was fitted.
    """

    images: int
    fitted: Calibration | None  # temperature and threshold as they are stored; None: none were fitted, and these change nothing
    temperature: float  # divides the logits
    note: str  # why the temperature is 1, or what to think of it; empty: all is well
    nll: float  # mean cross-entropy in nats, at temperature 1
    nll_after: float
    before: Reliability
    after: Reliability
    curve: RiskCoverage  # by calibrated confidence
    keep: float  # share of the right answers that the threshold was to keep
    threshold: float  # "none of these" below this calibrated confidence; 0: never
    kept: float  # share of the right answers that it keeps
    coverage: float  # share of the images that get an answer
    accuracy: float  # of those answers; 0 where there is none

    @property
    def calibrated(self) -> bool:
        """Whether the temperature was fitted."""
        return self.fitted is not None and self.fitted.calibrated

    def numbers(self) -> dict[str, Any]:
        """Numbers for JSON: calibration errors and losses on these images, and the temperature and threshold."""
        return {
            "calibrated": self.calibrated,
            "temperature": self.temperature,
            "threshold": self.threshold,
            "fitted_on": "" if self.fitted is None else self.fitted.fitted_on,
            "fitted_images": 0 if self.fitted is None else self.fitted.images,
            "images": self.images,
            "ece_before": self.before.ece,
            "ece_after": self.after.ece,
            "nll_before": self.nll,
            "nll_after": self.nll_after,
            "kept": self.kept,
            "coverage": self.coverage,
            "accuracy": self.accuracy,
            "note": self.note,
        }

    def stored(self, fitted_on: str) -> Calibration:
        """Convert to what a run and its bundle store, to six decimals."""
        figures = {
            "temperature": self.temperature,
            "threshold": self.threshold,
            "nll_before": self.nll,
            "nll_after": self.nll_after,
            "ece_before": self.before.ece,
            "ece_after": self.after.ece,
            "keep": self.keep,
            "kept": self.kept,
            "coverage": self.coverage,
            "accuracy": self.accuracy,
        }
        return Calibration(
            fitted_on=fitted_on,
            images=self.images,
            note=self.note,
            **{name: round(value, 6) for name, value in figures.items()},
        )

    @property
    def source(self) -> str:
        """Origin of the temperature, in words."""
        if self.fitted is None or not self.fitted.calibrated:
            return f"not calibrated: {self.note or 'no temperature was fitted'}"
        return f"temperature {self.temperature:.3f}, fitted on {self.fitted.images} {self.fitted.fitted_on} images"

    def curve_rows(self) -> list[dict[str, Any]]:
        """Rows of the risk-coverage table, each with whether its confidence is calibrated."""
        return [row | {"calibrated": str(self.calibrated).lower()} for row in self.curve.rows()]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the reliability table, one a bin, before and after; and whether the confidence after is calibrated."""
        edges = np.arange(BINS + 1) / BINS
        sides = (("before", self.before), ("after", self.after))
        return [
            {"above": round(edges[k], 6), "up_to": round(edges[k + 1], 6)}
            | {
                f"{name}_{column}": int(value) if column == "images" else round(float(value), 6) if of.images[k] else ""
                for name, of in sides
                for column, value in (
                    ("images", of.images[k]), ("confidence", of.confidence[k]), ("accuracy", of.accuracy[k])
                )
            }
            | {"calibrated": str(self.calibrated).lower()}
            for k in range(BINS)
        ]  # fmt: skip


def calibrate(
    logits: NDArray[Any],
    labels: NDArray[Any],
    *,
    keep: float = KEEP,
    split: str = "val",
    previous: Calibration | None = None,
    ending: Ending | None = None,
) -> Calibrated:
    """Fit temperature and threshold on logits (N,K) of images with labels (N,) of `split`, which the network has not learnt from.

    Temperature scaling (Guo et al., ICML 2017, arXiv:1706.04599): the number that divides all logits so that the cross-entropy
    is least; it changes no answer, only how sure it is. The threshold keeps at least `keep` of the right answers of new images of
    the same kind, on average (split conformal, Angelopoulos & Bates 2023, arXiv:2107.07511): nothing is known here of images of
    other classes, so how many of those it rejects is not promised. `keep` in (0,1]; 1 rejects nothing. `previous`: what was
    fitted here before; its temperature stays, and its threshold where it keeps as much. Both have six decimals, as they are
    stored. `ending`: of the network's file; with a sigmoid, each class's probability is its own, and the cross-entropy is
    binary, summed over the classes. Raises ValueError for another `keep`.
    """
    z, y, right = _labelled_logits(logits, labels)
    if not 0 < keep <= 1:
        raise ValueError(f"keep: a share above 0 and up to 1, not {keep}")
    enough = len(y) >= FEWEST
    temperature, note = fit_temperature(z, y, ending) if enough else (1.0, f"{len(y)} images, fewer than {FEWEST}: not fitted")
    temperature = previous.temperature if previous is not None else round(temperature, 6)
    half = np.empty(len(y), dtype=np.int64)
    half[np.argsort(y, kind="stable")] = np.arange(len(y)) % 2  # every class in both
    confidence, losses, answered = np.empty(len(y)), np.empty(len(y)), np.ones(len(y), dtype=bool)
    for fitted, other in ((half == 0, half == 1), (half == 1, half == 0)):
        t = fit_temperature(z[fitted], y[fitted], ending)[0] if enough else 1.0
        confidence[other], losses[other] = confidence_of(z[other], t, ending), _losses(z[other], y[other], t, ending)
        if enough:
            half_threshold = rejection_threshold(confidence_of(z[fitted], t, ending)[right[fitted]], keep=keep)
            answered[other] = confidence[other] >= half_threshold
    threshold = rejection_threshold(confidence_of(z, temperature, ending)[right], keep=keep) if enough else 0.0
    threshold = math.floor(threshold * 1e6) / 1e6  # rounded up it might reject one image more
    if previous is not None and previous.keep == keep:
        threshold = previous.threshold
    calibrated = _evaluate(
        (z, y, right), confidence, losses, answered, temperature=temperature, threshold=threshold, keep=keep, note=note,
        ending=ending,
    )  # fmt: skip
    return replace(calibrated, fitted=previous if previous is not None and previous.keep == keep else calibrated.stored(split))


def measure(
    logits: NDArray[Any],
    labels: NDArray[Any],
    calibration: Calibration | None,
    *,
    why: str = "",
    ending: Ending | None = None,
) -> Calibrated:
    """Measure a temperature and threshold that were fitted elsewhere on logits (N,K) of images with labels (N,). Nothing is
    fitted here. `calibration` None: nothing was fitted, and `why`. `ending`: as of `calibrate`."""
    z, y, right = _labelled_logits(logits, labels)
    temperature, threshold, keep = 1.0, 0.0, 1.0
    if calibration is not None:
        temperature, threshold, keep = calibration.temperature, calibration.threshold, calibration.keep
    confidence = confidence_of(z, temperature, ending)
    note = why if calibration is None else "" if calibration.calibrated else calibration.note
    calibrated = _evaluate(
        (z, y, right), confidence, _losses(z, y, temperature, ending), confidence >= threshold, temperature=temperature,
        threshold=threshold, keep=keep, note=note, ending=ending,
    )  # fmt: skip
    return replace(calibrated, fitted=calibration)


def _labelled_logits(logits: NDArray[Any], labels: NDArray[Any]) -> LabelledLogits:
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if z.ndim != 2 or y.shape != z.shape[:1] or not len(y) or not np.isfinite(z).all():
        raise ValueError(f"finite logits (N,K) and labels (N,), not {z.shape} and {y.shape}")
    return z, y, z.argmax(1) == y


def _evaluate(
    labelled: LabelledLogits,
    confidence: Floats,
    losses: Floats,
    answered: NDArray[np.bool_],
    *,
    temperature: float,
    threshold: float,
    keep: float,
    note: str,
    ending: Ending | None,
) -> Calibrated:
    """Measure `confidence`, `losses` and `answered` (N,) of images, each by a temperature and threshold not fitted to it."""
    z, y, right = labelled
    nll, nll_after = float(_losses(z, y, 1.0, ending).mean()), float(losses.mean())
    if nll_after > nll + 1e-9:
        worse = f"no gain: on images that it was not fitted on the loss is {nll_after:.4f}, without it {nll:.4f}"
        note = f"{note}; {worse}" if note else worse
    return Calibrated(
        images=len(y),
        fitted=None,
        temperature=temperature,
        note=note,
        nll=nll,
        nll_after=nll_after,
        before=reliability(confidence_of(z, 1.0, ending), right),
        after=reliability(confidence, right),
        curve=risk_coverage(confidence_of(z, temperature, ending), right),
        keep=keep,
        threshold=threshold,
        kept=float(answered[right].mean()) if right.any() else 1.0,
        coverage=float(answered.mean()),
        accuracy=float(right[answered].mean()) if answered.any() else 0.0,
    )


def fit_temperature(z: Floats, y: NDArray[np.int64], ending: Ending | None = None) -> tuple[float, str]:
    """Fit the temperature of least cross-entropy in [LOWEST, HIGHEST]; the note says where it is not reliable.

    The loss is convex in 1/T, so it has one minimum in log T. Where every answer is right it falls without end as T does:
    nothing tells how unsure to be, and T stays 1.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and training needs the constants above

    if (z.argmax(1) == y).all():
        return 1.0, f"all {len(y)} answers are right, which says nothing of how unsure to be: not fitted"
    result = minimize_scalar(
        lambda log_t: _losses(z, y, math.exp(log_t), ending).mean(),
        bounds=(math.log(LOWEST), math.log(HIGHEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    temperature = math.exp(float(result.x))
    for end in (LOWEST, HIGHEST):  # the search comes near a bound, never upon it
        if abs(temperature / end - 1) < 1e-3:
            return end, f"at the bound of what is tried, {end:g}: do not rely on these probabilities"
    return temperature, ""


def rejection_threshold(confidence_when_right: NDArray[np.float64], *, keep: float) -> float:
    """Largest confidence below which at most 1 - `keep` of new right answers fall, on average; 0 without any right answer.

    The k-th smallest of R confidences with k = floor((1 - keep)(R + 1)): a new one of the same distribution is below it with
    probability k / (R + 1) at most.
    """
    right = len(confidence_when_right)
    k = min(right, math.floor((1 - keep) * (right + 1) + 1e-9))  # 0.05 * 20 is 1, whatever floats say
    return float(np.sort(confidence_when_right)[k - 1]) if k else 0.0


def reliability(confidence: Floats, right: NDArray[np.bool_]) -> Reliability:
    """Compute the reliability of confidences (N,) in [0,1], given whether the answers (N,) are right."""
    return reliability_of_sums(bin_sums(confidence, right))


def bin_sums(confidence: Floats, right: NDArray[np.bool_]) -> Floats:
    """Sums by bin of confidence, (3,BINS): images, confidence and right answers. The sums of several sets add up."""
    at = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
    return np.stack([np.bincount(at, values, BINS) for values in (np.ones(len(at)), confidence, right)])


def reliability_of_sums(sums: Floats) -> Reliability:
    """Compute the reliability from the sums of `bin_sums`."""
    with np.errstate(invalid="ignore"):
        return Reliability(sums[0].astype(np.int64), *(sums[1:] / sums[0]))


def risk_coverage(confidence: Floats, right: NDArray[np.bool_]) -> RiskCoverage:
    """Compute the risk-coverage curve of confidences (N,), given whether the answers (N,) are right. Equal confidences share
    their mistakes evenly, so that the order of the images decides nothing."""
    order = np.argsort(-confidence, kind="stable")
    _, group = np.unique(-confidence[order], return_inverse=True)
    wrong = (np.bincount(group, weights=~right[order]) / np.bincount(group))[group]
    count = np.arange(1, len(order) + 1)
    return RiskCoverage(count / len(order), np.cumsum(wrong) / count, confidence[order])


def confidence_of(z: Floats, temperature: float, ending: Ending | None = None) -> Floats:
    """Largest probability (N,) of softmax(z / temperature), z (N,K); of the sigmoid where `ending`, of the file, is one."""
    s = z / temperature
    if ending == "sigmoid":
        return np.exp(-np.logaddexp(0, -s.max(1)))
    return 1 / np.exp(s - s.max(1, keepdims=True)).sum(1)


def fitting_sample(rows: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Select as many of `rows`, evenly spread, as a fit needs and memory holds with their logits."""
    return spread(rows, min(MAX_IMAGES, max(FEWEST, MAX_LOGITS // classes)))


def _losses(z: Floats, y: NDArray[np.int64], temperature: float, ending: Ending | None = None) -> Floats:
    """Cross-entropy (N,) in nats of logits z (N,K) and labels y (N,); with a sigmoid the binary one of each class, summed over
    the classes."""
    s = z / temperature
    if ending == "sigmoid":
        return np.logaddexp(0, s).sum(1) - s[np.arange(len(y)), y]
    s -= s.max(1, keepdims=True)
    return np.log(np.exp(s).sum(1)) - s[np.arange(len(y)), y]
