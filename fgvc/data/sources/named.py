"""Fine-grained sets that torchvision knows by name: it downloads, checks and reads their lists; the images stay files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.data import SPLITS, Name, NamedData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import StringColumn, finish_splits, number_classes
from fgvc.errors import FgvcError

# torchvision's class, its parts, and the folder that it makes below root.
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
    """Read torchvision's lists. Raises FgvcError where the set is not there, and says how to get it."""
    if data.download:
        data.root.expanduser().mkdir(parents=True, exist_ok=True)
    root = data.folder()
    paths, labels, splits = StringColumn(), [], []
    names: list[str] = []
    for part, split in _SETS[data.name][1].items():
        found = _open(data, root, part)
        files, own = _rows(found)
        paths.extend([Path(os.path.relpath(file, root)).as_posix() for file in files])
        labels.append(np.array(own, np.int32))
        splits.append(np.full(len(own), SPLITS.index(split), np.int8))
        names = [str(name) for name in getattr(found, "classes", [])] or names
    numbers = np.concatenate(labels)
    names = names or [f"{number + 1:03d}" for number in range(int(numbers.max(initial=-1)) + 1)]
    classes, order = number_classes(names, data.classes, where=root)
    numbers = order[numbers]
    carved, rule = finish_splits(data, numbers, np.concatenate(splits))
    return ImageIndex(
        root=root,
        classes=classes,
        paths=paths.array(),
        labels=numbers,
        splits=carved,
        max_pixels=data.max_pixels,
        recognised=f"torchvision's {_SETS[data.name][0]}: {len(numbers)} images, {len(classes)} classes; {rule}",
    )


def _open(data: NamedData, root: Path, part: str) -> Any:
    from torchvision import datasets

    kind, _, folder = _SETS[data.name]
    cars = data.name == "stanford_cars"
    try:
        return getattr(datasets, kind)(root, split=part, download=data.download and not cars)
    except Exception as error:  # torchvision, urllib and scipy raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = _CARS.format(folder=root / folder) if cars else "download it with data.download=true"
        if data.download and not cars:
            hint = f"without a network, copy the set to {root / folder}"
        raise FgvcError(f"{root}: {data.name}, part {part}: {reason}; {hint}") from error


def _rows(found: Any) -> tuple[list[str], list[int]]:
    """Files and class numbers, where each of torchvision's classes keeps them."""
    if hasattr(found, "_samples"):
        return [str(file) for file, _ in found._samples], [int(label) for _, label in found._samples]
    files = found._images if hasattr(found, "_images") else found._image_files
    return [str(file) for file in files], [int(label) for label in found._labels]
