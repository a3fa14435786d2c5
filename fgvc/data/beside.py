"""Images of a second folder beside a set: those that a deployed classifier was not trained on, collected later than the set."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.data import SPLITS, AutoData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.read import read_source, resolved
from fgvc.errors import FgvcError
from fgvc.io.names import nearest, some


def read_folder(folder: Path, *, max_pixels: int | None = None) -> ImageIndex:
    """The labelled images of a folder or table as it is: splits are those that it brings along, and none is drawn. Raises
    FgvcError as `read_source` does."""
    data = resolved(AutoData(root=folder, val_fraction=0.0))
    update = {"test_fraction": 0.0} if "test_fraction" in type(data).model_fields else {}
    index = read_source(data.model_copy(update=update))
    return index if max_pixels is None else replace(index, max_pixels=max_pixels)


def with_folder(index: ImageIndex, folder: Path, *, where: str = "deploy.unseen") -> ImageIndex:
    """The index with the images of a folder as (more of) its test split, which the set then brings along; one that fgvc has drawn
    is learned from. `where`: what names the folder, for messages.

    Their paths lead out of the set's root ("../new/oak/1.jpg"), so that both may be moved together. Raises FgvcError where the
    folder can't be read, lies in the set, or has a class that the set has not.
    """
    if index.contents is not None:
        raise FgvcError(f"{where}: {folder}: is for sets of files, and the images of {index.root} are in tables")
    root, place = index.root.resolve(), folder.expanduser().resolve()
    if place == root or root in place.parents or place in root.parents:
        raise FgvcError(f"{where}: {folder}: lies in {index.root}, or around it: give a folder of its own beside that")
    other = read_folder(folder.expanduser())
    if unknown := sorted(set(other.classes) - set(index.classes)):
        hints = [f"{name!r}" + "".join(f" (nearest: {near!r})" for near in nearest(name, index.classes)) for name in unknown]
        raise FgvcError(f"{where}: {folder}: has classes that {index.root} has not: {some(hints, 5)}; rename or remove them")
    numbers = np.array([index.classes.index(name) for name in other.classes], np.int32)
    prefix = Path(os.path.relpath(other.root.resolve(), root)).as_posix()
    paths = np.array([f"{prefix}/{name}" for name in other.paths.tolist()], dtype=np.dtypes.StringDType())
    splits, test = index.splits.copy(), SPLITS.index("test")
    if "test" not in index.given_splits:
        splits[splits == test] = SPLITS.index("train")
    columns: dict[str, Any] = {}
    if index.groups is not None or other.groups is not None:
        groups = [np.full(len(each), "", dtype=np.dtypes.StringDType()) if each.groups is None else each.groups
                  for each in (index, other)]  # fmt: skip
        columns["groups"] = np.concatenate(groups)
    for name in ("boxes", "parts"):  # of the set; what lies beside it has none
        if (column := getattr(index, name)) is not None:
            columns[name] = np.concatenate([column, np.full((len(other), *column.shape[1:]), np.nan, column.dtype)])
    own: tuple[Split, ...] = ("val", "test")
    return replace(
        index,
        paths=np.concatenate([index.paths, paths]),
        labels=np.concatenate([index.labels, numbers[other.labels]]),
        splits=np.concatenate([splits, np.full(len(other), test, np.int8)]),
        given_splits=tuple(name for name in own if name == "test" or name in index.given_splits),
        recognised=f"{index.recognised}; {len(other)} images of {folder} are of the test split",
        warnings=(*index.warnings, *other.warnings),
        **columns,
    )
