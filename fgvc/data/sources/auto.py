"""Detection of a set's kind: CUB's tables, class folders, or one table of images."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fgvc.config.data import AutoData, CsvData, CubData, FolderData, HfData, Source
from fgvc.data.sources.columns import split_named
from fgvc.data.sources.folder import tables_in
from fgvc.data.sources.table import encoding_of
from fgvc.data.sources.walk import folders_in, loose_images
from fgvc.errors import FgvcError
from fgvc.images.suffix import SUFFIXES
from fgvc.io.names import some
from fgvc.io.places import is_data, is_run_folder, what_it_is

CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
PATHS = (
    "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "image_file", "image_name",
    "images", "img", "img_path", "img_name", "relative_path", "rel_path", "picture", "photo",
)  # fmt: skip
NUMBERS = ("id", "image_id", "img_id")  # of images, which are files' names at times
LABELS = (  # names before what may be numbers of them; two of one line are too many
    ("label_name", "class_name", "category_name"),
    ("label", "labels", "class", "category", "target", "species", "variety", "y"),
    ("label_id", "class_id", "category_id"),
)
SPLIT_COLUMNS = ("split", "subset", "set", "part", "partition", "fold")
GROUPS = (
    "group", "group_id", "individual", "individual_id", "specimen", "specimen_id", "observation", "observation_id",
    "plant", "plant_id", "animal", "animal_id", "patient", "patient_id",
)  # fmt: skip
DELIMITERS = ",\t;|"
TRIED = 20  # rows of a table whose files are looked for
FOLDERS = 1000  # looked into at most for a first image


def resolved(data: AutoData) -> CubData | FolderData | CsvData | HfData:
    """The settings of the kind that the files are of. Only names and the table are read. Raises FgvcError if no kind fits, or
    several do."""
    root = data.root.expanduser()
    if root.is_file():
        if root.suffix.lower() == ".parquet":
            return _parquet(data, root)
        if not root.name.lower().endswith((".csv", ".tsv")):
            raise FgvcError(f"{root}: data.root is a file, and no table (.csv, .tsv or .parquet); name the set's folder")
        return _table(data, root.parent, _Table.of(root, root.parent))
    root = data.folder()
    if not is_data(root):
        raise FgvcError(f"{root}: data.root is no set of images{what_it_is(root)}; name the folder of the images")
    for place in (root, root / "CUB_200_2011"):
        if missing := [name for name in CUB if not (place / name).is_file()]:
            if len(missing) < len(CUB) - 1:
                raise FgvcError(
                    f"{place}: looks like CUB-200-2011's layout, but {missing[0]} is not there; add it, or {_KINDS}"
                )
            continue
        return _cub(data, place)
    return _folder_or_table(data, root)


def with_table(data: AutoData, file: Path) -> CsvData:
    """The settings of images in a folder, `data.root`, whose labels a table gives, wherever it lies. Raises FgvcError if it isn't
    one of these images with their labels."""
    root = data.folder()
    return _table(data, root, _Table.of(file, root)).model_copy(update={"file": file.absolute()})


def _folder_or_table(data: AutoData, root: Path) -> FolderData | CsvData:
    tables, reasons = [], []
    for name in tables_in(root):
        try:
            tables.append(_Table.of(root / name, root))
        except _FilesError:  # it is of images, wherever they are: the folders may be no classes
            raise
        except FgvcError as error:
            reasons.append(str(error))
    folders = _ClassFolders.of(root)
    if len(folders.names) >= 2 or folders.splits:
        relations = [folders.relation(table) for table in tables]
        if all(relation == "the same" for relation in relations):
            return _folders(data, root)
        if relations in (["more"], ["stored"]):
            return _table(data, root, tables[0])
        other = next(table for table, relation in zip(tables, relations, strict=True) if relation != "the same")
        raise FgvcError(
            f"{root}: has class folders ({some(folders.names, 3)}), and {other.file.name} says something else of their "
            f"images; say which is right: data.kind=folder, or {other.setting} (or name the table itself, {other.file}, in the "
            "folder's place)"
        )
    if len(tables) == 1:
        return _table(data, root, tables[0])
    if tables:
        raise FgvcError(
            f"{root}: {len(tables)} tables name images and labels: {some([table.file.name for table in tables])}; say which "
            f"one is right, such as {tables[0].setting}; or make them one, with a column `split` of train, val and test"
        )
    if folders.names and not reasons:  # one folder: the reader of class folders has the message
        return _folders(data, root)
    loose = loose_images(root)
    contents = [*reasons, *[f"{loose} images lie in it and in no class folder"] * bool(loose)]
    contents += [f"{name}/ holds images, and is no class folder" for name in (*folders.names, *folders.flat)]
    raise FgvcError(
        f"{root}: no set of images that fgvc recognises. Looked for: CUB-200-2011's {', '.join(CUB)}; class folders with "
        "images (train/<class>/ and test/<class>/, or <class>/); one table (.csv or .tsv) with a header, of images "
        f"({', '.join(PATHS[:4])}, ...) and labels ({', '.join(LABELS[1][:4])}, ...). "
        f"Found: {'; '.join(contents) or 'none of these'}. Else {_KINDS}"
    )


def _cub(data: AutoData, root: Path) -> CubData:
    if names := _some_kinds_settings(data):
        raise FgvcError(
            f"data.{names[0]}: {root} is in CUB-200-2011's layout, which has a test split and no groups; leave it out"
        )
    return CubData(root=root, **_settings(data))


def _folders(data: AutoData, root: Path) -> FolderData:
    return FolderData(root=root, **_settings(data, *_some_kinds_settings(data)))


def _table(data: AutoData, root: Path, table: _Table) -> CsvData:
    if data.group_size is not None:
        raise FgvcError(
            f"data.group_size: {table.file} has the groups in a column; leave it out, or set data.kind=folder"
        )
    columns = {f"{name}_column": column for name, column in table.columns.items()}
    return CsvData(
        root=root,
        file=Path(table.file.name),
        delimiter=table.delimiter,
        **columns,
        **_settings(data, *_some_kinds_settings(data)),
    )


def _parquet(data: AutoData, file: Path) -> HfData:
    if data.group_size is not None:
        raise FgvcError(f"data.group_size: {file} has the groups in a column; set data.kind=hf and data.group_column")
    return HfData(root=file, **_settings(data, *_some_kinds_settings(data)))


def _settings(data: AutoData, *more: str) -> dict[str, Any]:
    """The settings that the user gave among those of all kinds, and those named by `more`."""
    names = data.model_fields_set & Source.model_fields.keys() - {"root"}
    return {name: getattr(data, name) for name in (*names, *more)}


def _some_kinds_settings(data: AutoData) -> list[str]:
    """The names of the settings that the user gave among those that only some kinds have."""
    return [name for name in ("test_fraction", "group_size") if getattr(data, name) is not None]


class _FilesError(FgvcError):
    """The images of a table are not where it says."""


_KINDS = (
    "say what it is: data.kind=folder, data.kind=cub, data.kind=csv data.file=FILE data.path_column=NAME "
    "data.label_column=NAME, or data.kind=torchvision data.name=NAME"
)


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of images with the names of its columns."""

    file: Path
    encoding: str
    delimiter: str
    columns: dict[str, str]  # path, label, and optionally split and group -> the header's name

    @classmethod
    def of(cls, file: Path, root: Path) -> _Table:
        """Detect the columns of a table. Raises FgvcError if it isn't one of images below `root` with their labels."""
        encoding = encoding_of(file)
        delimiter, header = max(
            ((mark, _header(file, encoding, mark)) for mark in DELIMITERS), key=lambda candidate: len(candidate[1])
        )
        named = {name.strip().lower().replace(" ", "_").replace("-", "_"): name.strip() for name in reversed(header)}
        where = f"{file.name} (columns {some([name.strip() for name in header], 8)})"
        advice = f"say which by data.kind=csv data.root={root} data.file={file.name} data.path_column=NAME data.label_column=NAME"
        labels = next((matches for line in LABELS if (matches := [named[name] for name in line if name in named])), [])
        if len(labels) != 1:
            reason = f"several columns may be the labels, {', '.join(labels)}" if labels else "no column of labels"
            raise FgvcError(f"{where}: {reason}; {advice}")
        paths = [named[name] for name in (*PATHS, *NUMBERS) if name in named and named[name] not in labels]
        if not paths:
            raise FgvcError(f"{where}: no column of images; {advice}")
        columns = {"label": labels[0], "path": paths[0]}
        table = cls(file, encoding, delimiter, columns)
        places = table._places(header)
        first = [{name: row[at] for name, at in places.items()} for row in islice(table._rows(), TRIED)]
        for name in paths:
            if any((root / row[name].strip().replace("\\", "/")).is_file() for row in first):
                columns["path"] = name
                break
        else:
            message = (
                f"{where}: none of the first {len(first)} files that column {paths[0]!r} names lies in {root}; give "
                f"data.kind=csv data.file={file.absolute()} and as data.root the folder that they are relative to"
            )
            raise FgvcError(message) if set(paths) <= {named.get(name) for name in NUMBERS} else _FilesError(message)
        for key, names in (("split", SPLIT_COLUMNS), ("group", GROUPS)):
            matches = [named[name] for name in names if name in named and named[name] not in columns.values()]
            if key == "split":  # a set, a fold or a part may be something else
                matches = [name for name in matches if name == "split" or all(split_named(row[name]) for row in first)]
            if matches:
                columns[key] = matches[0]
        return table

    @property
    def setting(self) -> str:
        """The overrides that select this table on the command line."""
        return f"data.kind=csv data.file={self.file.name} " + " ".join(
            f"data.{key}_column={name!r}" if " " in name else f"data.{key}_column={name}"
            for key, name in self.columns.items()
        )

    def labelled(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """The components of the path and the label of each row."""
        header = _header(self.file, self.encoding, self.delimiter)
        at = self._places(header)
        for row in self._rows():
            path = row[at[self.columns["path"]]].strip().replace("\\", "/")
            yield PurePosixPath(os.path.normpath(path)).parts, row[at[self.columns["label"]]].strip()

    @staticmethod
    def _places(header: list[str]) -> dict[str, int]:
        return {name.strip(): at for at, name in reversed(list(enumerate(header)))}

    def _rows(self) -> Iterator[list[str]]:
        """The rows below the header that have all fields."""
        with self.file.open(encoding=self.encoding, newline="") as stream:
            reader = csv.reader(stream, delimiter=self.delimiter)
            width = len(next(reader, []))
            try:
                yield from (row for row in reader if len(row) >= width)
            except csv.Error as error:
                raise FgvcError(f"{self.file}:{reader.line_num}: {error}") from error


def _header(file: Path, encoding: str, delimiter: str) -> list[str]:
    """The first row of a table, its header."""
    with file.open(encoding=encoding, newline="") as stream:
        try:
            return next(csv.reader(stream, delimiter=delimiter), [])
        except csv.Error as error:
            raise FgvcError(f"{file}:1: {error}") from error


@dataclass(frozen=True, slots=True)
class _ClassFolders:
    """Folders that may be classes."""

    splits: tuple[str, ...]  # split folders that hold class folders, such as train/
    names: tuple[str, ...]  # of the class folders with images
    flat: tuple[str, ...]  # split folders that hold images themselves: of no class

    @classmethod
    def of(cls, root: Path) -> _ClassFolders:
        folders = folders_in(root)
        named = [name for name in folders if split_named(name) is not None]
        splits = [name for name in named if any(_holds_image(root / name / below) for below in folders_in(root / name))]
        places = [root / name for name in splits] or [root]
        names = sorted({name for place in places for name in folders_in(place) if _holds_image(place / name)})
        if not splits and set(names) <= set(named):
            return cls((), (), tuple(names))
        return cls(tuple(splits), tuple(names), ())

    def relation(self, table: _Table) -> Literal["the same", "more", "stored", "other"]:
        """Compare a table's labels with these folders.

        the same: the labels are the folders' names; more: they are, and the table has splits that the folders lack, or groups;
        stored: other labels, of images in one folder, which is no class then; other: all else."""
        folders, agree = set(), True
        for path, label in table.labelled():
            inner = path[1:] if path and path[0] in self.splits else path
            folder = inner[0] if len(inner) > 1 else ""
            folders.add(folder)
            agree &= folder == label
        if agree:
            return "more" if "group" in table.columns or ("split" in table.columns and not self.splits) else "the same"
        return "stored" if len(folders) < 2 else "other"


def _holds_image(folder: Path) -> bool:
    """Whether an image lies in a folder or below it, runs of fgvc excepted."""
    for _, folders, files in islice(os.walk(folder, followlinks=True), FOLDERS):
        if is_run_folder({*files, *folders}):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if any(name.lower().endswith(SUFFIXES) and not name.startswith(".") for name in files):
            return True
    return False
