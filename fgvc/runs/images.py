"""Images of a recipe, listed anew, and of a run, as it recorded them when it began.

A new draw of a set that has changed by one file moves others from split to split, so that what was trained on would be tested on.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fgvc.config.data import SPLITS, Split
from fgvc.config.loading import load
from fgvc.config.models import run_of
from fgvc.config.recipe import Recipe
from fgvc.data.beside import with_folder
from fgvc.data.index import ImageIndex
from fgvc.data.labels import as_in_file, file_labels, first_classes, reordered
from fgvc.data.quality.copies import together
from fgvc.data.sources.read import read_source, source_contents
from fgvc.data.unseen import judged_apart
from fgvc.errors import FgvcError
from fgvc.io.names import some, sort_order_remark
from fgvc.runs import checkpoint
from fgvc.runs import record as recording
from fgvc.runs.record import NAME, Record, changes


def read_index(recipe: Recipe, *, copies: bool = True) -> ImageIndex:
    """Read the labelled images of a recipe, in the deployed stack's label order, with all classes of a deployed file. Raises
    FgvcError for fewer than two classes. `copies`: keep near copies in one split, which reads pictures that are new."""
    index = read_source(recipe.data)
    if recipe.model.onnx is not None and recipe.model.classes == "keep":
        index = as_in_file(index, file_labels(recipe.model.onnx, recipe.deploy.labels))
    elif recipe.deploy.labels is not None:
        index = reordered(index, recipe.deploy.labels)
    elif recipe.data.classes is None and (remark := sort_order_remark(index.classes)):
        recognised = f"{index.recognised}; {remark}; deploy.labels states the deployed stack's order"
        index = replace(index, recognised=recognised)
    if recipe.deploy.unseen is not None:
        index = with_folder(index, recipe.deploy.unseen)
    if recipe.data.first_classes is not None:
        index = first_classes(index, recipe.data.first_classes)
    if len(index.classes) < 2:
        raise FgvcError(f"data.root: {recipe.data.root}: {len(index.classes)} class found; a classifier needs two")
    return together(index) if copies and recipe.data.copies_together else index


def first_index(recipe: Recipe) -> ImageIndex:
    """Read the images that a run begins with, in the splits that it trains by. Raises FgvcError as `read_index` does, and where
    none is left to judge a deployed file's weights by."""
    if not descends_from_file(recipe):
        return read_index(recipe)
    if recipe.data.fold is not None:
        raise FgvcError(
            "data.fold: cross-validation is for starts that have not seen the data, and folds are made of what the deployed file "
            "has seen; leave it out"
        )
    divided = recipe.model_copy(update={"data": recipe.data.model_copy(update={"hold_out": True})})
    index = read_index(divided, copies=False)  # near copies are kept apart from what was seen, there
    return judged_apart(index, recipe.deploy.seen, hold_out=recipe.data.hold_out, beside=recipe.deploy.unseen)


def descends_from_file(recipe: Recipe) -> bool:
    """Whether the first weights are a deployed file's own, or those of a run that began with them: no image that the file has
    seen may then choose or judge."""
    if recipe.model.weights == "deployed":
        return True
    run = run_of(Path(recipe.model.weights).expanduser())
    return run is not None and descends_from_file(load(Recipe, run / "config.yaml"))


