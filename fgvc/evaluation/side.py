"""Sides of a comparison: runs, bundles or any .onnx files with labels, on images that need not be their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex
from fgvc.data.quality.colour import NATURAL, other_units
from fgvc.errors import FgvcError
from fgvc.evaluation.temperature import calibration
from fgvc.images.preprocess import described
from fgvc.io.display import Display
from fgvc.io.names import some
from fgvc.runs.deployed import RECORD, record_of
from fgvc.runs.folder import is_run, read_run
from fgvc.runs.images import descends_from_file
from fgvc.runs.loaded import Answers, LoadedRun, load_run, onnx_answers
from fgvc.runtime.bundle import DEPLOYED_FILE, OTHER_CLASSES, bundle_with_judge, load_bundle, read_json, read_judge
from fgvc.runtime.engine import OnnxSession, doubts_about, refuse_misfit, session_of
from fgvc.runtime.labels import labels_of
from fgvc.runtime.stack import stack_of


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Side(Display):
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
    deployed: bool = False  # a deployed file, or weights that descend from one: what it was trained on can't judge it
    judge: Mapping[str, Any] | None = None  # of a bundle, that of its run: which images judge

    def answers(self, index: ImageIndex, rows: NDArray[np.int64], *, workers: int) -> Answers:
        """Compute its logits for these images, by its own preprocessing."""
        if self.run is not None:
            return self.run.answers(rows, index=index)
        assert self.session is not None
        assert self.preprocess is not None
        return onnx_answers(self.session, index, rows, spec=self.preprocess, workers=workers)

    @property
    def facts(self) -> Mapping[str, object]:
        return {"": self.path, "kind": self.kind, "classes": len(self.classes)}


def open_sides(
    a: Path,
    b: Path,
    *,
    labels: Path | Sequence[Path] | None = None,
    preprocess: Path | Sequence[Path] | None = None,
    certain: bool = False,
    root: Path | None = None,
) -> tuple[Side, Side]:
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
    for path, opposite, files in zip((a, b), (b, a), stated_files, strict=True):
        files |= {name: file for name, file in _files_from_other_side(path, opposite).items() if name not in files}
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


def _files_from_other_side(path: Path, other: Path) -> dict[str, Path]:
    """Files with the labels and the preprocessing of a lone .onnx file, from the run or bundle on the other side, where that was
    trained from this very file or written into it. Only what the file itself lacks."""
    if not path.is_file() or not other.is_dir():
        return {}
    record = other / (RECORD if is_run(other) else "contract.json")
    facts = read_json(record, dict) if record.is_file() else {}
    hashes = (facts if is_run(other) else facts.get("file", {})).get("sha256", {})
    if not isinstance(hashes, Mapping) or record_of(path)["sha256"][path.name] not in hashes.values():
        return {}
    lacks = {"labels": labels_of(path) is None, "preprocess": not _file_beside(path, "preprocess").is_file()}
    return {name: other / f"{name}.json" for name, missing in lacks.items() if missing}


def _roots(paths: Sequence[Path], root: Path | None) -> list[Path | None]:
    """Folder to which the set of each side has moved, or None."""
    data_roots = [read_run(path).data.root.expanduser().resolve() if is_run(path) else None for path in paths]
    first = next((place for place in data_roots if place is not None), None)
    if root is not None and first is None:
        raise FgvcError(f"--root {root}: names where the set of a run lies now, and neither side is a run; give --data")
    return [root if place == first else None for place in data_roots]


def _open(path: Path, root: Path | None, *, labels: Path | None = None, preprocess: Path | None = None) -> Side:
    if path.is_file():
        stack = stack_of(path, labels=labels, preprocess=preprocess)
        if stack.labels is None:
            raise FgvcError(f"{path}: which classes? Neither its metadata nor a file beside it says: give --labels FILE")
        spec = stack.preprocess
        doubts = []
        if spec is not None and not _takes_raw_pixels(spec):
            doubts = other_units(spec, NATURAL, "that of photographs")
        notes = tuple(f"{path}: {doubt}" for doubt in doubts)
        judge = None if (folder := bundle_with_judge(path)) is None else read_judge(folder, stack.labels)
        return Side(
            path=path, kind="onnx", classes=stack.labels, preprocess=spec, notes=notes, session=stack.session(), deployed=True,
            judge=judge,
        )  # fmt: skip
    if is_run(path):
        run = load_run(path, root=root)
        descends = descends_from_file(run.recipe)
        side = Side(
            path=path, kind="run", classes=run.classes, preprocess=run.preprocess, run=run, deployed=descends
        )
        return _calibrated(side, calibration(run).calibration)
    bundle = load_bundle(path)
    side = Side(
        path=path,
        kind="bundle",
        classes=bundle.labels,
        preprocess=bundle.preprocess,
        session=session_of(bundle, bundle.model),
        deployed=bundle.contract.get("contract") in (DEPLOYED_FILE, OTHER_CLASSES),
        judge=bundle.judge,
    )
    return _calibrated(side, bundle.calibration)


def _calibrated(side: Side, fitted: Calibration | None) -> Side:
    if fitted is None:
        return side
    return replace(side, temperature=fitted.temperature, threshold=fitted.threshold, calibrated=fitted.calibrated)


def _takes_raw_pixels(spec: Preprocess) -> bool:
    """Whether the net takes pixels as they are, and normalises them itself."""
    return (spec.mean, spec.std) == ((0, 0, 0), (1, 1, 1))


def _with_preprocessing(side: Side, other: Side) -> Side:
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
