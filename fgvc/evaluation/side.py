"""Sides of a comparison: runs, bundles or any .onnx files with labels, on images that need not be their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import FolderData, Split
from fgvc.config.images import Preprocess
from fgvc.config.runtime import Calibration
from fgvc.config.shipped import recipe_file
from fgvc.data.index import ImageIndex
from fgvc.data.quality.colour import NATURAL, other_units
from fgvc.data.recipe import load_recipe
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import MAX_LOGITS, confidence_of
from fgvc.evaluation.paired import Paired, compare_predictions
from fgvc.evaluation.temperature import calibration
from fgvc.images.preprocess import described, differences
from fgvc.io.names import label_differences, some
from fgvc.runs.folder import is_run, read_run
from fgvc.runs.images import read_index, recorded_images, training_overlap
from fgvc.runs.loaded import Answers, LoadedRun, load_run, onnx_answers
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import OnnxSession, doubts_about, refuse_misfit, session_of
from fgvc.runtime.stack import stack_of

FLIP_COLUMNS = (  # columns of a table of flips
    "path", "flip", "class", "a", "a_confidence", "b", "b_confidence", "a_calibrated", "b_calibrated"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """One side of a comparison: a classifier with its classes, preprocessing and calibration."""

    path: Path
    kind: Literal["run", "bundle", "onnx"]
    classes: tuple[str, ...]
    preprocess: Preprocess | None  # None: not stated
    notes: tuple[str, ...] = ()  # assumptions about its input, and doubts
    temperature: float = 1.0
    threshold: float = 0.0  # "none of these" below this confidence; 0: never
    calibrated: bool = False  # whether the temperature was fitted
    session: OnnxSession | None = None
    run: LoadedRun | None = None

    def answers(self, index: ImageIndex, rows: NDArray[np.int64], *, workers: int) -> Answers:
        """Compute its logits for these images, by its own preprocessing."""
        if self.run is not None:
            return self.run.answers(rows, index=index)
        assert self.session is not None
        assert self.preprocess is not None
        return onnx_answers(self.session, index, rows, spec=self.preprocess, workers=workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images that both sides classify."""

    index: ImageIndex
    rows: NDArray[np.int64]
    split: str
    workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedAnswers:
    """Answers of both sides on the N images that could be read."""

    a: Classifier
    b: Classifier
    split: str
    classes: tuple[str, ...]  # A's order, in all numbers here
    paths: tuple[Path, ...]  # (N,)
    predicted: NDArray[np.int64]  # (2,N) classes
    confidence: NDArray[np.float64]  # (2,N); by each side's temperature, see `Classifier.calibrated`
    paired: Paired
    unreadable: tuple[str, ...]
    images: ImageIndex
    rows: NDArray[np.int64]  # (N,) of the index: the images that were read
    notes: tuple[str, ...]  # doubts about the figures
    differences: tuple[str, ...]  # in how the sides are fed and read: B is no drop-in for A

    @property
    def rejected(self) -> NDArray[np.bool_]:
        """Images (2,N) that are answered "none of these" in service. `paired` and the gates count the predicted class all the
        same."""
        return self.confidence < np.array([[self.a.threshold], [self.b.threshold]])

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


def open_sides(
    a: Path,
    b: Path,
    *,
    labels: Path | Sequence[Path] | None = None,
    preprocess: Path | Sequence[Path] | None = None,
    certain: bool = False,
    root: Path | None = None,
) -> tuple[Classifier, Classifier]:
    """Open both. `labels` and `preprocess` are for .onnx files that have no labels.json or preprocess.json beside them: one file
    is for whichever has none, two are A's and B's. Without a preprocessing such a file is assumed to see images as the other
    side does, at its own size; unless it is to be `certain`. `root`: where the set of the first run lies now, and that of the
    second if it is the same.

    Raises FgvcError where one can't be opened, something would have to be assumed that is to be certain, or their classes are
    not the same.
    """
    if missing_paths := [path for path in (a, b) if not path.exists()]:
        raise FgvcError(f"{missing_paths[0]}: no such run, bundle or .onnx file")
    stated_files = [dict[str, Path](), dict[str, Path]()]
    for name, option in (("labels", labels), ("preprocess", preprocess)):
        for at, file in _assign_files(name, option, (a, b)):
            stated_files[at][name] = file
    for path, files in zip((a, b), stated_files, strict=True):
        unknown = [
            name for name in ("preprocess", "labels") if name not in files and not _file_beside(path, name).is_file()
        ]
        if certain and path.is_file() and unknown:
            options = " and ".join(f"--{name} FILE" for name in unknown)
            raise FgvcError(
                f"{path}: nothing says how this model is fed and read, and a release is not judged by assumptions: "
                f"give {options}, as a bundle's {' and '.join(f'{name}.json' for name in unknown)}"
            )
    roots = _roots((a, b), root)
    first, second = (_open(path, place, **files) for path, place, files in zip((a, b), roots, stated_files, strict=True))
    for side, other in ((first, second), (second, first)):
        if missing := sorted(set(side.classes) - set(other.classes)):
            raise FgvcError(
                f"{side.path} and {other.path} do not know the same classes: {other.path} lacks {some(missing)} "
                f"({len(missing)} of {len(side.classes)})"
            )
    return _with_preprocessing(first, second), _with_preprocessing(second, first)


