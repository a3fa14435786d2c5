"""Files of erasing masks that grow round by round: a small grid of bits for every image, in the run's folder."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgvc.io.files import append, remove, write_atomic, writing

GRID = 32  # cells a side, over the whole image
BYTES = GRID * GRID // 8

Grids = NDArray[np.bool_]  # (B,GRID,GRID)
Masks = NDArray[np.uint8]  # (images,BYTES)


class MaskRounds:
    """Masks of each round, in a folder.

    `round-1.npy`, `round-2.npy`...: (images, BYTES) uint8, each the union with the round before; `rounds.json` has the epoch
    before which each was made, and its SHA-256. Of a round that was not finished `round-N.partial` holds the images that are
    done: a line for some of them, with its own SHA-256, after one that names the epoch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[int, Masks] | None = None

    def path(self, number: int) -> Path:
        return self.folder / f"round-{number}.npy"

    def grids(self, number: int, rows: NDArray[np.int64]) -> Grids:
        """Cells of these images that are erased in a round; none in round 0."""
        if number == 0:
            return np.zeros((len(rows), GRID, GRID), dtype=np.bool_)
        if self._open is None or self._open[0] != number:
            self._open = number, np.load(self.path(number), mmap_mode="r")
        return np.unpackbits(self._open[1][rows], axis=1).view(np.bool_).reshape(-1, GRID, GRID)

    def paint(self, number: int, image: NDArray[np.uint8], row: int, colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Fill a round's cells of the image (H,W,3) of a row with one colour, in place."""
        grid = self.grids(number, np.array([row]))[0]
        down, across = (np.arange(side) * GRID // side for side in image.shape[:2])
        image[grid[down][:, across]] = colour
        return image

    def whole(self, number: int, *, epoch: int | None = None) -> Masks | None:
        """Masks of a round if their file is undamaged, and was made before this epoch (None: any); else None."""
        try:
            record = json.loads((self.folder / "rounds.json").read_text(encoding="utf-8"))[str(number)]
            content = self.path(number).read_bytes()
            if hashlib.sha256(content).hexdigest() != record["sha256"] or epoch not in (None, record["epoch"]):
                return None
            return np.load(io.BytesIO(content))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, number: int, masks: Masks, *, epoch: int) -> None:
        """Write a round. Raises FgvcError where the disk is full."""
        content = io.BytesIO()
        np.save(content, masks)
        digest = write_atomic(self.path(number), content.getvalue())
        write_atomic(self.folder / "rounds.json", json.dumps(self._records() | {number: {"epoch": epoch, "sha256": digest}}))
        self._open = None

    def _records(self) -> dict[Any, Any]:
        try:
            records = json.loads((self.folder / "rounds.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {int(key): value for key, value in records.items()} if isinstance(records, dict) else {}

    def make(
        self,
        number: int,
        *,
        epoch: int,
        images: int,
        rows: NDArray[np.int64],
        erase: Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Grids]]],
    ) -> None:
        """Make a round: `erase` yields the rows that are left, some at a time and in order, and their erased cells.

        Killed at any moment and called again before the same `epoch`, it resumes. Raises FgvcError where the disk is full.
        """
        partial = self.folder / f"round-{number}.partial"
        lines = _whole_lines(partial, epoch)
        write_atomic(partial, b"".join(line + b"\n" for line in (_line(epoch, b""), *lines)))
        done = b"".join(base64.b64decode(line.split()[2]) for line in lines)
        masks, finished = np.zeros((images, BYTES), dtype=np.uint8), len(done) // BYTES
        masks[rows[:finished]] = np.frombuffer(done, dtype=np.uint8).reshape(-1, BYTES)
        for batch, grids in erase(rows[finished:]):
            masks[batch] = np.packbits(grids.reshape(-1, GRID * GRID), axis=1)
            append(partial, _line(epoch, masks[batch].tobytes()))
        self.put(number, masks, epoch=epoch)
        with writing(partial):
            remove(partial)


def _line(epoch: int, content: bytes) -> bytes:
    text = f"{epoch} ".encode() + base64.b64encode(content)
    return hashlib.sha256(text).hexdigest().encode() + b" " + text


def _whole_lines(partial: Path, epoch: int) -> list[bytes]:
    """Undamaged lines after the first, up to one that is torn or damaged; none of another epoch."""
    lines = partial.read_bytes().splitlines() if partial.is_file() else []
    good: list[bytes] = []
    for line in lines:
        digest, _, text = line.partition(b" ")
        if hashlib.sha256(text).hexdigest().encode() != digest or text.partition(b" ")[0] != str(epoch).encode():
            break
        good.append(line)
    return good[1:]
