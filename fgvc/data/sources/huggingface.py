"""Reader of sets in the formats of Hugging Face's `datasets`: parquet files, saved sets, image folders, sets of the hub.

Images stay where they are, in Arrow files (parquet files become such in the cache); the index has labels, and a name for each
row, `<split>/<number>`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
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
LARGE = 50_000  # rows from which, or
LARGE_BYTES = (
    64 * 2**20
)  # bytes from which, another process lists a set: the pages of the tables that it maps are its own


@dataclass(slots=True)
class Listed:
    """The rows of one split (N) as columns: labels and groups by number, and where each image lies."""

    names: list[str]  # of classes
    codes: np.ndarray  # (N,) int32: of names; -1: no label
    files: list[str]  # Arrow files
    file: np.ndarray  # (N,) int16: of files
    offset: np.ndarray  # (N,) int64: of the image in its file
    size: np.ndarray  # (N,) int64: bytes; -1: not in the table
    paths: np.ndarray | None  # (N,) StringDType: of images that are not in the table
    group_names: list[str]
    group_codes: np.ndarray | None


def read(data: HfData) -> ImageIndex:
    """Read labels and splits; images are read when they are asked for. Raises FgvcError where the set, a column or a label is not
    there, and with what to do where the hub can't be reached."""
    listed, facts = _listed(data)
    label, names = (
        facts["label"],
        facts["names"] or sorted({n for each in listed.values() for n in each.names}, key=natural_key),
    )
    classes, order = number_classes(names, data.classes, where=data.root)
    number = dict(zip(names, order.tolist(), strict=True))
    paths, groups, labels, columns, dropped = StringColumn(), StringColumn(), [], [], 0
    for split, rows in listed.items():
        kept = np.flatnonzero(rows.codes >= 0)
        dropped += len(rows.codes) - len(kept)
        numbers = np.array([number[name] for name in rows.names], np.int32)
        labels.append(numbers[rows.codes[kept]])
        columns.append(np.full(len(kept), SPLITS.index(_split_of(split, listed)), np.int8))
        for start in range(0, len(kept), CHUNK):
            chunk = kept[start : start + CHUNK]
            paths.extend([f"{split}/{row}" for row in chunk.tolist()])
            if rows.group_codes is not None:
                groups.extend(
                    [rows.group_names[code] if code >= 0 else "" for code in rows.group_codes[chunk].tolist()]
                )
    label_column = np.concatenate(labels)
    if not len(label_column):
        raise FgvcError(f"{data.root}: no labelled image found in column {label!r}")
    split_column = np.concatenate(columns)
    given = given_splits(data, split_column)
    group_column = groups.array() if data.group_column is not None else None
    test_fraction = data.test_fraction if len(listed) == 1 else 0
    split_column, rule = finish_splits(
        data, label_column, split_column, test_fraction=test_fraction, groups=group_column
    )
    warnings = written_alike(classes)
    if dropped:
        warnings.append(f"{dropped} rows have no label in column {label!r}, and are left out")
    what = f"{data.name} of the hub" if data.name else "a set of the datasets library"
    counts = f"{len(label_column)} images ({facts['image']}), {len(classes)} classes ({label})"
    return ImageIndex(
        root=data.root.expanduser(),
        classes=classes,
        paths=paths.array(),
        labels=label_column,
        splits=split_column,
        given_splits=given,
        groups=group_column,
        max_pixels=data.max_pixels,
        recognised=f"{what}: {counts}; {rule}",
        warnings=tuple(warnings),
        contents=Rows(listed, data.root.expanduser()),
    )


def contents(data: HfData) -> Rows:
    """The images of the set alone, for an index that was recorded."""
    return Rows(_listed(data)[0], data.root.expanduser())


class Rows:
    """The images of a set by name, `<split>/<number>`, read from its Arrow files."""

    def __init__(self, listed: Mapping[str, Listed], root: Path) -> None:
        self._listed, self._root = listed, root
        self._handles: dict[str, int] = {}
        states = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for rows in listed.values() for f in rows.files]
        self.stamp = hashlib.sha256(repr(states).encode()).hexdigest()

    def source(self, name: str) -> Path | bytes:
        rows, row = self._row(name)
        if rows is None:
            raise ImageError(self._root / name, "missing")
        if (size := int(rows.size[row])) < 0:
            path = "" if rows.paths is None else str(rows.paths[row])
            if not path:
                raise ImageError(self._root / name, "missing")
            return self._root / path
        file = rows.files[rows.file[row]]
        try:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            content = os.pread(
                self._handles[file], size, int(rows.offset[row])
            )  # needs no position: workers may share it
        except OSError as error:
            raise ImageError(self._root / name, "not readable") from error
        if len(content) != size:
            raise ImageError(self._root / name, "truncated")
        return content

    def size(self, name: str) -> int:
        rows, row = self._row(name)
        if rows is None:
            return -1
        if (size := int(rows.size[row])) >= 0 or rows.paths is None:
            return size
        try:
            return os.stat(self._root / str(rows.paths[row])).st_size
        except OSError:
            return -1

    def _row(self, name: str) -> tuple[Listed | None, int]:
        split, _, number = name.partition("/")
        rows, row = self._listed.get(split), int(number)
        return (rows if rows is not None and row < len(rows.size) else None), row


