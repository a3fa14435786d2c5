"""Answers of two classifiers about the same images, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import MAX_LOGITS, confidence_of
from fgvc.evaluation.paired import Paired, compare_predictions
from fgvc.evaluation.side import Side
from fgvc.evaluation.stack_threshold import Accepted, accepted
from fgvc.images.preprocess import differences
from fgvc.io.display import Display
from fgvc.io.names import label_differences
from fgvc.runs.images import training_overlap
from fgvc.runs.loaded import Answers

FLIP_COLUMNS = (  # columns of a table of flips
    "path", "flip", "class", "a", "a_confidence", "b", "b_confidence", "a_calibrated", "b_calibrated"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images that both sides classify."""

    index: ImageIndex
    rows: NDArray[np.int64]
    split: str
    workers: int = 0
    unseen: str = ""  # which images, where they are those that a deployed file was not trained on
    set_aside: str = ""  # the run or bundle that recorded that they are to judge
    notes: tuple[str, ...] = ()  # doubts about them


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PairedAnswers(Display):
    """Answers of both sides on the N images that could be read."""

    a: Side
    b: Side
    split: str
    classes: tuple[str, ...]  # A's order, in all numbers here
    paths: tuple[Path, ...]  # (N,)
    predicted: NDArray[np.int64]  # (2,N) classes
    confidence: NDArray[np.float64]  # (2,N); by each side's temperature, see `Side.calibrated`
    stack_confidence: NDArray[np.float64]  # (2,N) by the files' own outputs, as a stack sees it
    paired: Paired
    unreadable: tuple[str, ...]
    images: ImageIndex
    rows: NDArray[np.int64]  # (N,) of the index: the images that were read
    notes: tuple[str, ...]  # doubts about the figures
    differences: tuple[str, ...]  # in how the sides are fed and read: B is no drop-in for A
    unseen: str = ""  # as of `Images`
    set_aside: str = ""

    @property
    def judged(self) -> str:
        """Description and number of the images that judged; empty where no deployed file is compared."""
        if not self.unseen:
            return ""
        words = f"judged on {self.paired.images} unseen images of {self.unseen}"
        return f"{words}, which {self.set_aside} set aside to judge" if self.set_aside else words

    @property
    def rejected(self) -> NDArray[np.bool_]:
        """Images (2,N) that are answered "none of these" in service. `paired` and the gates count the predicted class all the
        same."""
        return self.confidence < np.array([[self.a.threshold], [self.b.threshold]])

    def accepted(self, threshold: float) -> list[Accepted]:
        """Coverage and precision of A's and of B's answers that a stack accepts from this confidence on, by the files' own
        outputs."""
        right = self.paired.a_right, self.paired.b_right
        return [accepted(by, correct, threshold) for by, correct in zip(self.stack_confidence, right, strict=True)]

    @property
    def fewer_flips(self) -> str:
        """Advice on how to get a B with fewer negative flips."""
        run = str(self.b.path) if self.b.kind == "run" else "RUN"
        teacher = "run" if self.a.kind == "run" else "bundle"
        return (
            f"to break fewer: fgvc interpolate {run} --out BETWEEN --share 0.5, which goes back towards the weights that it "
            "began with; or train anew with A as a teacher, "
            f"techniques.distill.teachers='[{{kind: {teacher}, path: {self.a.path}}}]'"
        )

    def rejections(self) -> list[tuple[int, int]]:
        """Count, for A and for B, the images answered "none of these", and those of them whose predicted class is right."""
        right = np.stack([self.paired.a_right, self.paired.b_right])
        return [(int(no.sum()), int((no & correct).sum())) for no, correct in zip(self.rejected, right, strict=True)]

    def flips(self) -> list[dict[str, Any]]:
        """Table of one row a flip: negative flips first, those of which B is most confident on top."""
        names = self.classes
        negative, positive = self.paired.negative, self.paired.positive
        order = np.lexsort((-self.confidence[1], ~negative))
        return [
            {
                "path": str(self.paths[n]),
                "flip": "negative" if negative[n] else "positive",
                "class": names[self.paired.labels[n]],
                "a": names[self.predicted[0, n]],
                "a_confidence": round(float(self.confidence[0, n]), 6),
                "b": names[self.predicted[1, n]],
                "b_confidence": round(float(self.confidence[1, n]), 6),
                "a_calibrated": str(self.a.calibrated).lower(),
                "b_calibrated": str(self.b.calibrated).lower(),
            }
            for n in order
            if negative[n] or positive[n]
        ]

    @property
    def facts(self) -> Mapping[str, object]:
        pair = self.paired
        gain = f"{100 * pair.gain:+.2f} points ({100 * pair.low:+.2f} to {100 * pair.high:+.2f}) on {pair.images} images"
        flips = {"negative flips": int(pair.negative.sum()), "positive flips": int(pair.positive.sum())}
        return {"": self.a.path, "to": self.b.path, "gain": gain, **flips}


