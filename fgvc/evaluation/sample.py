"""What is kept while all images are scored, in one pass: the logits of some of them, and of all whether they were right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.data.loader import EvaluationBatch


class Sample:
    """Stands between a loader and a net: `see` each batch before the net answers it."""

    def __init__(self, net: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> None:
        self.net, self.rows = net, rows
        self._mine = torch.zeros(0, dtype=torch.bool)  # which of the batch that is on its way
        self._truth = torch.zeros(0, dtype=torch.int64)  # of that batch
        self._right: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []

    def see(self, batch: EvaluationBatch) -> None:
        self._mine, self._truth = torch.from_numpy(np.isin(batch.index.numpy(), self.rows)), batch.labels
        self._labels.append(batch.labels[self._mine])

    def __call__(self, x: Tensor) -> Tensor:
        z = self.net(x)
        said = z.float().cpu()
        self._right.append(said.argmax(1) == self._truth)
        self._logits.append(said[self._mine])
        return z

    @property
    def right(self) -> NDArray[np.bool_]:
        """(N,) of all images that were seen, in their order."""
        return torch.cat(self._right).numpy()

    @property
    def answers(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits (M,K) and labels (M,) of the sample."""
        return torch.cat(self._logits).numpy(), torch.cat(self._labels).numpy()
