"""Which classes there are, and in which order: the label order of a deployed stack, and parts of a set for quick studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.runtime.bundle import read_labels


def reordered(index: ImageIndex, path: Path) -> ImageIndex:
    """The same images with the classes numbered as in the file: see `fgvc.runtime.bundle.read_labels`.

    Raises FgvcError where the file's classes are not exactly the data's.
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
    position = {name: number for number, name in enumerate(names)}
    order = np.array([position[name] for name in index.classes], dtype=np.int32)
    return replace(index, classes=names, labels=order[index.labels])


def first(index: ImageIndex, count: int) -> ImageIndex:
    """The images of the first `count` classes; the splits stay as they are. Raises FgvcError where there are fewer classes."""
    if count > len(index.classes):
        raise FgvcError(f"data.first_classes: {count}, and the data have {len(index.classes)}")
    kept = index.labels < count
    columns = ("paths", "labels", "splits", "groups", "boxes", "parts")
    changed = {name: column[kept] for name in columns if (column := getattr(index, name)) is not None}
    said = f"{index.recognised}; the first {count} classes: {kept.sum()} images"
    return replace(index, classes=index.classes[:count], recognised=said, **changed)
