"""Cache of a teacher's logits on disk, for later runs with the same images."""

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

GEOMETRY = 6  # numbers of a crop's matrix
CHUNK = 1 << 20  # numbers written at once


class LogitFile:
    """File of (N, 6 + K + 1) float32, a row for each image of the index: the crop's 2x3 matrix, the logits, and the CRC-32 of
    both in the bits of the last; NaN: missing.

    A row is valid for its very crop: with another matrix, as of an image that replaces an unreadable one, it is missing. So is a
    row that a killed process wrote in part, or that is damaged: its CRC-32 is wrong. Processes of one machine may share the file.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """Open `path` for `shape` (N, K). Raises FgvcError where it can't be written or is too small."""
        try:
            self._rows = np.memmap(path, dtype=np.float32, mode="r+", shape=(shape[0], GEOMETRY + shape[1] + 1))
        except (OSError, ValueError) as error:
            raise FgvcError(f"{path}: can't cache logits here: {error}") from error

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
        """Logits (B,K) of crops that are all in the file, else None; `rows` (B,) of the index, `geometry` (B,2,3)."""
        whole = np.asarray(self._rows[rows.cpu().numpy()])
        numbers = np.ascontiguousarray(whole[:, :-1])
        if not np.array_equal(whole[:, -1:].view(np.uint32), _sums(numbers)):
            return None
        same = np.array_equal(numbers[:, :GEOMETRY], _flat(geometry))  # NaN equals nothing
        return torch.from_numpy(numbers[:, GEOMETRY:]) if same and not np.isnan(numbers).any() else None

    def record(self, rows: Tensor, geometry: Tensor, logits: Tensor) -> None:
        """Write the logits (B,K) of crops; `rows` (B,) of the index, `geometry` (B,2,3)."""
        numbers = np.concatenate([_flat(geometry), logits.cpu().float().numpy()], axis=1)
        self._rows[rows.cpu().numpy()] = np.concatenate([numbers, _sums(numbers).view(np.float32)], axis=1)


def open_logits(
    folder: Path, facts: str, epoch: int, shape: tuple[int, int], *, first: Callable[[Callable[[], None]], None]
) -> LogitFile:
    """Open one teacher's file for an epoch, in a folder named by all the `facts` that its logits depend on; made by the first
    process while the others wait."""
    path = folder / hashlib.sha256(facts.encode()).hexdigest()[:32] / f"epoch-{epoch:04d}.f32"
    first(partial(LogitFile.make, path, shape))
    return LogitFile(path, shape)


def _flat(geometry: Tensor) -> np.ndarray:
    return geometry.cpu().float().flatten(1).numpy()


def _sums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 (B,1) uint32 of each row (B,M)."""
    return np.array([[zlib.crc32(row.tobytes())] for row in rows], dtype=np.uint32)
