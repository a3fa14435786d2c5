"""What must be on the disk before a name may point at it, what a user hears when it can't get there, and whose turn it is."""

from __future__ import annotations

import fcntl
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


def refuse_place(path: Path) -> None:
    """Raise FgvcError where no file or folder can come to be: a file where its folder must be, a name that is too long, or no
    right to write. Call it before the long work."""
    with writing(path):
        with suppress(FileNotFoundError):
            os.stat(path)
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OSError(f"{parent} is {'not writable' if parent.is_dir() else 'a file'}")


def refuse_file(out: Path) -> None:
    """The same of a file, where it may not be a folder."""
    if out.is_dir():
        raise FgvcError(f"{out}: is a folder; name a file to write")
    refuse_place(out)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path`, of the same suffix, to write the new file to: it takes the name once it is whole. Raises FgvcError
    where the system can't write it, the old file intact."""
    scratch = path.with_name(f".{os.getpid()}.{path.name[-50:]}")  # or a name that just fits would no longer
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


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the lock file to itself; `wait`: until it has. The system lets go of it when the process ends,
    however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