def collect_answers(a: Side, b: Side, images: Images) -> PairedAnswers:
    """Collect the answers of both sides on the same images, without those that can't be read. Raises FgvcError where a
    side gives logits that are no numbers."""
    order = {name: k for k, name in enumerate(a.classes)}
    number = np.array([order.get(name, -1) for name in images.index.classes])
    step = max(64, MAX_LOGITS // len(a.classes))
    rows: list[NDArray[np.int64]] = []
    predicted, confidence, by_stack = [], [], []
    unreadable: dict[str, None] = {}
    for start in range(0, len(images.rows), step):
        both_answers = [
            side.answers(images.index, images.rows[start : start + step], workers=images.workers) for side in (a, b)
        ]
        if not np.array_equal(both_answers[0].rows, both_answers[1].rows):
            raise FgvcError("an image could be read once, and once not: leave the files alone while they are compared")
        for side, answer in zip((a, b), both_answers, strict=True):
            _refuse_no_numbers(side, answer, images.index)
        rows.append(both_answers[0].rows)
        numbers = [np.array([order[name] for name in side.classes]) for side in (a, b)]
        predicted.append([in_order[answer.logits.argmax(1)] for in_order, answer in zip(numbers, both_answers, strict=True)])
        temperatures = a.temperature, b.temperature
        confidence.append(
            [
                confidence_of(answer.logits.astype(np.float64), t, answer.ending)
                for answer, t in zip(both_answers, temperatures, strict=True)
            ]
        )
        by_stack.append([confidence_of(answer.logits.astype(np.float64), 1.0, answer.ending) for answer in both_answers])
        unreadable |= dict.fromkeys(both_answers[0].unreadable)
    rows_read, predictions = np.concatenate(rows), np.concatenate(predicted, axis=1)
    overlaps = filter(None, (_overlap_warning(a, images), _overlap_warning(b, images)))
    return PairedAnswers(
        a=a,
        b=b,
        split=images.split,
        classes=a.classes,
        paths=tuple(images.index.path(row) for row in rows_read),
        predicted=predictions,
        confidence=np.concatenate(confidence, axis=1),
        stack_confidence=np.concatenate(by_stack, axis=1),
        paired=compare_predictions(number[images.index.labels[rows_read]], *predictions),
        unreadable=tuple(unreadable),
        notes=(*a.notes, *b.notes, *images.notes, *overlaps, *images.index.warnings),
        differences=_differences(a, b),
        images=images.index,
        rows=rows_read,
        unseen=images.unseen,
        set_aside=images.set_aside,
    )


def _differences(a: Side, b: Side) -> tuple[str, ...]:
    return (*differences(_as_fed(a), _as_fed(b)), *label_differences(a.classes, b.classes))


def _as_fed(side: Side) -> Preprocess:
    """The side's preprocessing, with the input and output of its file where it has one."""
    assert side.preprocess is not None
    if side.session is None:
        return side.preprocess
    return side.preprocess.model_copy(update={"network": side.session.file.record})


def _refuse_no_numbers(side: Side, answers: Answers, index: ImageIndex) -> None:
    wrong = answers.rows[~np.isfinite(answers.logits).all(1)]
    if len(wrong):
        raise FgvcError(
            f"{side.path}: gives logits that are no numbers (NaN or infinite) for {len(wrong)} of {len(answers.rows)} images, "
            f"the first of them {index.path(wrong[0])}"
        )


def _overlap_warning(side: Side, images: Images) -> str:
    """A warning where a run was trained on some of these images."""
    if side.run is None:
        return ""
    count = training_overlap(side.run.index, images.index, images.rows)
    return f"{side.path} was trained on {count} of these {len(images.rows)} images, which favours it" if count else ""
