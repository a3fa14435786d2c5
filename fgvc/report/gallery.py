"""Pictures of a report: images that a net got wrong or was unsure of, with their class maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from fgvc.config.calibration import Calibration
from fgvc.data.index import decode_row
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError, ImageError
from fgvc.evaluation.metrics import Scores
from fgvc.images.address import picture
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit
from fgvc.models.cam.offline import class_maps_of
from fgvc.runs.loaded import Answers, LoadedRun
from fgvc.runtime.engine import calibration_word, is_calibrated, probabilities

SIDE = 224  # pixels of a picture's longer side
PAIRS = 8  # of classes
MISTAKES = 2  # pictures of a pair, each way
TRIED = 20  # files, before a class has no example


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedImage:
    """An image as the net sees it, with its class map and most probable classes."""

    picture: str  # data address
    map: str | None  # of the predicted class, over the picture; None: this net has none
    empty: bool  # the map: nothing in the picture speaks for the class
    path: str  # below the data's root
    true: str
    predicted: str
    true_share: float  # probability of the true class
    predicted_share: float
    other: str  # the second most probable class
    other_share: float

    @property
    def right(self) -> bool:
        return self.true == self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two classes that are confused with one another. `examples`: a picture of each from the training split, or None."""

    classes: tuple[str, str]
    examples: tuple[str | None, str | None]
    counts: tuple[int, int]  # the first taken for the second, and back
    shots: tuple[tuple[ExplainedImage, ...], tuple[ExplainedImage, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputExample:
    """A picture of the set, and what of it goes into the network; sizes are width x height."""

    original: str  # data address
    crop: str
    stored: str
    taken: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Pictures of one run. `unmapped`: why there are no maps, or empty; `word`: whether the probabilities are calibrated."""

    worst: tuple[ExplainedImage, ...]
    uncertain: tuple[ExplainedImage, ...]
    pairs: tuple[Pair, ...]
    unmapped: str
    word: str
    input: InputExample


def gallery(
    run: LoadedRun,
    answers: Answers,
    scores: Scores,
    calibration: Calibration | None,
    *,
    images: int,
    device: str | None = None,
) -> Gallery:
    """Select up to `images` pictures of the highest loss, as many of the smallest margin between the two most probable classes,
    and of the most confused pairs MISTAKES each way; by the probabilities that the run's temperature makes of the logits."""
    p = probabilities(answers.logits, calibration, answers.ending)
    predicted, true_shares = p.argmax(1), p[np.arange(len(p)), answers.labels]
    best = np.sort(p, axis=1)[:, -2:]
    worst = np.argsort(true_shares, kind="stable")[:images]
    uncertain = np.argsort(best[:, -1] - best[:, 0], kind="stable")[:images]
    classes = run.classes
    number = {name: at for at, name in enumerate(classes)}
    pairs = [(number[str(row["class"])], number[str(row["other"])]) for row in scores.confused(classes)]
    pairs = pairs[: min(PAIRS, images)]
    mistakes = {
        (a, b): _most_probable((answers.labels == a) & (predicted == b), p[:, b]) for pair in pairs for a, b in (pair, pair[::-1])
    }
    shown_positions = np.unique(np.concatenate([worst, uncertain, *mistakes.values()]))
    maps, unmapped = _maps(run, answers.rows[shown_positions], predicted[shown_positions], device)
    shots = {int(at): _shot(run, answers, p[at], int(at), maps) for at in shown_positions}
    examples = {label: _example(run, label) for pair in pairs for label in pair}
    return Gallery(
        worst=_select(shots, worst),
        uncertain=_select(shots, uncertain),
        pairs=tuple(
            Pair(
                classes=(classes[a], classes[b]),
                examples=(examples[a], examples[b]),
                counts=(int(scores.confusion[a, b]), int(scores.confusion[b, a])),
                shots=(_select(shots, mistakes[a, b]), _select(shots, mistakes[b, a])),
            )
            for a, b in pairs
        ),
        unmapped=unmapped,
        word=calibration_word(is_calibrated(calibration)),
        input=_input_example(run, int(answers.rows[0])),
    )


def _select(shots: Mapping[int, ExplainedImage], positions: Iterable[np.int64]) -> tuple[ExplainedImage, ...]:
    return tuple(shots[int(at)] for at in positions)


def _most_probable(mask: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Up to MISTAKES positions where `mask` holds, those of the largest share first."""
    positions = np.flatnonzero(mask)
    return positions[np.argsort(-share[positions], kind="stable")[:MISTAKES]]


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
        predicted=run.classes[first],
        true_share=float(p[label]),
        predicted_share=float(p[first]),
        other=run.classes[second],
        other_share=float(p[second]),
    )


def _input_example(run: LoadedRun, row: int) -> InputExample:
    image = decode_row(run.index, row)
    height, width = run.preprocess.size
    return InputExample(
        original=picture(image, side=2 * SIDE),
        crop=picture(_crop(run, row), side=SIDE),
        stored=f"{image.width} × {image.height}",
        taken=f"{width} × {height}",
    )


def _crop(run: LoadedRun, row: int) -> Image.Image:
    """Crop an image as the net sees it, at the size of the report's pictures."""
    height, width = run.preprocess.size
    scale = SIDE / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return Image.fromarray(fit(decode_row(run.index, row), run.preprocess.model_copy(update={"size": size})))


def _example(run: LoadedRun, label: int) -> str | None:
    """First picture of a class in the training split that can be read."""
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
    """Grad-CAM (H,W) in [0,1] of every row's target class; or none, and the reason."""
    target_of = dict(zip(rows.tolist(), targets.tolist(), strict=True))
    map_of: dict[int, np.ndarray] = {}
    with run.on_device(device) as (place, layout), ExitStack() as stack:
        try:
            class_maps = stack.enter_context(class_maps_of(run.step.net, run.preprocess.size, ["gradcam"]))
        except FgvcError as error:
            return {}, str(error)
        for batch in evaluation_loader(run.index, rows, spec=run.preprocess, batch_size=32, workers=0):
            labels = torch.tensor([target_of[row] for row in batch.index.tolist()])
            maps, _ = class_maps(batch.images.to(place, memory_format=layout), labels, "gradcam")
            map_of |= dict(zip(batch.index.tolist(), maps.numpy(), strict=True))
    return map_of, ""
