"""Changes of a set's classes: the label order of a deployed stack, and the first classes only, for quick studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.names import nearest, some
from fgvc.runtime.bundle import read_labels
from fgvc.runtime.labels import BESIDE, CONFIG, KEYS, Labels, labels_of


def reordered(index: ImageIndex, path: Path) -> ImageIndex:
    """The index with its classes numbered as in a file that `fgvc.runtime.bundle.read_labels` reads.

    Raises FgvcError if the file's classes are not exactly the data's.
    """
    try:
        names = read_labels(path.expanduser())
    except FgvcError as error:
        raise FgvcError(f"deploy.labels: {error}") from error
    unknown, missing = sorted(set(names) - set(index.classes)), sorted(set(index.classes) - set(names))
    if unknown or missing:
        raise FgvcError(
            f"deploy.labels: {path} does not list the data's classes: "
            f"{len(missing)} missing ({', '.join(missing[:5])}), {len(unknown)} unknown ({', '.join(unknown[:5])})"
        )
    return _renumbered(index, names)


def _renumbered(index: ImageIndex, names: tuple[str, ...]) -> ImageIndex:
    """The index with its classes numbered as they are in `names`, where all of them are."""
    position = {name: number for number, name in enumerate(names)}
    order = np.array([position[name] for name in index.classes], dtype=np.int32)
    return replace(index, classes=names, labels=order[index.labels])


def file_labels(onnx: Path, stated: Path | None) -> Labels:
    """The labels of a deployed file: those that `deploy.labels` states, else its own (see `labels_of`).

    Raises FgvcError with how to give them where nothing says which output is which class."""
    if stated is not None:
        try:
            return Labels(read_labels(stated.expanduser()), str(stated))
        except FgvcError as error:
            raise FgvcError(f"deploy.labels: {error}") from error
    labels = labels_of(onnx.expanduser())
    if labels is None:
        raise FgvcError(
            f"{onnx}: which of its outputs is which class? It says nothing of that (metadata {', '.join(KEYS)}), and none of "
            f"{', '.join(BESIDE)} and {CONFIG} (id2label) lies beside it. Give deploy.labels=FILE: a text file with a class a "
            "line, in the order of the outputs, or a JSON list"
        )
    return labels


def as_in_file(index: ImageIndex, labels: Labels) -> ImageIndex:
    """The index with its classes numbered as a file's outputs; classes of the file without images are classes, too.

    Raises FgvcError for a class that the file does not know, with the nearest that it does."""
    if unknown := sorted(set(index.classes) - set(labels.names)):
        hints = [f"{name!r}" + "".join(f" (nearest: {near!r})" for near in nearest(name, labels.names)) for name in unknown]
        raise FgvcError(
            f"the data have {len(unknown)} of {len(index.classes)} classes that the file does not know: {some(hints, 5)}; it has "
            f"{len(labels.names)}, by {labels.source}: {some(labels.names, 3)}. Rename them, leave them out, or give the right "
            "names in deploy.labels. (model.classes=change makes a new last layer for other classes: no drop-in)"
        )
    absent = len(labels.names) - len(index.classes)
    remark = f"; {absent} of the file's {len(labels.names)} classes have no images" if absent else ""
    return replace(_renumbered(index, labels.names), recognised=index.recognised + remark)


def first_classes(index: ImageIndex, count: int) -> ImageIndex:
    """The index of the images of the first `count` classes, with the same splits. Raises FgvcError if there are fewer classes."""
    if count > len(index.classes):
        raise FgvcError(f"data.first_classes: {count}, and the data have {len(index.classes)}")
    mask = index.labels < count
    names = ("paths", "labels", "splits", "groups", "boxes", "parts")
    columns = {name: column[mask] for name in names if (column := getattr(index, name)) is not None}
    recognised = f"{index.recognised}; the first {count} classes: {mask.sum()} images"
    return replace(index, classes=index.classes[:count], recognised=recognised, **columns)