def _assign_files(name: str, option: Path | Sequence[Path] | None, sides: tuple[Path, Path]) -> list[tuple[int, Path]]:
    """Assign each file of an option to a side (0 or 1). Raises FgvcError where one is for none."""
    files = [option] if isinstance(option, Path) else list(option or ())
    without = [at for at, path in enumerate(sides) if path.is_file() and not _file_beside(path, name).is_file()]
    if len(files) > 2:
        raise FgvcError(f"--{name}: given {len(files)} times; once for A's, once for B's")
    pairs = [(at, file) for file in files for at in without] if len(files) == 1 else list(enumerate(files))
    if files and (not pairs or any(at not in without for at, _ in pairs)):
        complete = " and ".join(str(path) for at, path in enumerate(sides) if at not in without)
        raise FgvcError(f"--{name} {files[0]}: leave the option out where a side has its own, as {complete}")
    return pairs


def _file_beside(path: Path, name: str) -> Path:
    return path.parent / f"{name}.json"


def select_images(
    data: str | None, sides: Sequence[Classifier], split: Split | None = None, *, max_pixels: int | None = None
) -> Images:
    """Select the images to compare on, see `_select_images`. `max_pixels`: of a picture, in place of the data's own limit."""
    images = _select_images(data, sides, split)
    return images if max_pixels is None else replace(images, index=replace(images.index, max_pixels=max_pixels))


def _select_images(data: str | None, sides: Sequence[Classifier], split: Split | None) -> Images:
    """Select the images of a folder of class folders (all of it, or one split where it has splits), of a recipe or a run,
    or by default of the first side that is a run. `split` as for evaluation: by default val where there is one, else test.

    Raises FgvcError where there are none, or of classes that the sides do not know.
    """
    run = next((side.run for side in sides if side.run is not None), None)
    if data is None:
        if run is None:
            raise FgvcError("which images? Neither side is a run: give --data, a folder of class folders or a recipe")
        split, rows = run.rows_of(split)
        return Images(index=run.index, rows=rows, split=split, workers=run.recipe.train.workers)
    workers, source = 0, Path(data)
    if is_run(source):
        recipe = read_run(source)
        recorded = recorded_images(source, recipe)
        index, workers, rows_of = recorded.index, recipe.train.workers, recorded.rows
    elif source.is_dir():
        index = read_source(FolderData(root=source, val_fraction=0, test_fraction=0))
        rows_of = index.rows
        if split is None and len(index.rows("train")) == len(index):
            return _check_classes(Images(index=index, rows=np.arange(len(index)), split="all"), sides[0])
    else:
        recipe = load_recipe(recipe_file(data))
        index, workers = read_index(recipe), recipe.train.workers
        rows_of = index.rows
    chosen_split: Split = split or ("val" if len(index.rows("val")) else "test")
    if not len(rows := rows_of(chosen_split)):
        raise FgvcError(f"{data}: has no {chosen_split} split")
    return _check_classes(Images(index=index, rows=rows, split=chosen_split, workers=workers), sides[0])


def collect_answers(a: Classifier, b: Classifier, images: Images) -> PairedAnswers:
    """Collect the answers of both sides on the same images, without those that can't be read. Raises FgvcError where a
    side gives logits that are no numbers."""
    order = {name: k for k, name in enumerate(a.classes)}
    number = np.array([order.get(name, -1) for name in images.index.classes])
    step = max(64, MAX_LOGITS // len(a.classes))
    rows: list[NDArray[np.int64]] = []
    predicted, confidence = [], []
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
        paired=compare_predictions(number[images.index.labels[rows_read]], *predictions),
        unreadable=tuple(unreadable),
        notes=(*a.notes, *b.notes, *overlaps, *images.index.warnings),
        differences=_differences(a, b),
        images=images.index,
        rows=rows_read,
    )


def _differences(a: Classifier, b: Classifier) -> tuple[str, ...]:
    return (*differences(_as_fed(a), _as_fed(b)), *label_differences(a.classes, b.classes))


def _as_fed(side: Classifier) -> Preprocess:
    """Its preprocessing, with what its file says of its ends where there is a file."""
    assert side.preprocess is not None
    if side.session is None:
        return side.preprocess
    return side.preprocess.model_copy(update={"network": side.session.file.record})


