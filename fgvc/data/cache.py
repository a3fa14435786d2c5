"""Cache of decoded training images on disk: every image decoded and shrunk once, all in one memory-mapped file.

A cache is a folder <key>/ with `pixels.bin` (uint8 RGB, image after image) and `index.npz`. The key covers the paths,
sizes and times of the files and the shrinking, so a changed data set makes a new cache. A cache is built in a temporary folder
that is then renamed: it exists in full or not at all, and of two builders the first wins. Every image has its CRC-32: a damaged
one is decoded from its file, and the next opening rebuilds the cache.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import math
import os
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.data.index import ImageIndex, spread
from fgvc.errors import FgvcError, ImageError
from fgvc.io.files import cache_folder, file_lock, remove, sync, write_atomic

WHOLE = 2**31 - 1  # a shorter side that no image has: none is shrunk
_VERSION = 3
_LOCK = "building"  # held by the process that builds; a folder whose lock is free was left behind by a crash
_DAMAGED = "damaged"  # name of the file that marks a damaged cache
_QUIET_SECONDS = 10
_SAMPLE = 200  # images decoded to estimate the space needed

# What reading a damaged index.npz raises: its zip, or an array in it.
BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)

Progress = Callable[[str], None]
Decoded = tuple[Image.Image, tuple[int, int], int]
"""The shrunk image, the original's (width, height) upright, and its EXIF orientation."""


