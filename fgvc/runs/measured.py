"""Results stored in a run's folder: numbers with the checkpoint that they were measured of, tables, pictures, pages.

The verbs that store them may run beside training and beside each other: each holds a lock while it writes, and adds to what is
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
_warned: set[Path] = set()  # runs that can't be written and were warned of


def read_measured(run: Path, name: str, loaded: tuple[str, str | None] | None = None) -> dict[str, Any]:
    """Read from one of MEASURED what was measured of the run's present checkpoints, by `<split>.<select>...`; empty where nothing
    was. `loaded`: selection and identity of weights that were read, which count as the run's present ones: where `last` is
    damaged they are of an older checkpoint. Raises FgvcError where it is not as fgvc writes it."""
    names: tuple[checkpoint.Name, ...] = ("last", "best", "start")
    now = {name: checkpoint.identity(run / "ckpt", name) for name in names}
    if loaded is not None:
        now[checkpoint.slot(loaded[0])] = loaded[1]

    def current(key: str, row: Mapping[str, Any]) -> bool:
        return CHECKPOINT not in row or row[CHECKPOINT] == now[checkpoint.slot("".join(key.split(".")[1:2]))]

    rows = {key: row for key, row in _rows(run / name).items() if current(key, row)}
    return {key: {name: value for name, value in row.items() if name != CHECKPOINT} for key, row in rows.items()}


def read_measured_of(run: Path, name: str, identity: str | None) -> dict[str, Any]:
    """Read what was measured of one checkpoint alone: see `fgvc.runs.checkpoint.identity`."""
    rows = {key: dict(row) for key, row in _rows(run / name).items() if row.get(CHECKPOINT) == identity}
    for row in rows.values():
        row.pop(CHECKPOINT, None)
    return rows


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise FgvcError(f"{path}: not as fgvc wrote it ({error}); remove it and measure again") from error
    if not isinstance(rows, dict) or not all(isinstance(numbers, dict) for numbers in rows.values()):
        raise FgvcError(f"{path}: not as fgvc wrote it (expected an object of objects); remove it and measure again")
    return rows


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def store_measured(
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
        with _write_lock(run):
            for name, added in (rows or {}).items():
                merged = _rows(run / name) | {key: {**row, CHECKPOINT: identity} for key, row in added.items()}
                write_atomic(run / name, as_json(merged))
            for name, content in files.items():
                write_atomic(run / name, content)
        _warned.discard(run)
    except FgvcError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in UNWRITABLE:
            raise
        if run not in _warned:  # once for all that a verb stores
            print(f"{run}: can't be written ({error.__cause__.strerror}): nothing was stored there", file=sys.stderr)
            _warned.add(run)
        return False
    return True


def remove_measured(run: Path) -> None:
    """Remove what was measured of weights that the run is about to replace."""
    with _write_lock(run):
        for name in (*MEASURED, "tables"):
            remove(run / name)


def sweep_run(run: Path) -> None:
    """Remove files that killed processes left half written, checkpoints apart. The caller holds the run's lock."""
    with _write_lock(run):
        for folder in (run, *(run / name for name in ("plots", "tables", "masks", "reports"))):
            sweep(folder)


@contextmanager
def _write_lock(run: Path) -> Iterator[None]:
    with file_lock(lock := run / ".measured.lock", wait=PATIENCE) as locked:
        if not locked:
            raise FgvcError(f"{run}: {holder(lock)} writes there for more than {PATIENCE:g} s; try again")
        yield