def _roots(paths: Sequence[Path], root: Path | None) -> list[Path | None]:
    """Folder to which the set of each side has moved, or None."""
    data_roots = [read_run(path).data.root.expanduser().resolve() if is_run(path) else None for path in paths]
    first = next((place for place in data_roots if place is not None), None)
    if root is not None and first is None:
        raise FgvcError(f"--root {root}: names where the set of a run lies now, and neither side is a run; give --data")
    return [root if place == first else None for place in data_roots]


def _open(path: Path, root: Path | None, *, labels: Path | None = None, preprocess: Path | None = None) -> Classifier:
    if path.is_file():
        stack = stack_of(path, labels=labels, preprocess=preprocess)
        if stack.labels is None:
            raise FgvcError(f"{path}: which classes? Neither its metadata nor a file beside it says: give --labels FILE")
        spec = stack.preprocess
        doubts = []
        if spec is not None and not _takes_raw_pixels(spec):
            doubts = other_units(spec, NATURAL, "that of photographs")
        notes = tuple(f"{path}: {doubt}" for doubt in doubts)
        output = None if spec is None or spec.network is None else spec.network.output
        session = OnnxSession(path, output=output, classes=len(stack.labels))
        return Classifier(path=path, kind="onnx", classes=stack.labels, preprocess=spec, notes=notes, session=session)
    if is_run(path):
        run = load_run(path, root=root)
        side = Classifier(path=path, kind="run", classes=run.classes, preprocess=run.preprocess, run=run)
        return _calibrated(side, calibration(run).calibration)
    bundle = load_bundle(path)
    side = Classifier(
        path=path,
        kind="bundle",
        classes=bundle.labels,
        preprocess=bundle.preprocess,
        session=session_of(bundle, bundle.model),
    )
    return _calibrated(side, bundle.calibration)


def _calibrated(side: Classifier, fitted: Calibration | None) -> Classifier:
    if fitted is None:
        return side
    return replace(side, temperature=fitted.temperature, threshold=fitted.threshold, calibrated=fitted.calibrated)


def _takes_raw_pixels(spec: Preprocess) -> bool:
    """Whether the net takes pixels as they are, and normalises them itself."""
    return (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))


def _with_preprocessing(side: Classifier, other: Classifier) -> Classifier:
    """Return the side with its preprocessing, checked against its model."""
    if side.session is None:
        return side
    spec = side.preprocess or other.preprocess
    if spec is None:
        raise FgvcError(f"{side.path}: how does it see an image? Give --preprocess FILE, as a bundle's preprocess.json")
    notes = side.notes
    if side.preprocess is None:
        file = side.session.file
        size = tuple(fixed or free for fixed, free in zip((file.height, file.width), spec.size, strict=True))
        spec = spec.model_copy(update={"size": size, "network": None})
        if file.white is not None:  # the graph does the rest
            spec = spec.model_copy(update={"input_range": file.white, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
        notes = (
            f"{side.path} says nothing of its preprocessing; assumed, as {other.path}: {described(spec)} (else give --preprocess "
            "FILE)",
        )
    where = side.path / "preprocess.json" if side.path.is_dir() else f"the preprocessing of {side.path.name}"
    refuse_misfit(side.session.file, spec, model=side.path, where=where)
    notes = (*notes, *(f"{side.path}: {doubt}" for doubt in doubts_about(side.session.file, spec)))
    outputs = side.session.logits(np.zeros((1, 3, *spec.size), np.float32)).shape
    if outputs != (1, len(side.classes)):
        raise FgvcError(f"{side.path}: gives {outputs[1:]} logits for {len(side.classes)} labels")
    return replace(side, preprocess=spec, notes=notes)


def _refuse_no_numbers(side: Classifier, answers: Answers, index: ImageIndex) -> None:
    wrong = answers.rows[~np.isfinite(answers.logits).all(1)]
    if len(wrong):
        raise FgvcError(
            f"{side.path}: gives logits that are no numbers (NaN or infinite) for {len(wrong)} of {len(answers.rows)} images, "
            f"the first of them {index.path(wrong[0])}"
        )


def _check_classes(images: Images, side: Classifier) -> Images:
    if unknown := sorted(set(images.index.classes) - set(side.classes)):
        raise FgvcError(f"{images.index.root}: has classes that {side.path} does not know: {some(unknown)}")
    return images


def _overlap_warning(side: Classifier, images: Images) -> str:
    """A warning where a run was trained on some of these images."""
    if side.run is None:
        return ""
    count = training_overlap(side.run.index, images.index, images.rows)
    return f"{side.path} was trained on {count} of these {len(images.rows)} images, which favours it" if count else ""
