"""The pictures of a report: what a net got wrong or was unsure of, and where it looked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fgvc.config.runtime import Calibration
from fgvc.data.index import decode_row
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError, ImageError
from fgvc.evaluation.metrics import Scores
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit
from fgvc.models.cam.offline import class_maps_of
from fgvc.report.render import picture
from fgvc.runs.loaded import Answers, LoadedRun
from fgvc.runtime.engine import calibration_word, is_calibrated, probabilities

SIDE = 224  # pixels of a picture's longer side
PAIRS = 8  # of classes
MISTAKES = 2  # pictures of a pair, each way
TRIED = 20  # files, before a class has no example


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedImage:
    """An image as the net sees it, and what it said."""

    picture: str  # data address
    map: str | None  # of the predicted class, over the picture; None: this net has none
    empty: bool  # the map: nothing in the picture speaks for the class
    path: str  # below the data's root
    true: str
    said: str
    true_share: float  # probability of the true class
    said_share: float
    other: str  # the second most probable class
    other_share: float

    @property
    def right(self) -> bool:
        return self.true == self.said


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two classes that are taken for one another. `examples`: a picture of each from the training split, or None."""

    classes: tuple[str, str]
    examples: tuple[str | None, str | None]
    counts: tuple[int, int]  # the first taken for the second, and back
    shots: tuple[tuple[ExplainedImage, ...], tuple[ExplainedImage, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """`unmapped`: why there are no maps; empty where there are. `word`: whether the probabilities are calibrated."""

    worst: tuple[ExplainedImage, ...]
    uncertain: tuple[ExplainedImage, ...]
    pairs: tuple[Pair, ...]
    unmapped: str
    word: str


def gallery(
    run: LoadedRun,
    answers: Answers,
    scores: Scores,
    known: Calibration | None,
    *,
    images: int,
    device: str | None = None,
) -> Gallery:
    """Up to `images` pictures of the highest loss, as many of the smallest margin between the two most probable classes, and
    of the most confused pairs MISTAKES each way; by the probabilities that the run's temperature makes of the logits."""
    p = probabilities(answers.logits, known)
    said, own = p.argmax(1), p[np.arange(len(p)), answers.labels]
    best = np.sort(p, axis=1)[:, -2:]
    worst = np.argsort(own, kind="stable")[:images]
    uncertain = np.argsort(best[:, -1] - best[:, 0], kind="stable")[:images]
    classes = run.classes
    number = {name: at for at, name in enumerate(classes)}
    pairs = [(number[str(row["class"])], number[str(row["other"])]) for row in scores.confused(classes)]
    pairs = pairs[: min(PAIRS, images)]
    mistakes = {
        (a, b): _surest((answers.labels == a) & (said == b), p[:, b]) for pair in pairs for a, b in (pair, pair[::-1])
    }
    wanted = np.unique(np.concatenate([worst, uncertain, *mistakes.values()]))
    maps, unmapped = _maps(run, answers.rows[wanted], said[wanted], device)
    shots = {int(at): _shot(run, answers, p[at], int(at), maps) for at in wanted}
    examples = {label: _example(run, label) for pair in pairs for label in pair}
    return Gallery(
        worst=_of(shots, worst),
        uncertain=_of(shots, uncertain),
        pairs=tuple(
            Pair(
                classes=(classes[a], classes[b]),
                examples=(examples[a], examples[b]),
                counts=(int(scores.confusion[a, b]), int(scores.confusion[b, a])),
                shots=(_of(shots, mistakes[a, b]), _of(shots, mistakes[b, a])),
            )
            for a, b in pairs
        ),
        unmapped=unmapped,
        word=calibration_word(is_calibrated(known)),
    )


def _of(shots: Mapping[int, ExplainedImage], wanted: Iterable[np.int64]) -> tuple[ExplainedImage, ...]:
    return tuple(shots[int(at)] for at in wanted)


def _surest(which: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Up to MISTAKES positions where `which` holds, those of the largest share first."""
    found = np.flatnonzero(which)
    return found[np.argsort(-share[found], kind="stable")[:MISTAKES]]


def _shot(run: LoadedRun, answers: Answers, p: np.ndarray, at: int, maps: Mapping[int, np.ndarray]) -> ExplainedImage:
    row, label = int(answers.rows[at]), int(answers.labels[at])
    order = np.argsort(-p, kind="stable")[:2]
    first, second = int(order[0]), int(order[-1])
    image = _crop(run, row)
    return ExplainedImage(
        picture=picture(image, side=SIDE),
        map=picture(overlay(image, maps[row]), side=SIDE) if row in maps else None,
        empty=row in maps and not maps[row].any(),
        path=str(run.index.paths[row]),
        true=run.classes[label],
        said=run.classes[first],
        true_share=float(p[label]),
        said_share=float(p[first]),
        other=run.classes[second],
        other_share=float(p[second]),
    )


def _crop(run: LoadedRun, row: int) -> Image.Image:
    """What the net is shown of an image, at the size of the report's pictures."""
    height, width = run.preprocess.size
    scale = SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return Image.fromarray(fit(decode_row(run.index, row), run.preprocess.model_copy(update={"size": size})))


def _example(run: LoadedRun, label: int) -> str | None:
    """The first picture of a class in the training split that can be read."""
    rows = run.index.rows("train")
    for row in rows[run.index.labels[rows] == label][:TRIED]:
        try:
            return picture(_crop(run, int(row)), side=SIDE)
        except ImageError:
            continue
    return None


def _maps(
    run: LoadedRun, rows: np.ndarray, targets: np.ndarray, device: str | None
) -> tuple[dict[int, np.ndarray], str]:
    """For every row, its Grad-CAM (H,W) in [0,1] of the target class; or none, and why."""
    of = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    found: dict[int, np.ndarray] = {}
    with run.placed(device) as (where, layout), ExitStack() as stack:
        try:
            look = stack.enter_context(class_maps_of(run.step.net, run.preprocess.size, ["gradcam"]))
        except FgvcError as error:
            return {}, str(error)
        for batch in evaluation_loader(run.index, rows, spec=run.preprocess, batch_size=32, workers=0):
            labels = torch.tensor([of[row] for row in batch.index.tolist()])
            maps, _ = look(batch.images.to(where, memory_format=layout), labels, "gradcam")
            found |= dict(zip(batch.index.tolist(), maps.numpy(), strict=True))
    return found, ""
