"""The images that a run is of: listed once, when it begins, and read by every verb that opens the run. Imports no torch.

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
_PLACE = ("root", "max_pixels")  # of whoever reads: not recorded
_SAID = ("recognised", "warnings")  # for people: recorded, and no part of the digest
_CHUNK = 4096  # files that one thread asks for in turn


@dataclass(frozen=True, slots=True)
class Record:
    """An index as it was when a run began, wherever its files lie now."""

    index: ImageIndex
    sizes: NDArray[np.int64]  # (N,) bytes, or ABSENT

    @classmethod
    def of(cls, index: ImageIndex) -> Record:
        """Of the files as they are now."""
        return cls(index, file_sizes(index))

    @property
    def digest(self) -> str:
        """SHA-256 of all that is recorded but what is for people."""
        return _digest(*_split(self))

    def dump(self) -> bytes:
        """What `load` reads; the same record gives the same bytes."""
        facts, columns = _split(self)
        arrays: dict[str, Any] = dict(columns)
        said = facts | {name: getattr(self.index, name) for name in _SAID} | {"digest": _digest(facts, columns)}
        stream = io.BytesIO()
        np.savez_compressed(stream, facts=_bytes(json.dumps(said, ensure_ascii=False)), **arrays)
        return stream.getvalue()

    def lost(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of these rows, those whose file is gone, and those whose file is of another size."""
        now = file_sizes(self.index, rows)
        other = now != self.sizes[rows]
        return rows[other & (now == ABSENT)], rows[other & (now != ABSENT)]


def load(path: Path, root: Path, *, max_pixels: int = MAX_PIXELS) -> Record:
    """The record in a file, of images below `root`, of `max_pixels` at most. Raises FgvcError where it is damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            columns = {name: saved[name] for name in saved.files}
        facts: dict[str, Any] = json.loads(columns.pop("facts").tobytes())
        said, digest = {name: facts.pop(name) for name in _SAID}, facts.pop("digest")
        if facts["version"] != _VERSION:
            raise FgvcError(f"{path}: written by another version of fgvc, which this one can't read: use that one")
        if _digest(facts, columns) != digest:
            raise ValueError("its digest is another")
        return _joined({**facts, **said}, columns, root, max_pixels)
    except FgvcError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and json meet damaged bytes with whatever falls out
        raise FgvcError(
            f"{path}: the record of the run's images is damaged ({error}); put a copy of it there, or remove it: then the "
            "images are listed anew, and refused where they have other names than those that were trained on"
        ) from error


def file_sizes(index: ImageIndex, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Bytes of the files of these rows (all by default), ABSENT where there is none. Asked by threads: a file server takes
    a while for each."""
    root, names = str(index.root), (index.paths if rows is None else index.paths[rows])

    def ask(start: int) -> list[int]:
        found = []
        for name in names[start : start + _CHUNK].tolist():
            try:
                found.append(os.stat(f"{root}/{name}").st_size)
            except (OSError, ValueError):
                found.append(ABSENT)
        return found

    with ThreadPoolExecutor(16) as pool:
        chunks = [np.array(chunk, np.int64) for chunk in pool.map(ask, range(0, len(names), _CHUNK))]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Where a set is no longer what was recorded of it. Paths below its root."""

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
        """One for each kind of change, with the first few files."""
        words = {
            "added": "added", "gone": "gone", "changed": "of another size", "relabelled": "with another label",
            "moved": "in another split", "annotated": "with another box, other parts or another group",
        }  # fmt: skip
        found = [(word, getattr(self, name)) for name, word in words.items()]
        return [f"{len(paths)} {word}: {some(paths, 3)}" for word, paths in found if paths] + [self.classes] * bool(
            self.classes
        )


def changes(record: Record, now: ImageIndex, *, files: bool = True) -> Changes:
    """What has changed from the record to an index that was drawn anew of the same set. `files`: look at each, too."""
    then, nothing = record.index, np.zeros(0, np.int64)
    gone, changed = record.lost(np.arange(len(then))) if files else (nothing, nothing)
    mine, theirs, less, more = _matched(then.paths, now.paths)
    labels = [np.array(index.classes, object)[index.labels[rows]] for index, rows in ((then, mine), (now, theirs))]
    missing = np.union1d(less, gone)
    apart = then.splits[mine] != now.splits[theirs]
    return Changes(
        added=tuple(now.paths[more].tolist()),
        gone=tuple(then.paths[missing].tolist()),
        changed=tuple(then.paths[changed].tolist()),
        relabelled=tuple(then.paths[mine[labels[0] != labels[1]]].tolist()),
        moved=() if len(more) or len(missing) else tuple(then.paths[mine[apart]].tolist()),
        annotated=tuple(then.paths[mine[_annotated(then, mine, now, theirs)]].tolist()),
        classes=_classes(then.classes, now.classes),
    )


def _annotated(
    then: ImageIndex, mine: NDArray[np.int64], now: ImageIndex, theirs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Of each pair of rows, whether it has another box, other parts or another group."""
    found = np.zeros(len(mine), bool)
    for name in ("boxes", "parts", "groups"):
        a, b = getattr(then, name), getattr(now, name)
        if a is None and b is None:
            continue
        if a is None or b is None or a.shape[1:] != b.shape[1:]:
            found[:] = True
            continue
        a, b = a[mine], b[theirs]
        same = a == b if a.dtype.kind == "T" else (a == b) | (np.isnan(a) & np.isnan(b))
        found |= ~same.reshape(len(mine), -1).all(axis=1)
    return found


