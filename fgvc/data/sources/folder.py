"""Folders of images, one per class: split already (train/, val/, test/), or all in one."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from fgvc.config.data import SPLITS, FolderData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import StringColumn, finish_splits, number_classes, part_of, written_alike
from fgvc.data.sources.walk import ClassFolder, Walk, folders_in, loose_images
from fgvc.errors import FgvcError
from fgvc.images.suffix import counted
from fgvc.io.names import natural_key, some


def read(data: FolderData) -> ImageIndex:
    """List the images. Raises FgvcError where the layout isn't one of the two, a part has classes of its own, the files of a
    class are all of other types, or two classes are the same files."""
    root = data.folder()
    parts = _parts(root)
    places = [ClassFolder(root, part, name) for part in parts or [""] for name in folders_in(root / part)]
    if not parts and len(places) > 1:
        _refuse_parts_in_classes(root, places)
    if data.classes is None:
        for part in parts or [""]:
            _refuse_parts_as_classes(root / part, [place for place in places if place.part == part])
    walk = Walk(places)
    paths = StringColumn()
    counts: dict[tuple[str, str], int] = {}  # (folder of the part or "", class): images
    others: Counter[str] = Counter()
    empty: dict[str, Counter[str]] = {}
    for place in places:
        before, dropped = len(paths), Counter[str]()
        for files, rest in walk.images(place):
            paths.extend(files)
            dropped += rest
        counts[place.part, place.name] = len(paths) - before
        others += dropped
        if dropped and len(paths) == before:
            empty[str(place)] = dropped
    if empty:
        listed = some([f"{name}/ ({counted(dropped)})" for name, dropped in empty.items()])
        raise FgvcError(
            f"{root}: {len(empty)} class folders would end empty, since all their files are of other types than fgvc reads: "
            f"{listed}; save these as JPEG or PNG, or move what is no class out of {root}"
        )
    walk.refuse_shared()
    found = _classes(root, counts, parts, data.classes)
    classes, order = number_classes(found, data.classes, where=root)
    number = dict(zip(found, order.tolist(), strict=True))
    size = list(counts.values())
    labels = np.repeat(np.array([number.get(name, 0) for _, name in counts], np.int32), size)
    splits = np.repeat(np.array([SPLITS.index(parts.get(part, "train")) for part, _ in counts], np.int8), size)
    layout = (
        f"class folders in {', '.join(f'{name}/' for name in parts)}" if parts else "one folder of class folders"
    )
    names = paths.array()
    groups = None if data.group_size is None else _runs(names, counts, data.group_size)
    test_fraction = 0 if parts else data.test_fraction
    splits, rule = finish_splits(data, labels, splits, test_fraction=test_fraction, groups=groups)
    if tables := tables_in(root):
        rule += f"; {some(tables, 3)} beside them: not read"
    without = sorted({name for _, name in counts} - set(found))
    return ImageIndex(
        root=root,
        classes=classes,
        paths=names,
        labels=labels,
        splits=splits,
        groups=groups,
        max_pixels=data.max_pixels,
        recognised=f"{layout}: {len(labels)} images, {len(classes)} classes; {rule}",
        warnings=(*written_alike(classes), *_left_out(root, parts, without, others, walk)),
    )


def tables_in(root: Path) -> list[str]:
    """Names of the CSV and TSV files in a folder, sorted."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return sorted(name for name in names if name.lower().endswith((".csv", ".tsv")))


def _runs(paths: np.ndarray, counts: dict[tuple[str, str], int], size: int) -> np.ndarray:
    """(N,) the group of each image: of the `counts` images of a part and class, which follow one another in `paths`, each `size`
    in the order of the numbers in their names."""
    groups, start = StringColumn(), 0
    for (part, name), count in counts.items():
        own = paths[start : start + count].tolist()
        rank = np.argsort(np.array(sorted(range(count), key=lambda row: natural_key(own[row])), np.int64))
        groups.extend([f"{part}/{name}/{place // size}" for place in rank.tolist()])
        start += count
    return groups.array()