class DecodeCache:
    """Read access to a cache. Can be pickled, and shared by forked workers (the pages are shared too)."""

    def __init__(self, folder: Path, index: ImageIndex, *, side: int) -> None:
        """Open a built cache. Raises one of BROKEN if it is damaged."""
        self.folder, self._index, self._side = folder, index, side
        if (folder / _DAMAGED).exists():
            raise ValueError("an image of it is damaged")
        table = io.BytesIO((folder / "index.npz").read_bytes())
        with np.load(table, allow_pickle=False) as saved:  # a zip, which has checksums
            self.rows: NDArray[np.int64] = saved["rows"]
            self._offsets: NDArray[np.int64] = saved["offsets"]
            self._sizes: NDArray[np.int32] = saved["sizes"]  # (N,4): width and height here, then the original's
            self._orientations: NDArray[np.int8] = saved["orientations"]  # (N,), EXIF's
            self._sums: NDArray[np.uint32] = saved["sums"]  # (N,): CRC-32 of the pixels
            reasons = zip(saved["bad_rows"], saved["bad_reasons"], strict=True)
            self._bad = {int(row): str(reason) for row, reason in reasons}
        if (size := (folder / "pixels.bin").stat().st_size) != max(1, 3 * int(np.prod(self._sizes[:, :2], axis=1).sum())):
            raise ValueError(f"pixels.bin has {size} bytes")
        self._pixels: NDArray[np.uint8] | None = None

    @classmethod
    def open(
        cls,
        index: ImageIndex,
        rows: NDArray[np.int64],
        *,
        side: int,
        folder: Path | None = None,
        workers: int = 2,
        progress: Progress | None = None,
    ) -> DecodeCache:
        """The cache of these rows under `folder` (default: fgvc's folder in the user's cache), built if missing.

        Images whose shorter side is above `side` are shrunk to it; none is enlarged. `progress` gets a line of text now
        and then. Raises FgvcError when there is no room for it.
        """
        rows = np.unique(np.asarray(rows, dtype=np.int64))
        folder = cache_folder() if folder is None else folder.expanduser()
        final = folder / _key(index, rows, side)
        open_cache = partial(cls, final, index, side=side)
        cache = _open_whole(open_cache, final, progress)
        if cache is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(folder)
                _remove_damaged(open_cache, final)
                _build(index, rows, final, side=side, workers=workers, progress=progress)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise FgvcError(
                        f"{folder}: the disk is full; free some space, name another place by cache_dir, or set cache=none"
                    ) from error
                raise FgvcError(
                    f"{folder}: can't write the decode cache ({error.strerror or error}); name another place by cache_dir, or "
                    "set cache=none"
                ) from error
        return cache or open_cache()

    @property
    def bad(self) -> list[ImageError]:
        """The images that could not be read when the cache was built."""
        return [ImageError(self._index.path(row), reason) for row, reason in self._bad.items()]

    def image(self, row: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """The shrunk image of a row, uint8 (h,w,3) RGB, and the original's (width, height).

        The pixels are those of the memory map: don't write. Raises ImageError as `decode` did.
        """
        if row in self._bad:
            raise ImageError(self._index.path(row), self._bad[row])
        at = self._at(row)
        if self._pixels is None:
            # Copy on write: torch warns of arrays that can't be written to.
            self._pixels = np.memmap(self.folder / "pixels.bin", dtype=np.uint8, mode="c")
        width, height, *original = (int(side) for side in self._sizes[at])
        start = int(self._offsets[at])
        pixels = np.asarray(self._pixels[start : start + 3 * width * height])
        if len(pixels) != 3 * width * height or zlib.crc32(pixels.data) != self._sums[at]:
            return self._decoded(row)
        return pixels.reshape(height, width, 3), (original[0], original[1])

    def _decoded(self, row: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """An image decoded from its file, in place of its damaged copy in the cache."""
        if not (self.folder / _DAMAGED).exists():
            advice = "damaged images are decoded from their files, and the cache is rebuilt at the next start"
            print(f"{self.folder}: damaged; {advice}", file=sys.stderr)
            with contextlib.suppress(FgvcError):  # if it can't be written, the message comes again
                write_atomic(self.folder / _DAMAGED, b"")
        picture = self._index.picture(row)
        return np.array(shrunk(picture.image, self._side)), picture.size

    def orientation(self, row: int) -> int:
        """EXIF orientation (1 to 8) of the original; the cached image is upright."""
        return int(self._orientations[self._at(row)])

    def _at(self, row: int) -> int:
        at = int(np.searchsorted(self.rows, row))
        if at == len(self.rows) or self.rows[at] != row:
            raise KeyError(f"row {row} is not among the {len(self.rows)} of {self.folder}")
        return at

    def close(self) -> None:
        """Close the memory map; the next `image` opens it again."""
        self._pixels = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # or the whole file would be pickled


def _open_whole(open_cache: Callable[[], DecodeCache], final: Path, progress: Progress | None) -> DecodeCache | None:
    """An existing cache; None if it is missing or damaged."""
    if not final.exists():
        return None
    try:
        return open_cache()
    except BROKEN as error:
        if progress is not None:
            progress(f"{final}: the decode cache is damaged ({error}); it is built anew")
        return None


def _remove_damaged(open_cache: Callable[[], DecodeCache], final: Path) -> None:
    """Remove a damaged cache, unless another process has just rebuilt it."""
    if final.exists():
        with file_lock(lock := final.with_suffix(".lock"), wait=math.inf):
            if final.exists() and _open_whole(open_cache, final, None) is None:
                away = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".damaged", dir=final.parent))
                os.replace(final, away)
                shutil.rmtree(away)
            remove(lock)


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """Reduce `image` so that its shorter side is at most `side` pixels (Lanczos)."""
    scale = side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _key(index: ImageIndex, rows: NDArray[np.int64], side: int) -> str:
    return stamps(index, rows, f"{_VERSION} {side} {index.max_pixels}")[:24]


