"""Atomic writes of files and folders, file locks, and errors that name the path that can't be written.

Every file of a run is written by `write_atomic`, `fill` or `append`, and renamed or deleted by the functions here.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO, overload

from fgvc.errors import FgvcError

StrPath = str | os.PathLike[str]
"""A path as text, or what has one: `pathlib.Path`, a run, a bundle."""

Content = str | bytes | Callable[[BinaryIO], object]
"""Content of a file: text (UTF-8), bytes, or a function that writes all of it to an open file."""

BUFFER = 1 << 20
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_SCRATCH = re.compile(r"\.\d+\.")
_lock_handles: set[int] = set()  # of the locks that this process holds


@overload
def as_path(path: StrPath) -> Path: ...
@overload
def as_path(path: StrPath | None) -> Path | None: ...
def as_path(path: StrPath | None) -> Path | None:
    """A path as a `Path`; None stays None."""
    return None if path is None else Path(path)


def as_paths(paths: StrPath | Iterable[StrPath]) -> list[Path]:
    """One path, or several, as a list."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def cache_folder() -> Path:
    """The user's cache folder, for what can be recomputed: `$XDG_CACHE_HOME/fgvc`, or `~/.cache/fgvc`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fgvc"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise FgvcError naming the file for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise FgvcError(f"{path}: can't write: {error.strerror or error}") from error


def refuse_place(path: Path) -> None:
    """Raise FgvcError if nothing can be created at `path`: a parent is a file, the name is too long, or the right to write is
    missing. Call it before long work."""
    with writing(path):
        with suppress(FileNotFoundError):
            os.stat(path)
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OSError(f"{parent} is {'not writable' if parent.is_dir() else 'a file'}")


def refuse_file(out: Path) -> None:
    """Raise FgvcError if no file can be written at `out`: it is a folder, or `refuse_place` refuses it."""
    if out.is_dir():
        raise FgvcError(f"{out}: is a folder; name a file to write")
    refuse_place(out)


def write_atomic(path: Path, content: Content) -> str:
    """Replace a file atomically: no reader, kill or power cut ever leaves half of it. A missing folder is created.
    Returns the SHA-256 of the content. Raises FgvcError if it can't be written; the old file stays intact."""
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
    """Write a file that nobody reads yet, such as one in a folder of `making`, and wait until it is on the disk. Returns the
    SHA-256 of the content."""
    with _Hashing(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)) as file:
        if callable(content):
            with io.BufferedWriter(file, BUFFER) as stream:
                content(stream)
                stream.flush()
                return file.finish()
        # The names of folders need not be UTF-8.
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", errors="backslashreplace"))
        return file.finish()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits. Raises OSError where it can't be read."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_json(value: Any) -> str:
    """`value` as the text of a JSON file; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(finite_or_none(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite_or_none(value: Any) -> Any:
    """A copy of a nested value with None in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(inner) for inner in value]
    real = isinstance(value, Real) and not isinstance(value, int)  # numpy's, too
    return None if real and not math.isfinite(value) else value


class _Hashing(io.RawIOBase):
    """A raw file that computes the SHA-256 of all that is written to it."""

    def __init__(self, handle: int) -> None:
        self._handle, self._digest = handle, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._digest.update(view)
        _put(self._handle, view)
        return len(view)

    def finish(self) -> str:
        """Wait until the file is on the disk; its SHA-256."""
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
    """Append a line to a file; a last line that a kill left incomplete is ended first. Raises FgvcError on a failed write."""
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            _put(handle, (b"\n" if torn else b"") + line + b"\n")
        finally:
            os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents."""
    if not folder.is_dir():
        make_folder(folder.parent)
        with suppress(FileExistsError):
            os.mkdir(folder)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with its content; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        for entry in list(path.iterdir()):
            remove(entry)
        os.rmdir(path)
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def remove_empty(folder: Path) -> None:
    """Delete a folder if it is empty."""
    with suppress(OSError):
        os.rmdir(folder)


def replace_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` atomically, in place of an older link."""
    scratch = _beside(link)
    remove(scratch)
    os.symlink(target, scratch, target_is_directory=True)
    os.replace(scratch, link)


def rename(path: Path, new: Path) -> None:
    """Rename a file or folder, and wait until the new name is on the disk."""
    os.replace(path, new)
    sync(new.parent)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder. Nobody may be writing there."""
    for path in [path for path in folder.glob(".*") if _SCRATCH.match(path.name) and not path.is_dir()]:
        remove(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix of `path`, for a library to write to; it replaces `path` when the block ends.
    Raises FgvcError if it can't be written. The old file stays intact on an error."""
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
    """A temporary folder to `fill` with files; it becomes `folder` when the block ends, or is deleted on an error. Raises
    FgvcError if `folder` exists already or can't be written."""
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
def file_lock(path: Path, *, wait: float = 0.0) -> Iterator[bool]:
    """Lock a file; yields whether this process got the lock. `wait`: seconds to try for, math.inf for as long as it takes.

    The system releases the lock when the process ends, however it ends. The file's text names its holder: see `holder`.
    Raises FgvcError if the file can't be created or the file system has no locks.
    """
    with writing(path):
        handle = _acquire(path, time.monotonic() + wait)
    if handle is None:
        yield False
        return
    _lock_handles.add(handle)
    try:
        yield True
    finally:
        if handle in _lock_handles:
            _lock_handles.remove(handle)
            os.ftruncate(handle, 0)
            os.close(handle)


def _acquire(path: Path, until: float) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # keeps the text that names its holder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(path, handle):  # not removed meanwhile by a holder that released it
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


def _same_file(path: Path, handle: int) -> bool:
    """Whether `path` still names the file that is open as `handle`."""
    try:
        on_disk, opened = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (on_disk.st_dev, on_disk.st_ino) == (opened.st_dev, opened.st_ino)


def holder(path: Path) -> str:
    """The holder of a lock file, in words: process, machine and time of locking."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"


def _release_in_child() -> None:
    """Close the locks in a forked child: a lock belongs to the process that took it and ends with that process."""
    for handle in _lock_handles:
        with suppress(OSError):
            os.close(handle)
    _lock_handles.clear()


os.register_at_fork(after_in_child=_release_in_child)
