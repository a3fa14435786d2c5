"""Fine-grained sets of torchvision, which downloads, checks and lists them; the images stay files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.data import SPLITS, Name, NamedData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import StringColumn, finish_splits, given_splits, number_classes
from fgvc.errors import FgvcError

# torchvision's class, its splits (theirs -> ours), and the folder that it makes below root.
_SETS: dict[Name, tuple[str, dict[str, Split], str]] = {
    "flowers102": ("Flowers102", {"train": "train", "val": "val", "test": "test"}, "flowers-102"),
    "oxford_pets": ("OxfordIIITPet", {"trainval": "train", "test": "test"}, "oxford-iiit-pet"),
    "aircraft": ("FGVCAircraft", {"train": "train", "val": "val", "test": "test"}, "fgvc-aircraft-2013b"),
    "stanford_cars": ("StanfordCars", {"train": "train", "test": "test"}, "stanford_cars"),
}
_CARS = (
    "its download is gone; from a copy of your own, put cars_train/, cars_test/, devkit/ and "
    "cars_test_annos_withlabels.mat into {folder}"
)

def read(data: NamedData) -> ImageIndex:
    """Read torchvision's lists. Raises FgvcError that says how to get the set if it is missing."""
    if data.download:
        data.root.expanduser().mkdir(parents=True, exist_ok=True)
    root = data.folder()
    paths, labels, splits = StringColumn(), [], []
    names: list[str] = []
    for theirs, split in _SETS[data.name][1].items():
        dataset = _open(data, root, theirs)
        files, numbers = _rows(dataset)
        paths.extend([Path(os.path.relpath(file, root)).as_posix() for file in files])
        labels.append(np.array(numbers, np.int32))
        splits.append(np.full(len(numbers), SPLITS.index(split), np.int8))
        names = [str(name) for name in getattr(dataset, "classes", [])] or names
    column = np.concatenate(labels)
    names = names or [f"{number + 1:03d}" for number in range(int(column.max(initial=-1)) + 1)]
    classes, order = number_classes(names, data.classes, where=root)
    column = order[column]
    given = given_splits(data, np.concatenate(splits))
    carved, rule = finish_splits(data, column, np.concatenate(splits))
    return ImageIndex(
        root=root,
        classes=classes,
        paths=paths.array(),
        labels=column,
        splits=carved,
        given_splits=given,
        max_pixels=data.max_pixels,
        recognised=f"torchvision's {_SETS[data.name][0]}: {len(column)} images, {len(classes)} classes; {rule}",
    )


def _open(data: NamedData, root: Path, split: str) -> Any:
    from torchvision import datasets

    kind, _, folder = _SETS[data.name]
    cars = data.name == "stanford_cars"
    try:
        return getattr(datasets, kind)(root, split=split, download=data.download and not cars)
    except Exception as error:  # torchvision, urllib and scipy raise all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = _CARS.format(folder=root / folder) if cars else "download it with data.download=true"
        if data.download and not cars:
            hint = f"without a network, copy the set to {root / folder}"
        raise FgvcError(f"{root}: {data.name}, split {split}: {reason}; {hint}") from error


def _rows(dataset: Any) -> tuple[list[str], list[int]]:
    """Files and class numbers of one of torchvision's datasets, whose classes keep them in different attributes."""
    if hasattr(dataset, "_samples"):
        return [str(file) for file, _ in dataset._samples], [int(label) for _, label in dataset._samples]
    files = dataset._images if hasattr(dataset, "_images") else dataset._image_files
    return [str(file) for file in files], [int(label) for label in dataset._labels]
