"""Record of a run's images: listed once, when it begins, and read by every verb that opens the run. Imports no torch.

A file `index.npz`: the columns of an ImageIndex without its root, each file's size, and a digest. A million images are some
10 MB. Read it with `numpy.load(..., allow_pickle=False)`; text is one column of UTF-8 bytes and one of lengths.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.config.images import MAX_PIXELS
from fgvc.data.index import ImageIndex
from fgvc.data.sources.columns import StringColumn
from fgvc.errors import FgvcError
from fgvc.io.names import some

NAME = "index.npz"
ABSENT = -1  # in place of a size: there was no such file
_VERSION = 1
_NOT_RECORDED = ("root", "max_pixels", "contents")  # the reader gives them
_REMARKS = ("recognised", "warnings")  # for people: recorded, and no part of the digest
_CHUNK = 4096  # files that one thread reads in turn


@dataclass(frozen=True, slots=True)
class Record:
    """An image index as it was when a run began, wherever its files lie now."""

    index: ImageIndex
    sizes: NDArray[np.int64]  # (N,) bytes, or ABSENT

    @classmethod
    def of(cls, index: ImageIndex) -> Record:
        """Record an index with the sizes of its files as they are now."""
        return cls(index, file_sizes(index))

    @property
    def digest(self) -> str:
        """SHA-256 of all that is recorded, remarks apart."""
        return _digest(*_fields_of(self))

    def dump(self) -> bytes:
        """Dump to the bytes that `load` reads; the same record gives the same bytes."""
        facts, columns = _fields_of(self)
        arrays: dict[str, Any] = dict(columns)
        tree = facts | {name: getattr(self.index, name) for name in _REMARKS} | {"digest": _digest(facts, columns)}
        stream = io.BytesIO()
        np.savez_compressed(stream, facts=_bytes(json.dumps(tree, ensure_ascii=False)), **arrays)
        return stream.getvalue()

    def missing(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows among these whose file is gone, and rows whose file has another size."""
        now = file_sizes(self.index, rows)
        other = now != self.sizes[rows]
        return rows[other & (now == ABSENT)], rows[other & (now != ABSENT)]


def load(path: Path, root: Path, *, max_pixels: int = MAX_PIXELS) -> Record:
    """Read the record in a file, of images below `root`, of `max_pixels` at most. Raises FgvcError where it is damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            columns = {name: saved[name] for name in saved.files}
        facts: dict[str, Any] = json.loads(columns.pop("facts").tobytes())
        remarks, digest = {name: facts.pop(name) for name in _REMARKS}, facts.pop("digest")
        if facts["version"] != _VERSION:
            raise FgvcError(f"{path}: written by another version of fgvc, which this one can't read: use that one")
        if _digest(facts, columns) != digest:
            raise ValueError("its digest is another")
        return _joined({**facts, **remarks}, columns, root, max_pixels)
    except FgvcError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json meet damaged bytes with whatever falls out
        raise FgvcError(
            f"{path}: the record of the run's images is damaged ({error}); put a copy of it there, or remove it: then the "
            "images are listed anew, and refused where they have other names than those that were trained on"
        ) from error


def file_sizes(index: ImageIndex, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Sizes in bytes of the files of these rows (all by default), ABSENT where there is none; by threads: a file server takes
    a while for each."""
    root, names = str(index.root), (index.paths if rows is None else index.paths[rows])
    if (contents := index.contents) is not None:
        return np.fromiter((contents.size(name) for name in names), np.int64, len(names))

    def sizes_from(start: int) -> list[int]:
        sizes = []
        for name in names[start : start + _CHUNK].tolist():
            try:
                sizes.append(os.stat(f"{root}/{name}").st_size)
            except (OSError, ValueError):
                sizes.append(ABSENT)
        return sizes

    with ThreadPoolExecutor(16) as pool:
        chunks = [np.array(chunk, np.int64) for chunk in pool.map(sizes_from, range(0, len(names), _CHUNK))]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Differences of a set from what was recorded of it; paths below its root."""

    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()  # the file has another size
    relabelled: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()  # to another split; not checked where files came or went, as drawn splits then move
    annotated: tuple[str, ...] = ()  # with another box, other parts of the object, or in another group
    classes: str = ""  # what is new about the classes or their order

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def lines(self) -> list[str]:
        """Describe each kind of change in one line, with the first few files."""
        words = {
            "added": "added", "gone": "gone", "changed": "of another size", "relabelled": "with another label",
            "moved": "in another split", "annotated": "with another box, other parts or another group",
        }  # fmt: skip
        kinds = [(word, getattr(self, name)) for name, word in words.items()]
        return [f"{len(paths)} {word}: {some(paths, 3)}" for word, paths in kinds if paths] + [self.classes] * bool(
            self.classes
        )


def changes(record: Record, now: ImageIndex, *, files: bool = True) -> Changes:
    """Compare the record with an index drawn anew of the same set. `files`: check each file's size, too."""
    then, nothing = record.index, np.zeros(0, np.int64)
    gone, changed = record.missing(np.arange(len(then))) if files else (nothing, nothing)
    rows_then, rows_now, only_then, only_now = _matched(then.paths, now.paths)
    labels = [np.array(index.classes, object)[index.labels[rows]] for index, rows in ((then, rows_then), (now, rows_now))]
    missing = np.union1d(only_then, gone)
    # Which images the deployed file has not seen, and which are near copies, is worked out once, when a run begins.
    moved = then.splits[rows_then] != now.splits[rows_now] if not (then.unseen or then.joined) else np.zeros(len(rows_then), bool)
    return Changes(
        added=tuple(now.paths[only_now].tolist()),
        gone=tuple(then.paths[missing].tolist()),
        changed=tuple(then.paths[changed].tolist()),
        relabelled=tuple(then.paths[rows_then[labels[0] != labels[1]]].tolist()),
        moved=() if len(only_now) or len(missing) else tuple(then.paths[rows_then[moved]].tolist()),
        annotated=tuple(then.paths[rows_then[_annotated(then, rows_then, now, rows_now)]].tolist()),
        classes=_class_changes(then.classes, now.classes),
    )


