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
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from scipy.stats import t as student_t

from fgvc.config.images import Preprocess, Triple
from fgvc.errors import FgvcError
from fgvc.evaluation.paired import LEVEL, gain_interval
from fgvc.images.preprocess import fit, normalise

LogProbabilities = Callable[[NDArray[np.float32]], NDArray[np.float64]]
"""The network: images (n,3,H,W), normalised, RGB or BGR, to log-probabilities (n,K)."""
Factor = Literal["normalisation", "channel_order", "resize", "fill", "crop_pct", "interpolation"]
MUST_BE_DECIDED: tuple[Factor, ...] = ("normalisation", "channel_order", "resize")
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
COARSE = 120  # images of the first round, or FEWEST_A_CLASS of each class
BATCH, AHEAD = 32, 2  # images, and batches that are made before they are asked for
COARSE_TRIALS, FINE_TRIALS = 52, 9  # of preprocessings, about
SECONDS = 100.0  # that the search may take; fewer images where the network is slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One preprocessing, and how the network answers under it."""

    spec: Preprocess
    normalisation: str  # its name
    losses: NDArray[np.float64]  # (n,) of the first n images: -log p of the class's output
    right: NDArray[np.bool_]  # (n,)

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def value(self, factor: Factor) -> object:
        """The value of a factor, as people name it."""
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
        return self.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which class each output of the network stands for, by its answers."""

    stated: tuple[str, ...]  # a name an output, as they are stated or follow from the folder; () where none are
    assigned: tuple[str | None, ...]  # (K,) the class of each output; None: of no class among the images
    other: tuple[str, ...]  # classes whose output is another than stated, alike in both halves of their images
    low: float = 0.0  # interval of the mean loss of their images as stated less as assigned, nats
    high: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the stated order is that of the outputs."""
        return bool(self.stated) and not self.other

    @property
    def decided(self) -> bool:
        return self.holds or not self.stated or self.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A ranking of preprocessings."""

    best: Trial
    alternatives: tuple[Alternative, ...]
    order: Order
    images: int
    classes: int  # that the images are of
    trials: int
    seconds: float

    @property
    def undecided(self) -> tuple[Alternative, ...]:
        """Alternatives that the images do not tell from the best, of what can't be left to chance."""
        return tuple(a for a in self.alternatives if a.factor in MUST_BE_DECIDED and not a.decided)


def interpolation_name(spec: Preprocess) -> str:
    """Its interpolation, in words."""
    return spec.interpolation + ("" if spec.antialias else ", not antialiased")


def sample_rows(labels: NDArray[np.int64], images: int = IMAGES) -> NDArray[np.int64]:
    """Rows of images, the same number of each class as far as there are, such that each prefix is balanced. Classes with fewer
    than FEWEST_A_CLASS images are left out, and so are classes, at random, where there are too many for `images`.

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
    order = [random.permutation(np.flatnonzero(labels == k)) for k in np.sort(classes)]
    rounds = [[rows[n] for rows in order if n < len(rows)] for n in range(max(map(len, order)))]
    whole = [row for rows in rounds for row in rows]
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
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Search:
    """Rank the usual preprocessings by the network's answers, from coarse to fine.

    `images` in an order of which each prefix is balanced (see `sample_rows`), with their `labels` (N,), numbers of `classes`;
    `stated`: the class of each output as far as it is known; `normalisations`: those to try, of NORMALISATIONS. Raises FgvcError
    where the network knows the classes under none.
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
    for trial in (best, *grid[:3], *others):
        tried(trial.spec, trial.normalisation, whole)
    best = tried.best(whole)
    chance = float(np.bincount(labels[: len(best.losses)]).max() / len(best.losses))
    by_luck = float(binomtest(int(best.right.sum()), len(best.right), chance, alternative="greater").pvalue)
    if by_luck * len(tried.trials) > 1 - LEVEL:  # the best of so many
        raise FgvcError(
            f"under none of {len(tried.trials)} preprocessings does the network tell these classes apart (best: "
            f"{100 * best.accuracy:.1f} % of {len(best.right)} images): other images, or another network's file?"
        )
    order = tried.order(best, classes, stated)
    return Search(
        best=best, alternatives=tuple(tried.alternatives(best)), order=order, images=len(best.losses),
        classes=len(np.unique(labels[: len(best.losses)])), trials=len(tried.trials), seconds=tried.elapsed,
    )  # fmt: skip


