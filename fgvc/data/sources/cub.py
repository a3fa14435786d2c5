"""Reader of CUB-200-2011's layout: tables of numbered images, with an official split, boxes and parts.

Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 Dataset, CNS-TR-2011-001.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fgvc.config.data import SPLITS, CubData
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import TEXT, finish_splits, given_splits, number_classes, repeated
from fgvc.errors import FgvcError
from fgvc.io.names import some


def read(data: CubData) -> ImageIndex:
    """Read the tables. Raises FgvcError with file and line of a malformed row, or with the missing ids."""
    root = data.folder()
    if not (root / "images.txt").is_file() and (root / "CUB_200_2011" / "images.txt").is_file():
        raise FgvcError(f"{root}: the set lies in its folder CUB_200_2011; set data.root={root / 'CUB_200_2011'}")
    row_of, paths = _numbered(root / "images.txt")
    class_of, names = _numbered(root / "classes.txt")
    classes, order = number_classes(names, data.classes, where=root / "classes.txt")
    labels = order[_references(root / "image_class_labels.txt", row_of, class_of, "a class of classes.txt")]
    train = _references(root / "train_test_split.txt", row_of, {0: 0, 1: 1}, "1 (train) or 0 (test)")
    splits = np.where(train == 1, SPLITS.index("train"), SPLITS.index("test")).astype(np.int8)
    given = given_splits(data, splits)
    splits, rule = finish_splits(data, labels, splits)
    boxes, parts = None, None
    part_names: tuple[str, ...] = ()
    if (root / "bounding_boxes.txt").is_file():
        boxes = _numbers(root / "bounding_boxes.txt", row_of, None, 4)[:, 0]
    if (root / "parts" / "part_locs.txt").is_file():
        part_of, part_list = _numbered(root / "parts" / "parts.txt")
        parts, part_names = _numbers(root / "parts" / "part_locs.txt", row_of, part_of, 3), tuple(part_list)
    contents = [f"{len(paths)} images", f"{len(classes)} classes"]
    contents += ["boxes"] * (boxes is not None) + [f"{len(part_names)} parts"] * (parts is not None)
    files = np.array([f"images/{path}" for path in paths], dtype=TEXT)
    return ImageIndex(
        root=root,
        classes=classes,
        paths=files,
        labels=labels.astype(np.int32),
        splits=splits,
        given_splits=given,
        max_pixels=data.max_pixels,
        boxes=boxes,
        parts=parts,
        part_names=part_names,
        recognised=f"CUB layout: {', '.join(contents)}; official test split kept; {rule}",
        warnings=repeated(root, files, labels, splits, classes),
    )


def _lines(file: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every line that isn't blank; the last field may hold spaces."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                fields = line.split(maxsplit=columns - 1)
                if not fields:
                    continue
                if len(fields) != columns:
                    raise FgvcError(f"{file}:{number}: {len(fields)} fields, {columns} expected: {line.strip()[:80]!r}")
                fields[-1] = fields[-1].rstrip()
                yield number, fields
    except FileNotFoundError:
        raise FgvcError(f"{file}: not there, but the CUB layout needs it") from None
    except OSError as error:
        raise FgvcError(f"{file}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FgvcError(f"{file}: is not UTF-8 text (byte {error.start})") from error


def _whole(text: str, file: Path, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise FgvcError(f"{file}:{line}: {text!r} is not a whole number") from None


def _numbered(file: Path) -> tuple[dict[int, int], list[str]]:
    """Read a table `id text`: the row of every id, and the texts."""
    row_of: dict[int, int] = {}
    texts: list[str] = []
    for line, (number, text) in _lines(file, 2):
        if row_of.setdefault(_whole(number, file, line), len(texts)) != len(texts):
            raise FgvcError(f"{file}:{line}: id {number} occurs a second time")
        texts.append(text)
    if not texts:
        raise FgvcError(f"{file}: is empty")
    return row_of, texts


def _references(file: Path, row_of: dict[int, int], target_of: dict[int, int], expected: str) -> np.ndarray:
    """Read a table `image-id id`: (N,) int64, the row in another table that each image refers to."""
    rows = np.full(len(row_of), -1, np.int64)
    for line, (number, target) in _lines(file, 2):
        row = _image_row(number, row_of, file, line)
        if rows[row] >= 0:
            raise FgvcError(f"{file}:{line}: image id {number} occurs a second time")
        value = target_of.get(_whole(target, file, line))
        if value is None:
            raise FgvcError(f"{file}:{line}: {target} is not {expected}")
        rows[row] = value
    _complete(rows >= 0, list(row_of), file)
    return rows


def _numbers(file: Path, row_of: dict[int, int], part_of: dict[int, int] | None, width: int) -> np.ndarray:
    """Read a table `image-id [part-id] number...`: (N, parts or 1, width) float32."""
    table = np.full((len(row_of), len(part_of) if part_of else 1, width), np.nan, np.float32)
    for line, fields in _lines(file, 1 + width + (part_of is not None)):
        row, part = _image_row(fields[0], row_of, file, line), 0
        if part_of is not None:
            number = part_of.get(_whole(fields[1], file, line))
            if number is None:
                raise FgvcError(f"{file}:{line}: part id {fields[1]} is not in parts.txt")
            part = number
        try:
            values = [float(field) for field in fields[-width:]]
        except ValueError:
            raise FgvcError(f"{file}:{line}: {width} numbers expected, found {' '.join(fields[-width:])!r}") from None
        if not all(map(np.isfinite, values)):
            raise FgvcError(f"{file}:{line}: {' '.join(fields[-width:])!r} is not finite")
        if not np.isnan(table[row, part, 0]):
            raise FgvcError(
                f"{file}:{line}: image id {fields[0]} occurs a second time"
                + (f" for part {fields[1]}" * (part_of is not None))
            )
        table[row, part] = values
    _complete(np.all(~np.isnan(table[:, :, 0]), axis=1), list(row_of), file)
    return table


def _image_row(number: str, row_of: dict[int, int], file: Path, line: int) -> int:
    row = row_of.get(_whole(number, file, line))
    if row is None:
        raise FgvcError(f"{file}:{line}: image id {number} is not in images.txt")
    return row


def _complete(present: np.ndarray, ids: list[int], file: Path) -> None:
    missing = [ids[row] for row in np.flatnonzero(~present)]
    if missing:
        raise FgvcError(f"{file}: lacks {len(missing)} of the ids in images.txt: {some(missing)}")
