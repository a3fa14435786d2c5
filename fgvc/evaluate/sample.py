"""The logits of some of the images, kept while all of them are scored: one pass, and memory for the sample alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.data.loader import EvaluationBatch
from fgvc.evaluate.calibration import Calibrated, calibrate


class Sample:
    """Stands between a loader and a net: `see` each batch before the net answers it."""

    def __init__(self, net: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> None:
        self.net, self.rows = net, rows
        self._mine = torch.zeros(0, dtype=torch.bool)  # which of the batch that is on its way
        self._labels: list[Tensor] = []
        self._logits: list[Tensor] = []

    def see(self, batch: EvaluationBatch) -> None:
        self._mine = torch.from_numpy(np.isin(batch.index.numpy(), self.rows))
        self._labels.append(batch.labels[self._mine])

    def __call__(self, x: Tensor) -> Tensor:
        z = self.net(x)
        self._logits.append(z.float().cpu()[self._mine])
        return z

    def calibrated(self) -> Calibrated | None:
        """None where there is nothing to calibrate: no image of the sample, or logits that are not finite."""
        if not self._logits:
            return None
        logits, labels = torch.cat(self._logits), torch.cat(self._labels)
        return calibrate(logits.numpy(), labels.numpy()) if len(labels) and logits.isfinite().all() else None
