"""Recording in one pass over all images: the logits of a sample of them, and whether each answer is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.data.loader import EvaluationBatch


class Sample:
    """Wrapper of a net that records its outputs; each batch is given to `add_batch` before the net gets its images."""

    def __init__(self, net: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> None:
        self.net, self.rows = net, rows
        self._in_sample = torch.zeros(0, dtype=torch.bool)  # images of the present batch in the sample
        self._batch_labels = torch.zeros(0, dtype=torch.int64)  # of the present batch
        self._right: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add_batch(self, batch: EvaluationBatch) -> None:
        """Note the batch whose images the net gets next."""
        self._in_sample, self._batch_labels = torch.from_numpy(np.isin(batch.index.numpy(), self.rows)), batch.labels
        self._labels.append(batch.labels[self._in_sample])

    def __call__(self, x: Tensor) -> Tensor:
        z = self.net(x)
        logits = z.float().cpu()
        self._right.append(logits.argmax(1) == self._batch_labels)
        self._logits.append(logits[self._in_sample])
        return z

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each answer (N,) is right, for all images in their order."""
        return torch.cat(self._right).numpy()

    @property
    def answers(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logits (M,K) and labels (M,) of the sample."""
        return torch.cat(self._logits).numpy(), torch.cat(self._labels).numpy()