def _annotated(
    then: ImageIndex, rows_then: NDArray[np.int64], now: ImageIndex, rows_now: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether each pair of rows differs in box, parts or group."""
    differs = np.zeros(len(rows_then), bool)
    for name in ("boxes", "parts", "groups"):
        a, b = getattr(then, name), getattr(now, name)
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape[1:] != b.shape[1:]:
            differs[:] = True
            continue
        a, b = a[rows_then], b[rows_now]
        same = a == b if a.dtype.kind == "T" else (a == b) | (np.isnan(a) & np.isnan(b))
        differs |= ~same.reshape(len(rows_then), -1).all(axis=1)
    return differs


def _class_changes(then: tuple[str, ...], now: tuple[str, ...]) -> str:
    if then == now:
        return ""
    new, gone = sorted(set(now) - set(then)), sorted(set(then) - set(now))
    differences = [f"{what} {some(names, 3)}" for what, names in (("new", new), ("gone", gone)) if names]
    return f"the classes are others: {', '.join(differences)}" if differences else "the classes are in another order"


def _matched(then: np.ndarray, now: np.ndarray) -> tuple[NDArray[np.int64], ...]:
    """Rows of both that have the same path, and the rows of paths that only one has."""
    every, none = np.arange(len(then)), np.zeros(0, np.int64)
    if np.array_equal(then, now):
        return every, every, none, none
    rows_then, rows_now = _keyed(then), _keyed(now)
    both = [(row, rows_now[key]) for key, row in rows_then.items() if key in rows_now]
    pairs = np.array(both, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.setdiff1d(every, pairs[:, 0]), np.setdiff1d(np.arange(len(now)), pairs[:, 1])


def _keyed(paths: np.ndarray) -> dict[tuple[str, int], int]:
    """Rows by (path, earlier occurrences): a table may name a file several times."""
    occurrences: Counter[str] = Counter()
    rows = {}
    for row, path in enumerate(paths.tolist()):
        rows[path, occurrences[path]] = row
        occurrences[path] += 1
    return rows


def _fields_of(record: Record) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split a record into facts for JSON and columns. Any new field of ImageIndex is recorded, too."""
    facts: dict[str, Any] = {"version": _VERSION}
    columns: dict[str, np.ndarray] = {"sizes": record.sizes}
    for field in fields(record.index):
        value = getattr(record.index, field.name)
        if field.name in (*_NOT_RECORDED, *_REMARKS) or value is None:
            continue
        if not isinstance(value, np.ndarray):
            facts[field.name] = list(value) if isinstance(value, tuple) else value
        elif value.dtype.kind == "T":
            texts = [text.encode() for text in value.tolist()]
            columns[f"{field.name}.text"] = _bytes(b"".join(texts))
            columns[f"{field.name}.lengths"] = np.array([len(text) for text in texts], np.int32)
        else:
            columns[field.name] = value
    return facts, columns


def _joined(facts: Mapping[str, Any], columns: Mapping[str, np.ndarray], root: Path, max_pixels: int) -> Record:
    values: dict[str, Any] = {"root": root, "max_pixels": max_pixels}
    for field in fields(ImageIndex):
        if field.name in facts:
            value = facts[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name in columns:
            values[field.name] = columns[field.name]
        elif f"{field.name}.text" in columns:
            values[field.name] = _texts(columns[f"{field.name}.text"], columns[f"{field.name}.lengths"])
    return Record(ImageIndex(**values), columns["sizes"])


def _texts(blob: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    text, ends = blob.tobytes(), np.cumsum(lengths, dtype=np.int64).tolist()
    column = StringColumn()
    for start, end in zip([0, *ends], ends, strict=False):
        column.append(text[start:end].decode())
    return column.array()


def _bytes(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def _digest(facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        sha256.update(f"\n{name} {column.dtype.str} {column.shape}\n".encode())
        sha256.update(column.data)
    return sha256.hexdigest()