def stamps(index: ImageIndex, rows: NDArray[np.int64], salt: str = "") -> str:
    """SHA-256 over names, sizes and times of change of the rows' files, and over `salt`."""
    contents = index.contents
    digest = hashlib.sha256(f"{salt} {index.root.resolve()} {contents.stamp if contents else ''}".strip().encode())
    for row in rows.tolist():
        path = str(index.paths[row])
        if contents is not None:
            digest.update(f"\n{row} {contents.size(path)} {path}".encode())
            continue
        try:
            status = os.stat(index.root / path)
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            stamp = "missing"
        digest.update(f"\n{row} {stamp} {path}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _build(
    index: ImageIndex,
    rows: NDArray[np.int64],
    final: Path,
    *,
    side: int,
    workers: int,
    progress: Progress | None,
) -> None:
    building = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".tmp", dir=final.parent))

    def load(row: int) -> Decoded | ImageError:
        try:
            picture = index.picture(row)
        except ImageError as error:
            return error
        return shrunk(picture.image, side), picture.size, picture.orientation

    try:
        with file_lock(building / _LOCK), ThreadPoolExecutor(max(1, workers)) as pool:
            _check_space(final.parent, rows, load, pool)
            if progress is not None:
                progress(f"decoding {len(rows):,} images once, into {final.parent}")
            with (building / "pixels.bin").open("wb") as pixels:
                columns = _write(pixels, rows, _in_order(pool, load, rows.tolist()), progress)
                _to_disk(pixels)
            with (building / "index.npz").open("wb") as stream:
                np.savez(stream, rows=rows, **columns)
                _to_disk(stream)
            try:
                os.replace(building, final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return  # another builder was first: its cache is as good
            sync(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(
    pixels: BinaryIO, rows: NDArray[np.int64], images: Iterator[Decoded | ImageError], progress: Progress | None
) -> dict[str, Any]:
    offsets, sizes = np.zeros(len(rows), dtype=np.int64), np.zeros((len(rows), 4), dtype=np.int32)
    orientations = np.ones(len(rows), dtype=np.int8)
    sums = np.zeros(len(rows), dtype=np.uint32)
    bad_rows, bad_reasons, last = [], [], time.monotonic()
    for at, decoded in enumerate(images):
        offsets[at] = pixels.tell()
        if isinstance(decoded, ImageError):
            bad_rows.append(int(rows[at]))
            bad_reasons.append(decoded.reason)
        else:
            image, original, orientations[at] = decoded
            sizes[at] = *image.size, *original
            content = image.tobytes()
            sums[at] = zlib.crc32(content)
            pixels.write(content)
        if progress is not None and time.monotonic() > last + _QUIET_SECONDS:
            last = time.monotonic()
            progress(f"decoded {at + 1:,} of {len(rows):,} images")
    if not pixels.tell():
        pixels.write(b"\0")  # every image was bad: an empty file can't be mapped
    return {
        "offsets": offsets,
        "sizes": sizes,
        "orientations": orientations,
        "sums": sums,
        "bad_rows": np.array(bad_rows, dtype=np.int64),
        "bad_reasons": np.array(bad_reasons, dtype=np.str_),
    }


def _in_order(
    pool: ThreadPoolExecutor, load: Callable[[int], Decoded | ImageError], rows: list[int]
) -> Iterator[Decoded | ImageError]:
    """Results of `load` in the order of `rows`, with only a few in memory (`pool.map` would start all at once)."""
    waiting: deque[Future[Decoded | ImageError]] = deque()
    try:
        for row in rows:
            waiting.append(pool.submit(load, row))
            if len(waiting) > 16:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _check_space(
    folder: Path, rows: NDArray[np.int64], load: Callable[[int], Decoded | ImageError], pool: ThreadPoolExecutor
) -> None:
    sample = spread(rows, _SAMPLE)
    loaded = [decoded[0].size for decoded in _in_order(pool, load, sample.tolist()) if not isinstance(decoded, ImageError)]
    needed = int(1.1 * 3 * sum(w * h for w, h in loaded) / max(1, len(sample)) * len(rows))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FgvcError(
            f"{folder}: the decode cache needs about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: "
            "free some space, name another place by cache_dir, or set cache=none"
        )


def _remove_leftovers(folder: Path) -> None:
    """Delete the folders of builders that were killed: their lock is free."""
    for lock in folder.glob(f"*.tmp/{_LOCK}"):
        with contextlib.suppress(OSError, FgvcError), file_lock(lock) as dead:
            if dead:
                shutil.rmtree(lock.parent, ignore_errors=True)


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