def fingerprint(index: ImageIndex) -> str:
    """SHA-256 of the images' names in their order, for state that is stored by row and holds for this list only."""
    return hashlib.sha256("\n".join(index.paths.tolist()).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RunImages:
    """Images of a run, below the folder where they lie now."""

    run: Path
    index: ImageIndex
    record: Record | None  # None: of an earlier fgvc, which kept none

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Rows of one split. Raises FgvcError where a file of these is gone, or is another than the run began with."""
        rows = self.index.rows(split)
        if self.record is not None and (faults := _file_faults(self.record, rows)):
            raise FgvcError(
                f"{self.run}: of the {len(rows)} {split} images that it began with, in {self.index.root}:\n{faults}\n"
                "Restore them, or name the folder where the set lies now (--root DIR)"
            )
        return rows


def recorded_images(run: Path, recipe: Recipe, root: Path | None = None) -> RunImages:
    """Read the images of a run, for verbs that read it. `root`: where its set lies now; default: where its recipe says.

    Prints one line where the set has changed, or where the run has no record. Raises FgvcError where the record is damaged, or
    without one where the images are not those that its checkpoint knows.
    """
    if root is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": root})})
    if not (run / NAME).is_file():
        return RunImages(run, _unrecorded(run, recipe), None)
    record = _record(run, recipe)
    if remark := _change_remark(record, recipe):
        print(f"{run}: {remark}", file=sys.stderr)
    return RunImages(run, record.index, record)


def resumed_index(run: Path, recipe: Recipe, *, recorded: bool = False) -> ImageIndex:
    """Read the images of a run that trains on: as they were recorded, with all of their files.

    `recorded`: whatever has come to the set since. Raises FgvcError where the set is another, with the first few differences.
    """
    if not (run / NAME).is_file():
        if recorded:
            raise FgvcError(
                f"{run}: has no record of its images: it was begun by an earlier fgvc; leave --recorded out"
            )
        return read_index(recipe)  # its names are compared with those that the checkpoint knows
    root = recipe.data.root.expanduser()
    record = _record(run, recipe)
    if recorded:
        if faults := _file_faults(record, np.arange(len(record.index))):
            raise FgvcError(
                f"{run}: --recorded goes on with the images that the run began with, and in {root}:\n{faults}\n"
                "Restore them, or name the folder where the set lies now (data.root=DIR)"
            )
        return record.index
    try:
        differences = changes(record, read_index(recipe, copies=False)).lines()
    except FgvcError as error:
        raise FgvcError(
            f"{error}\n{run}: this run can't go on without its images: restore them, or name the folder where the set lies now "
            "(data.root=DIR)"
        ) from error
    if differences:
        listed = "\n".join(f"  {line}" for line in differences)
        raise FgvcError(
            f"{run}: the images in {root} are not those that this run began with:\n{listed}\n"
            "Restore the set, or give --recorded to go on with the recorded images, all of whose files must be there; or choose "
            "another --out for a new run"
        )
    return record.index


def _record(run: Path, recipe: Recipe) -> Record:
    """A run's record, of images that lie where its recipe says. Raises FgvcError where it is damaged."""
    record = recording.load(run / NAME, recipe.data.root.expanduser(), max_pixels=recipe.data.max_pixels)
    contents = source_contents(recipe.data)
    return record if contents is None else replace(record, index=replace(record.index, contents=contents))


def training_overlap(trained_index: ImageIndex, index: ImageIndex, rows: NDArray[np.int64]) -> int:
    """Count the rows of `index` that are among the training images of `trained_index`, by the paths of the files."""
    trained = set(file_names(trained_index, trained_index.rows("train")))
    return sum(name in trained for name in file_names(index, rows))


def file_names(index: ImageIndex, rows: NDArray[np.int64]) -> list[str]:
    """The absolute paths of these rows' files, in one spelling."""
    root = str(index.root.resolve())
    return [os.path.normpath(f"{root}/{name}") for name in index.paths[rows].tolist()]


def held_out_overlap(run: Path, index: ImageIndex) -> int:
    """Count the validation and test images of `index` that a run was trained on; 0 for a run without a record."""
    return run_overlap(run, index, np.flatnonzero(index.splits != SPLITS.index("train")))


def run_overlap(run: Path, index: ImageIndex, rows: NDArray[np.int64]) -> int:
    """Count the rows of `index` that a run was trained on; 0 for a run without a record."""
    if not (run / NAME).is_file():
        return 0
    trained_index = recording.load(run / NAME, load(Recipe, run / "config.yaml").data.root.expanduser()).index
    return training_overlap(trained_index, index, rows)


def _file_faults(record: Record, rows: NDArray[np.int64]) -> str:
    """Lines about the files of these rows that are gone or of another size; empty where there are none."""
    words = ("gone", "of another size than then")
    faults = [(record.index.paths[bad].tolist(), word) for bad, word in zip(record.missing(rows), words, strict=True)]
    return "\n".join(f"  {len(paths)} {word}: {some(paths, 3)}" for paths, word in faults if paths)


def _change_remark(record: Record, recipe: Recipe) -> str:
    """Remark about a set that has changed since it was recorded; empty where it has not."""
    if not recipe.data.root.expanduser().is_dir():
        return ""  # all is gone, which whoever asks for rows will hear
    try:
        differences = changes(record, read_index(recipe, copies=False), files=False).lines()
    except FgvcError as error:
        differences = [str(error).splitlines()[0]]
    if not differences:
        return ""
    return f"the data have changed since it began ({'; '.join(differences)}); what was recorded then is used"


def _unrecorded(run: Path, recipe: Recipe) -> ImageIndex:
    index = read_index(recipe)
    fingerprint_then = checkpoint.load(run / "ckpt").rest.get("images")
    if fingerprint_then is not None and fingerprint_then != fingerprint(index):
        raise FgvcError(
            f"{run}: the images in {index.root} are not those that it was trained on, and it has no record of which were in "
            "which split: restore the set as it was, or name the folder where it lies now (--root DIR)"
        )
    doubt = (
        "they have the names that it was trained on" if fingerprint_then is not None else "whether any came or went is not known"
    )
    print(
        f"{run}: has no record of its images (an earlier fgvc began it): they were divided into splits anew; {doubt}",
        file=sys.stderr,
    )
    return index
