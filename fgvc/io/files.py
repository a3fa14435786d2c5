"""Writing to the disk: files and folders that are whole or not there, locks, and errors that name what the system can't write.

Every file of a run is written by `write_atomic`, `fill` or `append`, and every name of one is changed by the functions here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

from fgvc.errors import FgvcError

Content = str | bytes | Callable[[BinaryIO], object]
"""Text (UTF-8), bytes, or what writes to an open file from its beginning to its end."""

BUFFER = 1 << 20
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_SCRATCH = re.compile(r"\.\d+\.")
_held: set[int] = set()  # locks of this process


def cache_folder() -> Path:
    """Where what can be made anew is kept for the next time: `$XDG_CACHE_HOME/fgvc`, or `~/.cache/fgvc`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fgvc"


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


def write_atomic(path: Path, content: Content) -> str:
    """Replace a file so that a reader, a kill or a power cut never leaves half of it; its folder is made where it is missing.
    Returns the SHA-256 of what was written. Raises FgvcError where the system can't write it, the old file intact."""
    scratch = _beside(path)
    try:
        with writing(path):
            make_folder(path.parent)
            digest = fill(scratch, content)
            os.replace(scratch, path)
            sync(path.parent)
        return digest
    finally:
        with suppress(OSError):  # gone, unless something failed
            os.unlink(scratch)


def fill(path: Path, content: Content) -> str:
    """Write a file that nobody looks for yet, as in a folder of `making`, and wait until it is on the disk. Returns the SHA-256
    of what was written."""
    with _Hashing(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)) as file:
        if callable(content):
            with io.BufferedWriter(file, BUFFER) as stream:
                content(stream)
                stream.flush()
                return file.done()
        # The names of folders need not be UTF-8.
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace"))
        return file.done()


def as_json(value: Any) -> str:
    """The text of a JSON file, which has no NaN and no infinity: where there is no number, there is null."""
    return json.dumps(finite_or_none(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_none(value: Any) -> Any:
    """The same tree, None in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    real = isinstance(value, Real) and not isinstance(value, int)  # numpy's, too
    return None if real and not math.isfinite(value) else value


class _Hashing(io.RawIOBase):
    """An open file that takes the SHA-256 of all that is written to it."""

    def __init__(self, handle: int) -> None:
        self._handle, self._digest = handle, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._digest.update(view)
        _put(self._handle, view)
        return len(view)

    def done(self) -> str:
        os.fsync(self._handle)
        return self._digest.hexdigest()

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._handle)


def _put(handle: int, data: memoryview | bytes) -> None:
    left = memoryview(data)
    while len(left):
        left = left[os.write(handle, left) :]


def append(path: Path, line: bytes) -> None:
    """Add a line to a file; a torn last line, as a kill leaves it, is closed first. Raises FgvcError where the system can't."""
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            _put(handle, (b"\n" if torn else b"") + line + b"\n")
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with suppress(FileExistsError):
            os.mkdir(folder)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder and all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        for entry in list(path.iterdir()):
            remove(entry)
        os.rmdir(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def remove_empty(folder: Path) -> None:
    """Delete a folder, unless something is in it."""
    with suppress(OSError):
        os.rmdir(folder)


def point(link: Path, target: str) -> None:
    """Make `link` a link to `target` in one step, in the place of another link."""
    scratch = _beside(link)
    remove(scratch)
    os.symlink(target, scratch, target_is_directory=True)
    os.replace(scratch, link)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder another name, on the disk when this returns."""
    os.replace(path, new)
    sync(new.parent)


def sweep(folder: Path) -> None:
    """Remove files that killed processes were writing in this folder. Nobody may be writing there."""
    for path in [path for path in folder.glob(".*") if _SCRATCH.match(path.name) and not path.is_dir()]:
        remove(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path`, of the same suffix, for a library to write the new file to: it takes the name once it is whole.
    Raises FgvcError where the system can't write it, the old file intact."""
    scratch = _beside(path)
    try:
        with writing(path):
            yield scratch
            os.replace(scratch, path)
    finally:
        with suppress(OSError):  # gone, unless something failed
            scratch.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name[-50:]}")  # or a name that just fits would no longer


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, to `fill` with files: it takes the name once it is whole and on the disk, or goes. Raises
    FgvcError where something has that name already, or the system can't write it."""
    if os.path.lexists(folder):
        raise FgvcError(f"{folder}: exists already; remove it, or choose another name")
    scratch = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        with writing(folder):
            make_folder(scratch)
            yield scratch
            for path in scratch.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    sync(path)
            sync(scratch)
            rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone, unless something failed


@contextmanager
def alone(path: Path, *, wait: float = 0.0) -> Iterator[bool]:
    """Whether this process has the lock file to itself; `wait`: seconds to try for, math.inf for as long as it takes. The
    system lets go of it when the process ends, however it ends. The file tells who has it: see `holder`.

    Raises FgvcError where the file can't be made or the file system knows no locks.
    """
    with writing(path):
        handle = _locked(path, time.monotonic() + wait)
    if handle is None:
        yield False
        return
    _held.add(handle)
    try:
        yield True
    finally:
        if handle in _held:
            _held.remove(handle)
            os.ftruncate(handle, 0)
            os.close(handle)


def _locked(path: Path, until: float) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # what it says of its holder stays
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still(path, handle):  # not removed meanwhile by a holder that let go
                os.ftruncate(handle, 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}, since {since}\n".encode(), 0)
                return handle
            os.close(handle)
        except BlockingIOError:
            os.close(handle)
            if time.monotonic() >= until:
                return None
            time.sleep(0.02)
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                raise OSError(error.errno, "its file system knows no locks; use a folder on another") from error
            raise


def _still(path: Path, handle: int) -> bool:
    try:
        there, mine = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def holder(path: Path) -> str:
    """Who has the lock file, in words: process, machine and since when."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def _let_go() -> None:
    """In a forked process: a lock is of the process that took it, and goes when that one ends, whatever its children do."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
