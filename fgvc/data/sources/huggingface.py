"""Reader of sets in the formats of Hugging Face's `datasets`: parquet files, saved sets, image folders, sets of the hub.

Rows stay where they are, in memory maps; the index has their labels and a name for each, `<split>/<number>`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fgvc.config.data import SPLITS, HfData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import (
    StringColumn,
    finish_splits,
    given_splits,
    number_classes,
    split_named,
    written_alike,
)
from fgvc.errors import FgvcError, ImageError
from fgvc.io.files import cache_folder
from fgvc.io.names import natural_key, some

SAVED = ("dataset_dict.json", "state.json")  # of Dataset.save_to_disk
CHUNK = 65536  # names made at once


def read(data: HfData) -> ImageIndex:
    """Read labels and splits; images are read when they are asked for. Raises FgvcError where the set, a column or a label is not
    there, and with what to do where the hub can't be reached."""
    splits = _splits(data, _load(data))
    first = next(iter(splits.values()))
    image, label = _image_column(data, first.features), _label_column(data, first.features)
    coded = {split: _codes(table, label) for split, table in splits.items()}
    names = _class_names(first.features[label], coded.values())
    classes, order = number_classes(names, data.classes, where=data.root)
    number = dict(zip(names, order.tolist(), strict=True))
    paths, groups, labels, columns, dropped = StringColumn(), StringColumn(), [], [], 0
    for split, table in splits.items():
        values, codes = coded[split]
        kept = np.flatnonzero(codes >= 0)
        dropped += len(codes) - len(kept)
        numbers = np.array([number[name] for name in values], np.int32)
        labels.append(numbers[codes[kept]])
        columns.append(np.full(len(kept), SPLITS.index(_split_of(split, splits)), np.int8))
        for start in range(0, len(kept), CHUNK):
            paths.extend([f"{split}/{row}" for row in kept[start : start + CHUNK].tolist()])
        if data.group_column is not None:
            texts = _column(table, data.group_column)
            groups.extend(["" if texts[int(row)] is None else str(texts[int(row)]) for row in kept])
    label_column = np.concatenate(labels)
    if not len(label_column):
        raise FgvcError(f"{data.root}: no labelled image found in column {label!r}")
    split_column = np.concatenate(columns)
    given = given_splits(data, split_column)
    group_column = groups.array() if data.group_column is not None else None
    test_fraction = data.test_fraction if len(splits) == 1 else 0
    split_column, rule = finish_splits(
        data, label_column, split_column, test_fraction=test_fraction, groups=group_column
    )
    warnings = written_alike(classes)
    if dropped:
        warnings.append(f"{dropped} rows have no label in column {label!r}, and are left out")
    what = f"{data.name} of the hub" if data.name else "a set of the datasets library"
    listed = f"{len(label_column)} images ({image}), {len(classes)} classes ({label})"
    return ImageIndex(
        root=data.root.expanduser(),
        classes=classes,
        paths=paths.array(),
        labels=label_column,
        splits=split_column,
        given_splits=given,
        groups=group_column,
        max_pixels=data.max_pixels,
        recognised=f"{what}: {listed}; {rule}",
        warnings=tuple(warnings),
        contents=Rows(splits, image, data.root.expanduser()),
    )


def contents(data: HfData) -> Rows:
    """The images of the set alone, for an index that was recorded."""
    splits = _splits(data, _load(data))
    return Rows(splits, _image_column(data, next(iter(splits.values())).features), data.root.expanduser())


class Rows:
    """The images of a set by name, `<split>/<number>`."""

    def __init__(self, splits: Mapping[str, Any], column: str, root: Path) -> None:
        self._column, self._root = column, root
        self._tables = {split: _undecoded(table.select_columns([column]), column) for split, table in splits.items()}
        self._sizes: dict[str, np.ndarray] = {}
        files = [file["filename"] for table in splits.values() for file in table.cache_files]
        states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
        self.stamp = hashlib.sha256(repr(states).encode()).hexdigest()

    def source(self, name: str) -> Path | bytes:
        split, _, number = name.partition("/")
        table = self._tables.get(split)
        if table is None or int(number) >= len(table):
            raise ImageError(self._root / name, "missing")
        value = table[int(number)][self._column]
        if isinstance(value, Mapping):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ImageError(self._root / name, "missing")
        return value if isinstance(value, bytes) else self._root / value

    def size(self, name: str) -> int:
        split, _, number = name.partition("/")
        if split not in self._tables or int(number) >= len(self._tables[split]):
            return -1
        if split not in self._sizes:
            self._sizes[split] = _sizes(self._tables[split], self._column)
        if (size := int(self._sizes[split][int(number)])) >= 0:
            return size
        try:
            source = self.source(name)
            return os.stat(source).st_size if isinstance(source, Path) else len(source)
        except (ImageError, OSError):
            return -1


