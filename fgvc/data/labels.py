"""Changes of a set's classes: the label order of a deployed stack, and the first classes only, for quick studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.runtime.bundle import read_labels


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
    position = {name: number for number, name in enumerate(names)}
    order = np.array([position[name] for name in index.classes], dtype=np.int32)
    return replace(index, classes=names, labels=order[index.labels])


def first_classes(index: ImageIndex, count: int) -> ImageIndex:
    """The index of the images of the first `count` classes, with the same splits. Raises FgvcError if there are fewer classes."""
    if count > len(index.classes):
        raise FgvcError(f"data.first_classes: {count}, and the data have {len(index.classes)}")
    mask = index.labels < count
    names = ("paths", "labels", "splits", "groups", "boxes", "parts")
    columns = {name: column[mask] for name in names if (column := getattr(index, name)) is not None}
    recognised = f"{index.recognised}; the first {count} classes: {mask.sum()} images"
    return replace(index, classes=index.classes[:count], recognised=recognised, **columns)
