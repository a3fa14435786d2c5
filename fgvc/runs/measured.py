"""Results of reading verbs in a run's folder: numbers beside the checkpoint that they were measured of, tables, pictures, pages.

They may run beside training and beside each other: each takes a lock of its own for as long as it writes, and adds to what is
there at that moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fgvc.errors import FgvcError
from fgvc.io.files import UNWRITABLE, Content, as_json, file_lock, holder, remove, sweep, write_atomic
from fgvc.runs import checkpoint

MEASURED = ("metrics.json", "localisation.json", "calibration.json")
CHECKPOINT = "checkpoint"  # in each row: see `fgvc.runs.checkpoint.identity`
PATIENCE = 60.0  # seconds; a verb holds the lock for less than one
_said: set[Path] = set()  # runs of which it was said that they can't be written


def measured(run: Path, name: str, loaded: tuple[str, str | None] | None = None) -> dict[str, Any]:
    """What one of MEASURED holds of the checkpoints that the run has now, by `<split>.<select>...`; empty where nothing was
    measured. `loaded`: the selection and identity of weights that were read, which is what the run has of these: where `last` is
    damaged they are of an older checkpoint. Raises FgvcError where it is not as fgvc writes it."""
    names: tuple[checkpoint.Name, ...] = ("last", "best", "start")
    now = {name: checkpoint.identity(run / "ckpt", name) for name in names}
    if loaded is not None:
        now[checkpoint.slot(loaded[0])] = loaded[1]

    def current(key: str, row: Mapping[str, Any]) -> bool:
        return CHECKPOINT not in row or row[CHECKPOINT] == now[checkpoint.slot("".join(key.split(".")[1:2]))]

    found = {key: row for key, row in _rows(run / name).items() if current(key, row)}
    return {key: {name: value for name, value in row.items() if name != CHECKPOINT} for key, row in found.items()}


def measured_of(run: Path, name: str, identity: str | None) -> dict[str, Any]:
    """The same of one checkpoint alone: see `fgvc.runs.checkpoint.identity`."""
    found = {key: dict(row) for key, row in _rows(run / name).items() if row.get(CHECKPOINT) == identity}
    for row in found.values():
        row.pop(CHECKPOINT, None)
    return found


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise FgvcError(f"{path}: not as fgvc wrote it ({error}); remove it and measure again") from error
    if not isinstance(found, dict) or not all(isinstance(numbers, dict) for numbers in found.values()):
        raise FgvcError(f"{path}: not as fgvc wrote it (expected an object of objects); remove it and measure again")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def leave(
    run: Path,
    files: Mapping[str, Content],
    *,
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    identity: str | None = None,
) -> bool:
    """Write `files` (by their place in the run), and `rows` into those that one of MEASURED or another such file has:
    name -> key -> numbers, each with the identity of the checkpoint that they were measured of.

    Where the run's folder can't be written, one line on stderr says that nothing was stored, and False is returned. Raises
    FgvcError where a file is not as fgvc wrote it, the disk is full, or another process writes for a minute.
    """
    try:
        with _mine(run):
            for name, added in (rows or {}).items():
                merged = _rows(run / name) | {key: {**row, CHECKPOINT: identity} for key, row in added.items()}
                write_atomic(run / name, as_json(merged))
            for name, content in files.items():
                write_atomic(run / name, content)
        _said.discard(run)
    except FgvcError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in UNWRITABLE:
            raise
        if run not in _said:  # once for all that a verb finds
            print(f"{run}: can't be written ({error.__cause__.strerror}): nothing was stored there", file=sys.stderr)
            _said.add(run)
        return False
    return True


def forget(run: Path) -> None:
    """Remove what was measured of weights that the run is about to leave behind."""
    with _mine(run):
        for name in (*MEASURED, "tables"):
            remove(run / name)


def clear(run: Path) -> None:
    """Remove what killed processes left half written, but for checkpoints. The caller has the run to itself."""
    with _mine(run):
        for folder in (run, *(run / name for name in ("plots", "tables", "masks", "reports"))):
            sweep(folder)


@contextmanager
def _mine(run: Path) -> Iterator[None]:
    with file_lock(lock := run / ".measured.lock", wait=PATIENCE) as mine:
        if not mine:
            raise FgvcError(f"{run}: {holder(lock)} writes there for more than {PATIENCE:g} s; try again")
        yield
