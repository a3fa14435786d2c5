"""Logits that are kept on the disk for the next run that sees the same images."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgvc.errors import FgvcError
from fgvc.io.files import replacing, sync

GEOMETRY = 6  # numbers that say which crop it was
CHUNK = 1 << 20  # numbers written at once


class LogitFile:
    """(N, 6 + K + 1) float32, a row for each image of the index: the crop's 2x3 matrix, the logits, and the CRC-32 of both in
    the bits of the last; NaN: not known.

    A row holds for its very crop: another matrix, as of an image that stands in for an unreadable one, is not known. A row
    that a killed process wrote in part, or that is damaged, does not have its CRC-32, so it is not known either. Processes of
    one machine may share it.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """`shape`: N, K. Raises FgvcError where `path` can't be written or was made for less."""
        try:
            self._rows = np.memmap(path, dtype=np.float32, mode="r+", shape=(shape[0], GEOMETRY + shape[1] + 1))
        except (OSError, ValueError) as error:
            raise FgvcError(f"{path}: can't keep logits here: {error}") from error

    @staticmethod
    def make(path: Path, shape: tuple[int, int]) -> None:
        """Make the file, or leave it if it is there and whole. Raises FgvcError where the disk is full."""
        numbers = shape[0] * (GEOMETRY + shape[1] + 1)
        if path.is_file() and path.stat().st_size == 4 * numbers:
            return
        with replacing(path) as scratch:
            path.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:  # written, not only sized: a map of a full disk would end the process
                for start in range(0, numbers, CHUNK):
                    file.write(np.full(min(CHUNK, numbers - start), np.nan, dtype=np.float32).tobytes())
            sync(scratch)

    def recall(self, rows: Tensor, geometry: Tensor) -> Tensor | None:
        """(B,K) of crops that are all known, else None; `rows` (B,) of the index, `geometry` (B,2,3)."""
        whole = np.asarray(self._rows[rows.cpu().numpy()])
        held = np.ascontiguousarray(whole[:, :-1])
        if not np.array_equal(whole[:, -1:].view(np.uint32), _sums(held)):
            return None
        same = np.array_equal(held[:, :GEOMETRY], _flat(geometry))  # NaN equals nothing
        return torch.from_numpy(held[:, GEOMETRY:]) if same and not np.isnan(held).any() else None

    def keep(self, rows: Tensor, geometry: Tensor, logits: Tensor) -> None:
        told = np.concatenate([_flat(geometry), logits.cpu().float().numpy()], axis=1)
        self._rows[rows.cpu().numpy()] = np.concatenate([told, _sums(told).view(np.float32)], axis=1)


def open_logits(
    folder: Path, facts: str, epoch: int, shape: tuple[int, int], *, first: Callable[[Callable[[], None]], None]
) -> LogitFile:
    """One teacher's file for an epoch, in a folder named by all the `facts` that its logits depend on; made by the first
    process while the others wait."""
    path = folder / hashlib.sha256(facts.encode()).hexdigest()[:32] / f"epoch-{epoch:04d}.f32"
    first(partial(LogitFile.make, path, shape))
    return LogitFile(path, shape)


def _flat(geometry: Tensor) -> np.ndarray:
    return geometry.cpu().float().flatten(1).numpy()


def _sums(rows: np.ndarray) -> np.ndarray:
    """(B,1) uint32: the CRC-32 of each row (B,M)."""
    return np.array([[zlib.crc32(row.tobytes())] for row in rows], dtype=np.uint32)
