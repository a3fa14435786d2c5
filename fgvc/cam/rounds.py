"""Erasing masks that grow round by round: one small grid of bits for every image of a set, in the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from fgvc.disk import sync, writing

GRID = 32  # cells a side, over the whole image
BYTES = GRID * GRID // 8

Grids = NDArray[np.bool_]  # (B,GRID,GRID)


class MaskRounds:
    """`round-1.npy`, `round-2.npy`...: (images, BYTES) uint8, each the union with the round before. A round that was not
    finished is `round-N.partial.npy`, with the number of images that are done in `round-N.done`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[int, NDArray[np.uint8]] | None = None

    def path(self, number: int) -> Path:
        return self.folder / f"round-{number}.npy"

    def grids(self, number: int, rows: NDArray[np.int64]) -> Grids:
        """What is erased of these images in a round; nothing in round 0."""
        if number == 0:
            return np.zeros((len(rows), GRID, GRID), dtype=np.bool_)
        if self._open is None or self._open[0] != number:
            self._open = number, np.load(self.path(number), mmap_mode="r")
        return np.unpackbits(self._open[1][rows], axis=1).view(np.bool_).reshape(-1, GRID, GRID)

    def make(
        self,
        number: int,
        *,
        images: int,
        rows: NDArray[np.int64],
        find: Callable[[NDArray[np.int64]], Iterator[tuple[NDArray[np.int64], Grids]]],
    ) -> None:
        """Fill a round: `find` gives, for the rows that are left, some at a time and in order, what is erased of them.

        Killed at any moment and called again, it goes on. Raises FgvcError where the disk is full.
        """
        partial, done = self.folder / f"round-{number}.partial.npy", self.folder / f"round-{number}.done"
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            finished = int(done.read_text() or 0) if done.is_file() and partial.is_file() else 0
            if not finished:
                done.unlink(missing_ok=True)
                open_memmap(partial, mode="w+", dtype=np.uint8, shape=(images, BYTES)).flush()
            masks = np.load(partial, mmap_mode="r+")
        for found, grids in find(rows[finished:]):
            masks[found] = np.packbits(grids.reshape(-1, GRID * GRID), axis=1)
            finished += len(found)
            with writing(self.folder):
                masks.flush()
                scratch = done.with_suffix(".next")
                scratch.write_text(str(finished))
                scratch.replace(done)
        with writing(self.folder):
            masks.flush()
            sync(partial)
            partial.replace(self.path(number))
            done.unlink(missing_ok=True)