def _load(data: HfData) -> Any:
    """The set as `datasets` opens it, a set or a mapping of splits. Raises FgvcError."""
    try:
        import datasets
    except ImportError as error:
        raise FgvcError(
            f"data.kind: hf needs a package that is not installed ({error}): pip install 'fgvc[datasets]'"
        ) from error
    datasets.disable_progress_bars()
    root = data.root.expanduser()
    if data.name is not None:
        try:
            return datasets.load_dataset(data.name, data.config, revision=data.revision, cache_dir=str(root))
        except Exception as error:  # of the network, the hub, or a builder
            raise FgvcError(
                f"data.name: {data.name}: is not in {root}, and can't be had from the hub ({_first_line(error)}). Without "
                "a network: fetch it where there is one, with the same data.root, and copy that folder; or save it with "
                "Dataset.save_to_disk(FOLDER), and give data.root=FOLDER without data.name"
            ) from error
    root, cache = data.folder(), str(cache_folder() / "datasets")
    try:
        if any((root / name).is_file() for name in SAVED):
            return datasets.load_from_disk(str(root))
        if data.files is not None:
            return datasets.load_dataset("parquet", data_files=str(root / data.files), cache_dir=cache)
        return datasets.load_dataset(str(root), cache_dir=cache)
    except Exception as error:
        raise FgvcError(
            f"data.root: {root}: the datasets library can't read it ({_first_line(error)}); it is to hold parquet files, what "
            "Dataset.save_to_disk wrote, or folders of images; data.files names parquet files below it"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:300]


def _splits(data: HfData, loaded: Any) -> dict[str, Any]:
    """The splits by name; of those without images none. Raises FgvcError for a name that is no split's, or none of train."""
    splits = (
        {str(name): table for name, table in loaded.items() if len(table)}
        if hasattr(loaded, "items")
        else {"train": loaded}
    )
    if len(splits) > 1:
        unknown = [name for name in splits if split_named(name) is None]
        if unknown or "train" not in map(split_named, splits):
            raise FgvcError(
                f"data.root: {data.root}: its splits are {', '.join(splits)}: each should be called train, validation or test, "
                f"and one train{'; not so ' + some(unknown) if unknown else ''}; save them under such names"
            )
    if not splits or not len(next(iter(splits.values()))):
        raise FgvcError(f"data.root: {data.root}: the set has no rows")
    return splits


def _split_of(name: str, splits: Mapping[str, Any]) -> Split:
    split = split_named(name)
    return "train" if len(splits) == 1 or split is None else split


def _image_column(data: HfData, features: Mapping[str, Any]) -> str:
    if data.image_column is not None:
        return _present(data.image_column, "image_column", features)
    typed = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    return _only(typed or [name for name in ("image", "img") if name in features], "image_column", features)


def _label_column(data: HfData, features: Mapping[str, Any]) -> str:
    if data.label_column is not None:
        return _present(data.label_column, "label_column", features)
    typed = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    return _only(["label"] if "label" in features else typed, "label_column", features)


def _present(name: str, setting: str, features: Mapping[str, Any]) -> str:
    if name not in features:
        raise FgvcError(f"data.{setting}: no column {name!r}; there are {', '.join(features)}")
    return name


def _only(names: list[str], setting: str, features: Mapping[str, Any]) -> str:
    if len(names) != 1:
        raise FgvcError(f"data.{setting}: name one of the columns {', '.join(features)}")
    return names[0]


def _column(table: Any, name: str) -> Any:
    """A column as pyarrow has it."""
    return table.select_columns([name]).with_format("arrow")[:][name]


def _codes(table: Any, column: str) -> tuple[list[str], np.ndarray]:
    """Names of classes and the number (N,) of each row's, int64; -1: without a label."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values, feature = _column(table, column), table.features[column]
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names), pc.fill_null(values.cast(pa.int64()), -1).to_numpy()
    if pa.types.is_integer(values.type):
        values = pc.if_else(pc.less(values, 0), None, values)  # -1 stands for no label in sets of the hub
    coded = pc.dictionary_encode(values.cast(pa.large_string())).combine_chunks()
    coded = coded.chunk(0) if isinstance(coded, pa.ChunkedArray) else coded
    return coded.dictionary.to_pylist(), pc.fill_null(coded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)


def _class_names(feature: Any, coded: Iterable[tuple[list[str], np.ndarray]]) -> list[str]:
    """Names of all classes: in the set's own order where it has one, else sorted, numbers as numbers."""
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    return sorted({name for values, _ in coded for name in values}, key=natural_key)


def _undecoded(table: Any, column: str) -> Any:
    """A table whose images come as they are stored: fgvc decodes them, under its own limits."""
    feature = table.features[column]
    if type(feature).__name__ != "Image":
        return table
    return table.cast_column(column, type(feature)(decode=False))


def _sizes(table: Any, column: str) -> np.ndarray:
    """Bytes (N,) of each image that is in the table, int64; -1 of one that is a file beside it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.with_format("arrow")[:][column]
    if pa.types.is_struct(values.type):
        values = pc.struct_field(values, "bytes")
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        return np.full(len(table), -1, np.int64)
    return np.asarray(pc.fill_null(pc.binary_length(values).cast(pa.int64()), -1).to_numpy())