@dataclass(slots=True)
class _Trials:
    """What was tried, and the network that is asked."""

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

    def plan(self) -> tuple[int, int]:
        """How many images a coarse and a fine trial may have, by the seconds of one batch."""
        spec = Preprocess(size=self.size)
        count = min(BATCH, len(self.images))
        self._log_probabilities(spec, 2)  # the first run of a session is slow
        before = time.monotonic()
        self._log_probabilities(spec, count)
        each = (time.monotonic() - before) / count
        fewest = min(len(self.images), FEWEST_A_CLASS * len(np.unique(self.labels)))
        affordable = int(self.seconds / max(each, 1e-6))
        coarse = min(len(self.images), max(fewest, min(COARSE, affordable // (2 * COARSE_TRIALS))))
        return coarse, min(len(self.images), max(coarse, (affordable - COARSE_TRIALS * coarse) // FINE_TRIALS))

    def __call__(self, spec: Preprocess, normalisation: str, images: int) -> Trial:
        """Try a preprocessing on the first `images`; one that was tried on as many already is not tried again."""
        key = spec.model_dump_json()
        if key not in self.trials or len(self.trials[key].losses) < images:
            answers = self._log_probabilities(spec, images)
            losses, right = cross_scored(answers, self.labels[:images])
            self.trials[key] = Trial(spec=spec, normalisation=normalisation, losses=losses, right=right)
        return self.trials[key]

    def best(self, images: int) -> Trial:
        """The best of those that were tried on as many images."""
        return min((t for t in self.trials.values() if len(t.losses) >= images), key=lambda trial: trial.loss)

    def alternatives(self, best: Trial) -> Iterable[Alternative]:
        """For each factor the likeliest trial with another value of it."""
        for factor in (*MUST_BE_DECIDED, *TAKEN):
            others = [trial for trial in self.trials.values() if trial.value(factor) not in (best.value(factor), None)]
            most = max((len(trial.losses) for trial in others), default=0)
            others = [trial for trial in others if len(trial.losses) == most]
            if others and best.value(factor) is not None:
                yield _paired(factor, best, min(others, key=partial(_mean_difference, best)))

    def order(self, best: Trial, classes: Sequence[str], stated: Sequence[str]) -> Order:
        """Compare the stated order of the outputs with the one that their answers show."""
        labels = self.labels[: len(best.losses)]
        answers = self._log_probabilities(best.spec, len(labels))
        present = np.unique(labels)
        halves = [assign(answers[half], labels[half]) for half in halved(labels)]
        whole = assign(answers, labels)
        assigned: list[str | None] = [None] * answers.shape[1]
        for label, output in whole.items():
            assigned[output] = classes[label]
        places = {name: at for at, name in enumerate(stated)}
        other = [
            k for k in present.tolist()
            if stated and halves[0][k] == halves[1][k] == whole[k] != places.get(classes[k], -1)
        ]  # fmt: skip
        rows = np.flatnonzero(np.isin(labels, other))
        as_shown = np.array([whole[k] for k in labels[rows]], dtype=np.int64)
        as_stated = np.array([places.get(classes[k], whole[k]) for k in labels[rows]], dtype=np.int64)
        low, high = mean_interval(answers[rows, as_shown] - answers[rows, as_stated]) if len(rows) else (0.0, 0.0)
        return Order(
            stated=tuple(stated), assigned=tuple(assigned), other=tuple(classes[k] for k in other), low=low, high=high
        )

    def _log_probabilities(self, spec: Preprocess, images: int) -> NDArray[np.float64]:
        """Answers (images, K), in batches of which the next ones are made while the network works."""
        answers, waiting = list[NDArray[np.float64]](), deque[Future[NDArray[np.float32]]]()
        with ThreadPoolExecutor(AHEAD) as pool:
            for start, end in pairwise([*range(0, images, BATCH), images]):
                waiting.append(pool.submit(self._batch, spec, start, end))
                if len(waiting) > AHEAD:
                    answers.append(self.network(waiting.popleft().result()))
            answers += [self.network(batch.result()) for batch in waiting]
        return np.concatenate(answers)

    def _batch(self, spec: Preprocess, start: int, end: int) -> NDArray[np.float32]:
        return np.stack([normalise(fit(image, spec), spec) for image in self.images[start:end]])


def halved(labels: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks (N,) of two halves, with every second image of each class in each."""
    first = np.zeros(len(labels), dtype=bool)
    for k in np.unique(labels):
        first[np.flatnonzero(labels == k)[::2]] = True
    return first, ~first


def assign(answers: NDArray[np.float64], labels: NDArray[np.int64]) -> dict[int, int]:
    """The one-to-one assignment of outputs to classes under which the labels are likeliest: class -> output.

    `answers` (N,K) log-probabilities. Raises FgvcError where there are more classes than outputs.
    """
    present = np.unique(labels)
    if len(present) > answers.shape[1]:
        raise FgvcError(f"the images are of {len(present)} classes, and the network has {answers.shape[1]} outputs")
    likelihood = np.stack([answers[labels == k].sum(0) for k in present])
    rows, outputs = linear_sum_assignment(likelihood, maximize=True)
    return {int(present[row]): int(output) for row, output in zip(rows, outputs, strict=True)}


def cross_scored(
    answers: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Losses (N,) in nats, and whether the largest output is the class's, each image under the assignment that was fitted on
    the other half."""
    losses, right = np.empty(len(labels)), np.empty(len(labels), dtype=bool)
    halves = halved(labels)
    for ours, theirs in (halves, halves[::-1]):
        outputs = assign(answers[theirs], labels[theirs])
        of = np.array([outputs[int(k)] for k in labels[ours]])
        losses[ours] = -answers[np.flatnonzero(ours), of]
        right[ours] = answers[ours].argmax(1) == of
    return losses, right


def mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Student's interval of a mean; without end for fewer than two values."""
    if len(values) < 2:
        return -np.inf, np.inf
    half = student_t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _paired(factor: Factor, best: Trial, other: Trial) -> Alternative:
    n = min(len(best.losses), len(other.losses))
    low, high = mean_interval(other.losses[:n] - best.losses[:n])
    ours, theirs = best.right[:n], other.right[:n]
    _, worth = gain_interval(int((theirs & ~ours).sum()), int((ours & ~theirs).sum()), n)
    return Alternative(factor=factor, trial=other, low=low, high=high, worth=max(0.0, worth))


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
