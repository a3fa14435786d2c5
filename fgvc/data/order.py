"""The order of an epoch's images, drawn from (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fgvc.rng import ORDER, generator

Key = tuple[int, int, int]  # epoch, row, turn: number of earlier samples of that row in the epoch


class EpochOrder:
    """Batches of keys for one rank: a pure function of seed, epoch and start.

    Without `labels` a permutation of `rows`; with `labels` as many rows drawn with replacement, each with probability
    1 / (classes that occur * rows of its class).
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        seed: int,
        *,
        batch_size: int,
        rank: int,
        world: int,
        labels: NDArray[np.int32] | None = None,
    ) -> None:
        self.rows, self.seed, self.batch_size, self.rank, self.world = rows, seed, batch_size, rank, world
        self.epoch = self.start = 0
        self.share: NDArray[np.float64] | None = None
        if labels is not None and len(labels):
            counts = np.bincount(labels)
            self.share = 1 / (np.count_nonzero(counts) * counts[labels])

    def __iter__(self) -> Iterator[list[Key]]:
        """The batches of this rank. A step's rows over all ranks are consecutive in the order, whatever the number of ranks."""
        epoch = self.epoch
        rng = generator(ORDER, self.seed, epoch)
        if self.share is None:
            order, turns = rng.permutation(self.rows), np.zeros(len(self.rows), np.int64)
        else:
            order = rng.choice(self.rows, len(self.rows), p=self.share)
            turns = _turns(order)
        together = self.batch_size * self.world
        for step in range(self.start, len(order) // together):
            mine = slice(step * together + self.rank, (step + 1) * together, self.world)
            yield [(epoch, row, turn) for row, turn in zip(order[mine].tolist(), turns[mine].tolist(), strict=True)]


def _turns(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of earlier elements equal to each element, (N,)."""
    by_row = np.argsort(order, kind="stable")
    first = np.searchsorted(order, order, sorter=by_row)  # where the run of equal elements begins
    turns = np.empty(len(order), np.int64)
    turns[by_row] = np.arange(len(order)) - first[by_row]
    return turns
