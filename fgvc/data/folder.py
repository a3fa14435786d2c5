"""Folders of images, one per class: split already (train/, val/, test/), or all in one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from fgvc.data.source import PART_NAMES, Source, Strings, finish_splits, number_classes, some
from fgvc.image.decode import SUFFIXES
from fgvc.types import SPLITS, FgvcError, ImageIndex, Split


class FolderData(Source):
    """train/<class>/..., with val/ (or valid/, validation/) and test/ beside it; or <class>/... straight away.

    Images in folders below a class belong to the class. Hidden files and files of other types are left out.
    """

    kind: Literal["folder"] = "folder"
    test_fraction: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="share of all images set aside for test where the classes lie in one folder; 0: none",
    )

    def read(self) -> ImageIndex:
        """List the images. Raises FgvcError where the layout isn't one of the two, or a part has classes of its own."""
        root = self.folder()
        parts = _parts(root)
        paths, others = Strings(), 0
        counts: dict[tuple[str, str], int] = {}  # (folder of the part or "", class): images
        for part in parts or [""]:
            for name in _folders(root / part):
                before = len(paths)
                for files, rest in _walk(str(root), f"{part}/{name}" if part else name):
                    paths.extend(files)
                    others += rest
                counts[part, name] = len(paths) - before
        found = _classes(root, counts, self.classes)
        classes, order = number_classes(found, self.classes, where=root)
        number = dict(zip(found, order.tolist(), strict=True))
        size = list(counts.values())
        labels = np.repeat(np.array([number.get(name, 0) for _, name in counts], np.int32), size)
        splits = np.repeat(np.array([SPLITS.index(parts.get(part, "train")) for part, _ in counts], np.int8), size)
        layout = (
            f"class folders in {', '.join(f'{name}/' for name in parts)}" if parts else "one folder of class folders"
        )
        splits, rule = finish_splits(self, labels, splits, test_fraction=0 if parts else self.test_fraction)
        empty = sorted({name for _, name in counts} - set(found))
        notes = [f"class folders without an image, left out: {some(empty)}"] if empty else []
        notes += [f"{others} other files left out"] if others else []
        return ImageIndex(
            root=root,
            classes=classes,
            paths=paths.array(),
            labels=labels,
            splits=splits,
            recognised="; ".join([f"{layout}: {len(labels)} images, {len(classes)} classes", rule, *notes]),
        )


def _parts(root: Path) -> dict[str, Split]:
    """The split of each split folder, in the order of SPLITS; empty where the classes lie in root itself."""
    folders = _folders(root)
    if not folders:
        raise FgvcError(f"{root}: no folders in it; expected train/ val/ test/, or one folder per class")
    named = sorted((name for name in folders if name in PART_NAMES), key=lambda name: SPLITS.index(PART_NAMES[name]))
    # A class may be called "train" (beside "bus" and "car"): then it holds images, not folders.
    if not any(_folders(root / name) for name in named):
        return {}
    listed = ", ".join(f"{name}/" for name in named)
    if "train" not in named:
        raise FgvcError(f"{root}: has {listed} but no train/; add it, or rename the class folder")
    if len({PART_NAMES[name] for name in named}) < len(named):
        raise FgvcError(f"{root}: has {listed}: two names for one part; keep one")
    alien = [f"{name}/" for name in folders if name not in PART_NAMES]
    if alien:
        raise FgvcError(f"{root}: has {listed} and also {some(alien)}; move what is no part of the set elsewhere")
    return {name: PART_NAMES[name] for name in named}


def _classes(root: Path, counts: dict[tuple[str, str], int], wanted: list[str] | None) -> list[str]:
    """Sorted names of the classes that have images. With parts, train/ must have all of them."""
    found = sorted({name for (_, name), count in counts.items() if count})
    trained = {name for (part, name), count in counts.items() if count and PART_NAMES.get(part, "train") == "train"}
    for part in dict.fromkeys(part for part, _ in counts):
        own = sorted(name for (p, name), count in counts.items() if p == part and count and name not in trained)
        if own:
            raise FgvcError(f"{root / part}: classes that train/ has no images of: {some(own)}; add or remove them")
    return found


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _walk(root: str, folder: str) -> Iterator[tuple[list[str], int]]:
    """For a folder and all below it: the images' paths relative to root, sorted, and how many other files there are.

    One directory listing each and no `stat` of files, which is what makes a million of them affordable.
    """
    waiting, seen = [folder], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(f"{root}/{folder}")
        if real in seen:  # a link to a folder above
            continue
        seen.add(real)
        images, below, others = [], [], 0
        with os.scandir(f"{root}/{folder}") as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    below.append(f"{folder}/{entry.name}")
                elif entry.name.lower().endswith(SUFFIXES):
                    images.append(f"{folder}/{entry.name}")
                else:
                    others += 1
        waiting += sorted(below, reverse=True)
        images.sort()
        yield images, others