def _listed(data: HfData) -> tuple[dict[str, Listed], dict[str, Any]]:
    """The rows of each split, and the columns' names and the class order (empty: by name); by another process where the set is
    large. Raises FgvcError."""
    if not _large(data):
        return _list(data)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "listed.npz"
        command = [sys.executable, "-m", __name__, data.model_dump_json(), str(out)]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False
        )
        if done.returncode == USER_ERROR:
            raise FgvcError(done.stdout.strip())
        if done.returncode:
            raise FgvcError(f"data.root: {data.root}: the process that lists it failed: {done.stderr.strip()[-500:]}")
        return _load_listed(out)


USER_ERROR = 3  # exit code of the process that lists a set, with the message on stdout


def _large(data: HfData) -> bool:
    if data.name is not None:
        return True
    root = data.root.expanduser()
    files = [file for file in root.rglob("*") if file.suffix in (".parquet", ".arrow")] if root.is_dir() else []
    if sum(file.stat().st_size for file in files) > LARGE_BYTES:
        return True
    try:
        import pyarrow.parquet as pq

        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files if file.suffix == ".parquet")
    except Exception:  # no parquet file, or no pyarrow: reading it will say so
        return False
    return bool(rows > LARGE)


def _list(data: HfData) -> tuple[dict[str, Listed], dict[str, Any]]:
    splits = _splits(data, _load(data))
    features = next(iter(splits.values())).features
    image, label = _image_column(data, features), _label_column(data, features)
    if data.group_column is not None:
        _present(data.group_column, "group_column", features)
    listed = {}
    for split, table in splits.items():
        names, codes = _codes(table, label)
        group_names, group_codes = _codes(table, data.group_column) if data.group_column is not None else ([], None)
        listed[split] = Listed(names, codes.astype(np.int32), *_places(data, table, image), group_names, group_codes)
    feature = features[label]
    names = list(feature.names) if type(feature).__name__ == "ClassLabel" else []
    return listed, {"image": image, "label": label, "names": names}


def _places(
    data: HfData, table: Any, column: str
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Locate the images of a table: its Arrow files, and for each row the file, the offset and size in it, or the path."""
    import pyarrow as pa

    files = [str(file["filename"]) for file in table.cache_files]
    numbers, offsets, sizes, paths, count = [], [], [], StringColumn(), 0
    for number, file in enumerate(files):
        with pa.memory_map(file) as source:
            base = source.read_buffer(1).address
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                values = batch.column(column)
                inner = values.field("bytes") if pa.types.is_struct(values.type) else values
                start, size = _spans(inner, base)
                if pa.types.is_struct(values.type) or not _binary(inner.type):
                    names = values.field("path") if pa.types.is_struct(values.type) else values
                    paths.extend(
                        [str(name) if at < 0 and name else "" for at, name in zip(size, names.to_pylist(), strict=True)]
                    )
                numbers.append(np.full(len(size), number, np.int16))
                offsets.append(start)
                sizes.append(size)
                count += len(size)
    if count != len(table):
        raise FgvcError(
            f"data.root: {data.root}: is a selection of a table; save it with Dataset.save_to_disk, and give that folder"
        )
    size = np.concatenate(sizes)
    named = len(paths) > 0 and bool((size < 0).any())
    return files, np.concatenate(numbers), np.concatenate(offsets), size, paths.array() if named else None


def _binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _spans(values: Any, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Offset in its file, mapped at `base`, and size (n,) of each value of an Arrow array of bytes; size -1: none."""
    import pyarrow as pa

    if not _binary(values.type):
        return np.zeros(len(values), np.int64), np.full(len(values), -1, np.int64)
    _, ends, content = values.buffers()
    kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    bounds = np.frombuffer(ends, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    start = bounds[:-1] + (content.address - base if content is not None else 0)
    return start, np.where(np.asarray(values.is_valid()), np.diff(bounds), -1)


def _save_listed(out: Path, listed: Mapping[str, Listed], facts: Mapping[str, Any]) -> None:
    arrays: dict[str, np.ndarray] = {}
    texts: dict[str, Any] = {"facts": facts, "splits": {}}
    for split, rows in listed.items():
        texts["splits"][split] = {"names": rows.names, "files": rows.files, "group_names": rows.group_names}
        for name in ("codes", "file", "offset", "size", "group_codes"):
            if (column := getattr(rows, name)) is not None:
                arrays[f"{split}/{name}"] = column
        if rows.paths is not None:
            texts["splits"][split]["paths"] = rows.paths.tolist()
    np.savez(out, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8), **arrays)  # type: ignore[arg-type]


def _load_listed(file: Path) -> tuple[dict[str, Listed], dict[str, Any]]:
    with np.load(file, allow_pickle=False) as saved:
        texts = json.loads(saved["texts"].tobytes())
        listed = {}
        for split, of in texts["splits"].items():
            columns = {name: saved[f"{split}/{name}"] for name in ("codes", "file", "offset", "size")}
            paths, groups = StringColumn(), f"{split}/group_codes"
            paths.extend(of.get("paths", []))
            listed[split] = Listed(
                names=of["names"], files=of["files"], group_names=of["group_names"], **columns,
                paths=paths.array() if "paths" in of else None, group_codes=saved.get(groups, None),
            )  # fmt: skip
    return listed, texts["facts"]


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


if __name__ == "__main__":  # the process that lists a large set
    try:
        _save_listed(Path(sys.argv[2]), *_list(HfData.model_validate_json(sys.argv[1])))
    except FgvcError as message:
        print(message)
        sys.exit(USER_ERROR)
