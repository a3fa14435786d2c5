"""What must be on the disk before a name may point at it, and what a user hears when it can't get there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fgvc.types import FgvcError


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises FgvcError naming the file where the system can't write it."""
    try:
        yield
    except OSError as error:
        raise FgvcError(f"{path}: can't write: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path`, of the same suffix, to write the new file to: it takes the name once it is whole. Raises FgvcError
    where the system can't write it, the old file intact."""
    scratch = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with writing(path):
            yield scratch
            os.replace(scratch, path)
    finally:
        with suppress(OSError):  # gone, unless something failed
            scratch.unlink()


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to fill: it takes the name once it is whole and on the disk, or goes. Raises FgvcError where
    something has that name already, or the system can't write it."""
    if os.path.lexists(folder):
        raise FgvcError(f"{folder}: exists already; remove it, or choose another name")
    scratch = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        with writing(folder):
            scratch.mkdir(parents=True)
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                sync(path)
            os.rename(scratch, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone, unless something failed
