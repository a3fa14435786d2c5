"""Reader of class folders: within split folders (train/, val/, test/), or all in one folder."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np

from fgvc.config.data import SPLITS, FolderData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import (
    StringColumn,
    finish_splits,
    given_splits,
    number_classes,
    split_named,
    written_alike,
)
from fgvc.data.sources.walk import ClassFolder, Walk, folders_in, loose_images
from fgvc.errors import FgvcError
from fgvc.images.suffix import counted
from fgvc.io.names import natural_key, some


def read(data: FolderData) -> ImageIndex:
    """List the images. Raises FgvcError if the layout is neither of the two, another split has classes that train/ lacks, all
    files of a class are of other types, or two classes share files."""
    root = data.folder()
    split_folders = _split_folders(root)
    places = [ClassFolder(root, above, name) for above in split_folders or [""] for name in folders_in(root / above)]
    if not split_folders and len(places) > 1:
        _refuse_splits_in_classes(root, places)
    if data.classes is None:
        for above in split_folders or [""]:
            _refuse_variants_as_classes(root / above, [place for place in places if place.split_folder == above])
    walk = Walk(places)
    paths = StringColumn()
    counts: dict[tuple[str, str], int] = {}  # (split folder or "", class): images
    others: Counter[str] = Counter()
    empty: dict[str, Counter[str]] = {}
    for place in places:
        before, dropped = len(paths), Counter[str]()
        for files, rest in walk.images(place):
            paths.extend(files)
            dropped += rest
        counts[place.split_folder, place.name] = len(paths) - before
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
    nonempty = _classes(root, counts, split_folders)
    classes, order = number_classes(nonempty, data.classes, where=root)
    number = dict(zip(nonempty, order.tolist(), strict=True))
    size = list(counts.values())
    labels = np.repeat(np.array([number.get(name, 0) for _, name in counts], np.int32), size)
    splits = np.repeat(np.array([SPLITS.index(split_folders.get(above, "train")) for above, _ in counts], np.int8), size)
    layout = "one folder of class folders"
    if split_folders:
        layout = f"class folders in {', '.join(f'{name}/' for name in split_folders)}"
    names = paths.array()
    groups = None if data.group_size is None else _runs(names, counts, data.group_size)
    test_fraction = 0 if split_folders else data.test_fraction
    given = given_splits(data, splits)
    splits, rule = finish_splits(data, labels, splits, test_fraction=test_fraction, groups=groups)
    if tables := tables_in(root):
        rule += f"; {some(tables, 3)} beside them: not read"
    without = sorted({name for _, name in counts} - set(nonempty))
    return ImageIndex(
        root=root,
        classes=classes,
        paths=names,
        labels=labels,
        splits=splits,
        given_splits=given,
        groups=groups,
        max_pixels=data.max_pixels,
        recognised=f"{layout}: {len(labels)} images, {len(classes)} classes; {rule}",
        warnings=(*written_alike(classes), *_left_out(root, split_folders, without, others, walk)),
    )


def tables_in(root: Path) -> list[str]:
    """Names of the CSV and TSV files in a folder, sorted."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    return sorted(name for name in names if name.lower().endswith((".csv", ".tsv")))


def _runs(paths: np.ndarray, counts: dict[tuple[str, str], int], size: int) -> np.ndarray:
    """The group of each image, (N,): each `size` images of a split folder and class, by the numbers in their names, are a group.
    `counts` images of a split folder and class follow one another in `paths`."""
    groups, start = StringColumn(), 0
    for (above, name), count in counts.items():
        files = paths[start : start + count].tolist()
        rank = np.argsort(np.array(sorted(range(count), key=lambda row: natural_key(files[row])), np.int64))
        groups.extend([f"{above}/{name}/{place // size}" for place in rank.tolist()])
        start += count
    return groups.array()


def _left_out(
    root: Path, split_folders: dict[str, Split], without: list[str], others: Counter[str], walk: Walk
) -> list[str]:
    """Warnings of folders and files that are left out of the set."""
    warnings = [f"class folders without an image, left out: {some(without)}"] if without else []
    if others:
        warnings.append(f"{others.total()} files are of other types than fgvc reads, and left out: {counted(others)}")
    for folder in (root, *(root / above for above in split_folders)):
        if count := loose_images(folder):
            warnings.append(f"{folder}: {count} images lie in it and in no class folder; they are left out")
    return warnings + walk.warnings()


def _split_folders(root: Path) -> dict[str, Split]:
    """The split folders and their splits, in the order of SPLITS; empty if the classes lie in root itself."""
    folders = folders_in(root)
    if not folders:
        raise FgvcError(f"{root}: no folders in it; expected train/ val/ test/, or one folder per class")
    split_of = {name: split for name in folders if (split := split_named(name)) is not None}
    named = sorted(split_of, key=lambda name: SPLITS.index(split_of[name]))
    # A class may be called "train" (beside "bus" and "car"): then it holds images, not folders.
    if not any(folders_in(root / name) for name in named):
        return {}
    listed = ", ".join(f"{name}/" for name in named)
    if "train" not in split_of.values():
        raise FgvcError(f"{root}: has {listed} but no train/; add it, or rename the class folder")
    if len(set(split_of.values())) < len(named):
        raise FgvcError(f"{root}: has {listed}: two names for one split; keep one")
    alien = [f"{name}/" for name in folders if name not in split_of]
    if alien:
        raise FgvcError(f"{root}: has {listed} and also {some(alien)}; move what does not belong to the set elsewhere")
    return {name: split_of[name] for name in named}


def _refuse_splits_in_classes(root: Path, places: list[ClassFolder]) -> None:
    """Raise FgvcError for <class>/train/ and <class>/test/, which would be mixed and split anew."""
    for place in places:
        split_of = {name: split_named(name) for name in folders_in(Path(place.path))}
        if "train" in split_of.values() and len(set(split_of.values()) - {None}) > 1:
            inside = ", ".join(f"{place.name}/{name}/" for name, split in split_of.items() if split is not None)
            raise FgvcError(
                f"{root}: has split folders within its classes ({inside}); fgvc reads train/<class>/ and test/<class>/: move the "
                "folders, or list the images in a table with a column for the split (data.kind=csv); where these are variants of "
                f"a set, set data.root={place.path} to learn from one of them"
            )


def _refuse_variants_as_classes(folder: Path, places: list[ClassFolder]) -> None:
    """Raise FgvcError if the folders in `folder` look like splits or variants of a set (color/, grayscale/), not like classes:
    none holds an image itself, and the folders below them have the same names."""
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
        f"splits or variants of one set? Set data.root={places[0].path} to learn from one of them; name splits train/, val/ and "
        f"test/; or, if they are the classes all the same, say so by data.classes=[{names}]"
    )


def _classes(root: Path, counts: dict[tuple[str, str], int], split_folders: dict[str, Split]) -> list[str]:
    """Sorted names of the classes with images. Raises FgvcError if another split has classes that train/ lacks."""
    trained = {name for (above, name), count in counts.items() if count and split_folders.get(above, "train") == "train"}
    for above in dict.fromkeys(above for above, _ in counts):
        untrained = sorted(name for (a, name), count in counts.items() if a == above and count and name not in trained)
        if untrained:
            raise FgvcError(f"{root / above}: classes that train/ has no images of: {some(untrained)}; add or remove them")
    return sorted({name for (_, name), count in counts.items() if count})