def _left_out(root: Path, parts: dict[str, Split], without: list[str], others: Counter[str], walk: Walk) -> list[str]:
    """What people should know of that is no part of the set."""
    found = [f"class folders without an image, left out: {some(without)}"] if without else []
    if others:
        found.append(f"{others.total()} files are of other types than fgvc reads, and left out: {counted(others)}")
    for folder in (root, *(root / part for part in parts)):
        if count := loose_images(folder):
            found.append(f"{folder}: {count} images lie in it and in no class folder; they are left out")
    return found + walk.warnings()


def _parts(root: Path) -> dict[str, Split]:
    """The split of each split folder, in the order of SPLITS; empty where the classes lie in root itself."""
    folders = folders_in(root)
    if not folders:
        raise FgvcError(f"{root}: no folders in it; expected train/ val/ test/, or one folder per class")
    split_of = {name: part for name in folders if (part := part_of(name)) is not None}
    named = sorted(split_of, key=lambda name: SPLITS.index(split_of[name]))
    # A class may be called "train" (beside "bus" and "car"): then it holds images, not folders.
    if not any(folders_in(root / name) for name in named):
        return {}
    listed = ", ".join(f"{name}/" for name in named)
    if "train" not in split_of.values():
        raise FgvcError(f"{root}: has {listed} but no train/; add it, or rename the class folder")
    if len(set(split_of.values())) < len(named):
        raise FgvcError(f"{root}: has {listed}: two names for one part; keep one")
    alien = [f"{name}/" for name in folders if name not in split_of]
    if alien:
        raise FgvcError(f"{root}: has {listed} and also {some(alien)}; move what is no part of the set elsewhere")
    return {name: split_of[name] for name in named}


def _refuse_parts_in_classes(root: Path, places: list[ClassFolder]) -> None:
    """Raise FgvcError for <class>/train/ and <class>/test/, which would be mixed, and drawn anew."""
    for place in places:
        split_of = {name: part_of(name) for name in folders_in(Path(place.path))}
        if "train" in split_of.values() and len(set(split_of.values()) - {None}) > 1:
            inside = ", ".join(f"{place.name}/{name}/" for name, part in split_of.items() if part is not None)
            raise FgvcError(
                f"{root}: has the parts within its classes ({inside}); fgvc reads train/<class>/ and test/<class>/: move the "
                "folders, or list the images in a table with a column for the split (data.kind=csv); where these are variants of "
                f"a set, set data.root={place.path} to learn from one of them"
            )


def _refuse_parts_as_classes(folder: Path, places: list[ClassFolder]) -> None:
    """Raise FgvcError where what lies in `folder` looks like parts or variants of a set (color/, grayscale/) and not like its
    classes: none holds an image itself, and the folders below have the same names."""
    below = [set(folders_in(Path(place.path))) for place in places]
    if not places or not all(below) or any(loose_images(Path(place.path)) for place in places):
        return
    listed, common = some([f"{place.name}/" for place in places]), set.intersection(*below)
    if len(places) == 1:
        raise FgvcError(
            f"{folder}: its only folder {listed} holds no image but the folders {some(sorted(common))}: if these are "
            f"the classes, set data.root={places[0].path}"
        )
    if 2 * len(common) < len(set.union(*below)):
        return
    names = ", ".join(place.name for place in places)
    raise FgvcError(
        f"{folder}: {listed} hold no image themselves, and have folders of the same names ({some(sorted(common))}): are they "
        f"parts or variants of one set? Set data.root={places[0].path} to learn from one of them; name parts train/, val/ and "
        f"test/; or, if they are the classes all the same, say so by data.classes=[{names}]"
    )


def _classes(
    root: Path, counts: dict[tuple[str, str], int], parts: dict[str, Split], wanted: list[str] | None
) -> list[str]:
    """Sorted names of the classes that have images. With parts, train/ must have all of them."""
    found = sorted({name for (_, name), count in counts.items() if count})
    trained = {name for (part, name), count in counts.items() if count and parts.get(part, "train") == "train"}
    for part in dict.fromkeys(part for part, _ in counts):
        own = sorted(name for (p, name), count in counts.items() if p == part and count and name not in trained)
        if own:
            raise FgvcError(f"{root / part}: classes that train/ has no images of: {some(own)}; add or remove them")
    return found
