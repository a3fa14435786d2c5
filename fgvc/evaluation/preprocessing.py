"""The preprocessing that a deployed classifier was made for, by asking it about labelled images.

Each usual preprocessing is tried on the same images. They are ranked by the negative log likelihood of the images' classes under
the best one-to-one assignment of outputs to classes, so that the order of the file's labels need not be known; the assignment is
fitted on one half of the images and scored on the other, both ways. Images that the classifier was trained on may be used.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from fgvc.config.images import Preprocess, Triple
from fgvc.errors import FgvcError
from fgvc.evaluation.assignment import Order, cross_scored, output_order
from fgvc.evaluation.paired import LEVEL, mean_interval, paired_gain
from fgvc.images.preprocess import fit, normalise

LogProbabilities = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""The network: images (n,3,H,W), normalised, RGB or BGR, to log-probabilities (n,K)."""
Factor = Literal["normalisation", "channel_order", "resize", "fill", "crop_pct", "interpolation", "all"]
MUST_BE_DECIDED: tuple[Factor, ...] = ("normalisation", "channel_order", "resize")
LITTLE = 0.01  # share of the images that an open choice may be worth and be left to chance all the same
TAKEN: tuple[Factor, ...] = ("fill", "crop_pct", "interpolation")  # where undecided, the likelier one

Normalisation = tuple[Literal[1, 255], Triple, Triple]  # value of white; mean and std of R, G, B
NORMALISATIONS: dict[str, Normalisation] = {
    "ImageNet's mean and std": (1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "-1 to 1 (Inception's)": (1, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0 to 1": (1, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "0 to 255": (255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "0 to 255 less ImageNet's mean (Caffe's)": (255, (123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
}
FILLS = ((0, 0, 0), (114, 114, 114), (128, 128, 128), (255, 255, 255))  # of padded borders
CROPS = (0.8, 0.875, 0.9, 0.95, 1.0)  # share of the resized image that is kept
INTERPOLATIONS: tuple[tuple[str, bool], ...] = (
    ("bilinear", True),
    ("bicubic", True),
    ("bilinear", False),
    ("bicubic", False),
    ("lanczos", True),
    ("nearest", True),
)  # and whether antialiased
FEWEST_A_CLASS = 4  # images of a class that is used: two in each half
IMAGES = 500
COARSE, FEWEST = 120, 40  # images of the first rounds, and how many at least where the network is slow
BATCH, AHEAD = 32, 2  # images, and batches that are made before they are asked for
COARSE_TRIALS, FINE_TRIALS = 52, 11  # of preprocessings, about
FINALISTS = 4  # of crops and interpolations, which all images then tell apart
AS_GIVEN = "as given"  # in place of a normalisation's name
SECONDS = 100.0  # that the search may take; fewer images where the network is slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One preprocessing, with the network's losses and right answers under it."""

    spec: Preprocess
    normalisation: str  # its name
    answers: NDArray[np.float64]  # (n,K) log-probabilities of the first n images
    losses: NDArray[np.float64]  # (n,) -log p of the class's output
    right: NDArray[np.bool_]  # (n,)

    @property
    def loss(self) -> float:
        """Mean loss in nats."""
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0,1]."""
        return float(self.right.mean())

    def value(self, factor: Factor) -> object:
        """The value of a factor, as people name it."""
        if factor == "all":
            return self.spec
        if factor == "normalisation":
            return self.normalisation
        if factor == "fill" and self.spec.resize != "pad":
            return None
        return interpolation_name(self.spec) if factor == "interpolation" else getattr(self.spec, factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """The best trial that differs from the best of all in one factor, paired with it."""

    factor: Factor
    trial: Trial
    low: float  # interval of its mean loss less the best one's, nats
    high: float
    worth: float  # the most that it could have more of accuracy: the upper end of the paired interval, share in [0,1]

    @property
    def decided(self) -> bool:
        """Whether the best trial is better for certain: the interval of the difference in loss lies above 0."""
        return self.low > 0

    @property
    def undecided(self) -> bool:
        """Whether the images do not tell this trial from the best one, in a factor that must not be left to chance."""
        return self.factor in MUST_BE_DECIDED and not self.decided

    @property
    def matters(self) -> bool:
        """Whether it is undecided and may change the accuracy: not where all pictures are square, or grey, and both do the
        same."""
        return self.undecided and self.worth > LITTLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A ranking of preprocessings."""

    best: Trial
    alternatives: tuple[Alternative, ...]
    given: Alternative | None  # the preprocessing that was asked about, beside the best
    order: Order
    labels: NDArray[np.int64]  # (n,) of the images, numbers of their classes
    images: int
    classes: int  # that the images are of
    trials: int
    seconds: float

    @property
    def undecided(self) -> tuple[Alternative, ...]:
        """Alternatives that are undecided."""
        return tuple(a for a in self.alternatives if a.undecided)

    @property
    def refused(self) -> tuple[Alternative, ...]:
        """The undecided alternatives that matter for images like these."""
        return tuple(a for a in self.alternatives if a.matters)


