"""Reader of a CSV file of images: path, label and optionally split and group."""

from __future__ import annotations

import codecs
import csv
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.data import SPLITS, CsvData
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import (
    StringColumn,
    finish_splits,
    given_splits,
    number_classes,
    repeated,
    split_named,
    written_alike,
)
from fgvc.data.splits import straddling
from fgvc.errors import FgvcError
from fgvc.io.names import some

ENCODINGS = ("utf-8-sig", "gb18030", "cp1252", "latin-1")  # tried in this order; the last one reads any bytes
_COLUMNS = ("path", "label", "split", "group")

def read(data: CsvData) -> ImageIndex:
    """Read the table. Raises FgvcError with the lines of rows that can't be used."""
    root = data.folder()
    file = root / data.file.expanduser()
    encoding = encoding_of(file, data.encoding)
    rows = _Rows(file)
    with file.open(encoding=encoding, newline="") as stream:
        reader = csv.reader(stream, delimiter=data.delimiter)
        try:
            header = next(reader, [])
            columns = _columns(data, file, header)
            rows.read(reader, columns)
        except (csv.Error, UnicodeError) as error:
            raise FgvcError(f"{file}:{reader.line_num}: {error}") from error
    names = sorted(rows.numbers)
    classes, order = number_classes(names, data.classes, where=file)
    remap = np.empty(len(names), np.int32)
    remap[[rows.numbers[name] for name in names]] = order
    labels = remap[np.frombuffer(rows.labels, np.int32)]
    groups = None if rows.groups is None else rows.groups.array()
    splits = np.zeros(len(labels), np.int8) if rows.splits is None else np.frombuffer(rows.splits, np.int8)
    if rows.splits is not None:
        _check_splits(file, labels, splits, groups, classes)
    given = given_splits(data, splits)
    splits, rule = finish_splits(
        data, labels, splits, test_fraction=data.test_fraction if rows.splits is None else 0, groups=groups
    )
    guessed = not data.encoding and encoding not in ("utf-8-sig", "utf-16")
    notes = [f"NOT UTF-8: read as {encoding}; if names look wrong, set data.encoding"] if guessed else []
    roles = ", ".join(
        f"{role} {header[at].strip()}" for role, at in zip(_COLUMNS, columns, strict=True) if at is not None
    )
    paths = rows.paths.array()
    return ImageIndex(
        root=root,
        classes=classes,
        paths=paths,
        labels=labels,
        splits=splits,
        given_splits=given,
        max_pixels=data.max_pixels,
        groups=groups,
        recognised="; ".join([f"table {file.name} ({roles}): {len(labels)} images, {len(classes)} classes", rule, *notes]),
        warnings=(*written_alike(classes), *repeated(root, paths, labels, splits, classes)),
    )


def _columns(data: CsvData, file: Path, header: list[str]) -> tuple[int, int, int | None, int | None]:
    """Positions of path, label, split and group in the header."""
    names = [name.strip() for name in header]
    places: list[int | None] = []
    for setting in (f"{role}_column" for role in _COLUMNS):
        name = getattr(data, setting)
        # By its value: a run's config.yaml has every setting, set by the user or not.
        required = setting in ("path_column", "label_column") or name != type(data).model_fields[setting].default
        if names.count(name) > 1:
            raise FgvcError(f"{file}:1: two columns are called {name!r}; rename one")
        if name not in names and required:
            other = next((d for d in ",;\t|" if d != data.delimiter and len(names) == 1 and d in names[0]), None)
            hint = f"set data.delimiter={other!r}" if other else f"set data.{setting}"
            raise FgvcError(f"{file}:1: no column {name!r} in the header ({some(names, 20)}); {hint}")
        places.append(names.index(name) if name in names else None)
    path, label, split, group = places
    assert path is not None
    assert label is not None
    return path, label, split, group


def _check_splits(
    file: Path, labels: np.ndarray, splits: np.ndarray, groups: np.ndarray | None, classes: tuple[str, ...]
) -> None:
    if groups is not None and (broken := straddling(groups, splits)):
        raise FgvcError(
            f"{file}: groups with rows in more than one split: {some(broken)}; give each group one split"
        )
    trained = np.bincount(labels[splits == SPLITS.index("train")], minlength=len(classes)) > 0
    untrained = [classes[k] for k in np.unique(labels) if not trained[k]]
    if untrained:
        raise FgvcError(f"{file}: classes without a train row: {some(untrained)}; add some or remove the others")


def encoding_of(file: Path, setting: str | None = None) -> str:
    """The encoding of a file: `setting`, or the first of ENCODINGS that reads all of it. Raises FgvcError if none does."""
    tried = (setting,) if setting else ENCODINGS
    try:
        with file.open("rb") as stream:
            if not setting and stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                tried = ("utf-16",)
            for encoding in tried:
                decoder = codecs.getincrementaldecoder(encoding)()
                stream.seek(0)
                try:
                    while chunk := stream.read(1 << 20):
                        decoder.decode(chunk)
                    decoder.decode(b"", final=True)
                except UnicodeError:
                    continue
                return encoding
    except OSError as error:
        raise FgvcError(f"{file}: can't read the table: {error.strerror}; it is named by data.file") from error
    except LookupError:
        raise FgvcError(f"data.encoding={setting}: no encoding of that name; try utf-8 or gb18030") from None
    raise FgvcError(f"{file}: is not {tried[0]} text; set data.encoding")


class _Rows:
    """The columns of the table, filled row by row."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.paths = StringColumn()
        self.labels = array("i")
        self.splits: array[int] | None = None
        self.groups: StringColumn | None = None
        self._codes: dict[str, int] = {}
        self.numbers: dict[str, int] = {}  # class name: number, by first occurrence

    def _code(self, cell: str) -> int:
        """The number of the split that a cell names; -1 if it names none."""
        if cell not in self._codes:
            split = split_named(cell)
            self._codes[cell] = -1 if split is None else SPLITS.index(split)
        return self._codes[cell]

    def read(self, reader: Any, columns: tuple[int, int, int | None, int | None]) -> None:
        """Read the rows of a csv.reader. Blank lines are skipped. Raises FgvcError that lists all bad rows."""
        path_at, label_at, split_at, group_at = columns
        needed = max(place for place in columns if place is not None) + 1
        splits = self.splits = None if split_at is None else array("b")
        groups = self.groups = None if group_at is None else StringColumn()
        paths, labels, numbers = self.paths, self.labels, self.numbers
        wrong: list[str] = []
        for row in reader:
            if len(row) < needed:
                if any(row):
                    wrong.append(f"line {reader.line_num} has {len(row)} of the {needed} fields")
                continue
            path, label = row[path_at].strip(), row[label_at].strip()
            split = 0 if split_at is None else self._code(row[split_at])
            if not path or not label or split < 0:
                if any(field.strip() for field in row):
                    lacks = "path" if not path else "label" if not label else f"split (train, val or test): {row[split_at]!r}"
                    wrong.append(f"line {reader.line_num} has no {lacks}")
                continue
            paths.append(path.replace("\\", "/"))
            labels.append(numbers.setdefault(label, len(numbers)))
            if splits is not None:
                splits.append(split)
            if groups is not None:
                groups.append(row[group_at].strip())
        if wrong:
            raise FgvcError(f"{self.file}: {len(wrong)} rows can't be used: {some(wrong)}")