def _classes(then: tuple[str, ...], now: tuple[str, ...]) -> str:
    if then == now:
        return ""
    more, less = sorted(set(now) - set(then)), sorted(set(then) - set(now))
    said = [f"{what} {some(names, 3)}" for what, names in (("new", more), ("gone", less)) if names]
    return f"the classes are others: {', '.join(said)}" if said else "the classes are in another order"


def _matched(then: np.ndarray, now: np.ndarray) -> tuple[NDArray[np.int64], ...]:
    """Rows of both that have the same path, and those that one alone has."""
    every, none = np.arange(len(then)), np.zeros(0, np.int64)
    if np.array_equal(then, now):
        return every, every, none, none
    mine, theirs = _keyed(then), _keyed(now)
    both = [(row, theirs[key]) for key, row in mine.items() if key in theirs]
    pairs = np.array(both, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.setdiff1d(every, pairs[:, 0]), np.setdiff1d(np.arange(len(now)), pairs[:, 1])


def _keyed(paths: np.ndarray) -> dict[tuple[str, int], int]:
    """(path, how often it came before) -> row: a table may name a file several times."""
    seen: Counter[str] = Counter()
    found = {}
    for row, path in enumerate(paths.tolist()):
        found[path, seen[path]] = row
        seen[path] += 1
    return found


def _split(record: Record) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What JSON holds of a record, and its columns. A field that ImageIndex comes to have is recorded by itself."""
    facts: dict[str, Any] = {"version": _VERSION}
    columns: dict[str, np.ndarray] = {"sizes": record.sizes}
    for field in fields(record.index):
        value = getattr(record.index, field.name)
        if field.name in (*_PLACE, *_SAID) or value is None:
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
    found: dict[str, Any] = {"root": root, "max_pixels": max_pixels}
    for field in fields(ImageIndex):
        if field.name in facts:
            value = facts[field.name]
            found[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.name in columns:
            found[field.name] = columns[field.name]
        elif f"{field.name}.text" in columns:
            found[field.name] = _texts(columns[f"{field.name}.text"], columns[f"{field.name}.lengths"])
    return Record(ImageIndex(**found), columns["sizes"])


def _texts(blob: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    text, ends = blob.tobytes(), np.cumsum(lengths, dtype=np.int64).tolist()
    column = StringColumn()
    for start, end in zip([0, *ends], ends, strict=False):
        column.append(text[start:end].decode())
    return column.array()


def _bytes(text: str | bytes) -> np.ndarray:
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def _digest(facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        found.update(f"\n{name} {column.dtype.str} {column.shape}\n".encode())
        found.update(column.data)
    return found.hexdigest()