def interpolation_name(spec: Preprocess) -> str:
    """Name of a preprocessing's interpolation, for people."""
    return spec.interpolation + ("" if spec.antialias else ", not antialiased")


def sample_rows(labels: NDArray[np.int64], images: int = IMAGES) -> NDArray[np.int64]:
    """Rows of images, the same number of each class as far as there are. Classes with fewer than FEWEST_A_CLASS images are left
    out, and so are classes, at random, where there are too many for `images`. The first are FEWEST_A_CLASS of each of a few
    classes, then of a few more; then all classes have one more, and so on.

    Raises FgvcError where fewer than two classes have enough.
    """
    random = np.random.default_rng(0)
    classes, counts = np.unique(labels, return_counts=True)
    classes = random.permutation(classes[counts >= FEWEST_A_CLASS])[: max(2, images // FEWEST_A_CLASS)]
    if len(classes) < 2:
        raise FgvcError(
            f"to tell preprocessings apart, {FEWEST_A_CLASS} images or more of two classes are needed; the largest class has "
            f"{counts.max(initial=0)}"
        )
    order = [random.permutation(np.flatnonzero(labels == k)) for k in classes]
    chunk = FEWEST // FEWEST_A_CLASS
    whole = [rows[n] for at in range(0, len(order), chunk) for n in range(FEWEST_A_CLASS) for rows in order[at : at + chunk]]
    whole += [rows[n] for n in range(FEWEST_A_CLASS, max(map(len, order))) for rows in order if n < len(rows)]
    return np.array(whole[: max(images, FEWEST_A_CLASS * len(classes))], dtype=np.int64)


def search(
    network: LogProbabilities,
    size: tuple[int, int],
    images: Sequence[Image.Image],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    *,
    stated: Sequence[str] = (),
    normalisations: Collection[str] = tuple(NORMALISATIONS),
    given: Preprocess | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Search:
    """Rank the usual preprocessings by the network's answers, from coarse to fine.

    `images` in an order of which each prefix is balanced (see `sample_rows`), with their `labels` (N,), numbers of `classes`;
    `stated`: the class of each output as far as it is known; `normalisations`: those to try, of NORMALISATIONS; `given`: one
    more to try. Raises FgvcError where the network knows the classes under none.
    """
    tried = _Trials(network, size, images, labels, seconds=seconds)
    coarse, whole = tried.plan()
    progress(f"{coarse} of {len(images)} images under {2 * len(normalisations)} normalisations")
    base = Preprocess(size=size, resize="crop", crop_pct=0.875, interpolation="bilinear")
    first = sorted((tried(spec, name, coarse) for name, spec in _normalised(base, normalisations)), key=_loss)
    likely = [trial for trial in first[:3] if trial is first[0] or not _paired("normalisation", first[0], trial).decided]
    progress("resize modes")
    modes = [tried(spec, trial.normalisation, coarse) for trial in likely for spec in _resized(trial.spec)]
    best = min([*first, *modes], key=_loss)
    progress("crops and interpolations")
    grid = sorted((tried(spec, best.normalisation, coarse) for spec in _fine(best.spec)), key=_loss)
    best = min([best, *grid], key=_loss)
    progress(f"{whole} images under the likeliest")
    others = [alternative.trial for alternative in tried.alternatives(best)]
    for trial in (best, *grid[:FINALISTS], *others):
        tried(trial.spec, trial.normalisation, whole)
    # What stays open is refused, and two or three trials more are little time.
    while whole < len(images) and (left := [a.trial for a in tried.alternatives(tried.best(whole)) if a.matters]):
        open_, whole = (tried.best(whole), *left), tried.wider(whole)
        progress(f"{whole} images under the {len(open_)} that are not told apart")
        for trial in open_:
            tried(trial.spec, trial.normalisation, whole)
    asked = None if given is None else tried(given.model_copy(update={"network": None}), AS_GIVEN, whole)
    best = tried.best(whole)
    chance = float(np.bincount(labels[: len(best.losses)]).max() / len(best.losses))
    by_luck = float(binomtest(int(best.right.sum()), len(best.right), chance, alternative="greater").pvalue)
    if by_luck * len(tried.trials) > 1 - LEVEL:  # the best of so many
        raise FgvcError(
            f"under none of {len(tried.trials)} preprocessings does the network tell these classes apart (best: "
            f"{100 * best.accuracy:.1f} % of {len(best.right)} images): other images, or another network's file?"
        )
    wide = tried(best.spec, best.normalisation, tried.covering(whole))
    order = output_order(wide.answers, labels[: len(wide.losses)], classes, stated)
    return Search(
        best=best, alternatives=tuple(tried.alternatives(best)), order=order, labels=labels[: len(best.losses)],
        given=None if asked is None else _paired("all", best, asked), images=len(best.losses),
        classes=len(np.unique(labels[: len(best.losses)])), trials=len(tried.trials), seconds=tried.elapsed,
    )  # fmt: skip


def likelier(
    network: LogProbabilities,
    images: Sequence[Image.Image],
    labels: NDArray[np.int64],
    given: Preprocess,
    *,
    normalisations: Collection[str] = tuple(NORMALISATIONS),
    seconds: float = SECONDS,
) -> tuple[Trial, Trial] | None:
    """A stated preprocessing, and one of another normalisation, channel order or resize mode under which the network names more
    of the images rightly, by LITTLE or more for certain; None: there is none, or no time to ask. `images`, `labels`: see
    `search`."""
    tried = _Trials(network, given.size, images, labels, seconds=seconds)
    given = given.model_copy(update={"network": None})
    others = [*_normalised(given, normalisations), *((AS_GIVEN, spec) for spec in _resized(given))]
    count = tried.affordable() // (len(others) + 1)
    if count < min(FEWEST, len(images)):
        return None
    count = tried.in_both_halves(min(COARSE, count))
    stated = tried(given, AS_GIVEN, count)
    best = min((tried(spec, name, count) for name, spec in others), key=_loss)
    _, worth, _ = paired_gain(stated.right, best.right)
    return (stated, best) if _paired("all", stated, best).high < 0 and worth > LITTLE else None


@dataclass(slots=True)
class _Trials:
    """The trials so far of one network on one sample of images."""

    network: LogProbabilities
    size: tuple[int, int]
    images: Sequence[Image.Image]
    labels: NDArray[np.int64]
    seconds: float
    trials: dict[str, Trial] = field(default_factory=dict)
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def affordable(self) -> int:
        """Images that there is time to ask about, by the seconds of one batch."""
        spec = Preprocess(size=self.size)
        count = min(BATCH, len(self.images))
        self._log_probabilities(spec, 0, 2)  # the first run of a session is slow
        before = time.monotonic()
        self._log_probabilities(spec, 0, count)
        each = (time.monotonic() - before) / count
        return int(self.seconds / max(each, 1e-6))

    def plan(self) -> tuple[int, int]:
        """Numbers of images of a coarse and of a fine trial."""
        affordable = self.affordable()
        coarse = self.in_both_halves(max(FEWEST, min(COARSE, affordable // (2 * COARSE_TRIALS))))
        more = max(0, affordable - COARSE_TRIALS * coarse) // FINE_TRIALS
        return coarse, max(coarse, self.in_both_halves(coarse + more))

    def covering(self, images: int) -> int:
        """The least number of images, `images` or more, that has all classes among the first ones."""
        return max(images, self.in_both_halves(FEWEST_A_CLASS * len(np.unique(self.labels))))

    def wider(self, images: int) -> int:
        """About twice as many images, or all."""
        more = self.in_both_halves(2 * images)
        return more if more > images else len(self.images)

    def in_both_halves(self, images: int) -> int:
        """The largest number, up to `images`, of first images with two of each class or more."""
        images = min(images, len(self.images))
        while images > 2 and np.unique(self.labels[:images], return_counts=True)[1].min() < 2:
            images -= 1
        return images

    def __call__(self, spec: Preprocess, normalisation: str, images: int) -> Trial:
        """Try a preprocessing on the first `images`, but those that it was tried on already."""
        key = spec.model_dump_json()
        before = self.trials.get(key)
        if before is None or len(before.losses) < images:
            start = 0 if before is None else len(before.losses)
            answers = self._log_probabilities(spec, start, images)
            if before is not None:
                answers = np.concatenate([before.answers, answers])
            losses, right = cross_scored(answers, self.labels[:images])
            self.trials[key] = Trial(spec=spec, normalisation=normalisation, answers=answers, losses=losses, right=right)
        return self.trials[key]

    def best(self, images: int) -> Trial:
        """The best of those that were tried on as many images."""
        return min((t for t in self.trials.values() if len(t.losses) >= images), key=lambda trial: trial.loss)

    def alternatives(self, best: Trial) -> Iterable[Alternative]:
        """Yield the likeliest trial with another value of each factor."""
        for factor in (*MUST_BE_DECIDED, *TAKEN):
            others = [trial for trial in self.trials.values() if trial.value(factor) not in (best.value(factor), None)]
            most = max((len(trial.losses) for trial in others), default=0)
            others = [trial for trial in others if len(trial.losses) == most]
            if others and best.value(factor) is not None:
                yield _paired(factor, best, min(others, key=partial(_mean_difference, best)))

    def _log_probabilities(self, spec: Preprocess, first: int, stop: int) -> NDArray[np.float64]:
        """Answers (stop - first, K), in batches of which the next ones are made while the network works."""
        answers, waiting = list[NDArray[np.float64]](), deque[Future[NDArray[np.float32]]]()
        with ThreadPoolExecutor(AHEAD) as pool:
            for start, end in pairwise([*range(first, stop, BATCH), stop]):
                waiting.append(pool.submit(self._batch, spec, start, end))
                if len(waiting) > AHEAD:
                    answers.append(self.network(waiting.popleft().result()))
            answers += [self.network(batch.result()) for batch in waiting]
        return np.concatenate(answers)

    def _batch(self, spec: Preprocess, start: int, end: int) -> NDArray[np.float32]:
        return np.stack([normalise(fit(image, spec), spec) for image in self.images[start:end]])


def _paired(factor: Factor, best: Trial, other: Trial) -> Alternative:
    n = min(len(best.losses), len(other.losses))
    low, high = mean_interval(other.losses[:n] - best.losses[:n])
    ours, theirs = best.right[:n], other.right[:n]
    *_, worth = paired_gain(ours, theirs)
    alike = np.array_equal(best.answers[:n], other.answers[:n])
    return Alternative(factor=factor, trial=other, low=low, high=high, worth=0.0 if alike else max(0.0, worth))


def _mean_difference(best: Trial, other: Trial) -> float:
    n = min(len(best.losses), len(other.losses))
    return float((other.losses[:n] - best.losses[:n]).mean())


def _loss(trial: Trial) -> float:
    return trial.loss


def _with(spec: Preprocess, **changes: object) -> Preprocess:
    return Preprocess.model_validate(spec.model_dump() | changes)


def _normalised(spec: Preprocess, names: Collection[str]) -> list[tuple[str, Preprocess]]:
    """The spec under each of these normalisations, in both channel orders."""
    made = []
    for name in names:
        white, mean, std = NORMALISATIONS[name]
        for order in ("rgb", "bgr"):
            turned = (mean, std) if order == "rgb" else (mean[::-1], std[::-1])
            made.append((name, _with(spec, channel_order=order, input_range=white, mean=turned[0], std=turned[1])))
    return made


def _fine(spec: Preprocess) -> list[Preprocess]:
    """The spec under all crop shares (but where it pads) and interpolations."""
    return [
        _with(spec, crop_pct=crop, interpolation=name, antialias=antialias)
        for crop in ((spec.crop_pct,) if spec.resize == "pad" else CROPS)
        for name, antialias in INTERPOLATIONS
    ]


def _resized(spec: Preprocess) -> list[Preprocess]:
    """The spec in the other resize modes."""
    modes: list[dict[str, object]] = [{"resize": "crop", "crop_pct": c} for c in (0.875, 1.0)]
    modes += [{"resize": "squash", "crop_pct": c} for c in (0.875, 1.0)]
    modes += [{"resize": "pad", "crop_pct": 1.0, "fill": fill} for fill in FILLS]
    return [_with(spec, **mode) for mode in modes]
