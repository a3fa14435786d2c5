"""Means of a step's losses over an epoch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Running sums of scalars and counts of finite ones, on the scalars' device: nothing waits for it until they are read.

    A value that is not finite is left out: a measure of no image is none. Sums are float64 (float32 on devices without it).
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars by name; which there are may differ from step to step."""
        for name, scalar in values.items():
            value = scalar.detach().float()
            if value.device.type != "mps":
                value = value.double()
            finite = value.isfinite()
            self._sums[name] = _continued(self._sums.get(name), torch.where(finite, value, 0))
            self._counts[name] = _continued(self._counts.get(name), finite.long())

    def undefined(self) -> list[str]:
        """Return the scalars that were finite in no step. Waits for the device."""
        return [name for name, count in self._counts.items() if not count]

    def restore(self, sums: Mapping[str, float], counts: Mapping[str, int]) -> None:
        """Continue from the sums and counts that `read` returned."""
        self._sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
        self._counts = {name: torch.tensor(counts[name]) for name in sums}

    def read(self) -> tuple[dict[str, float], dict[str, int]]:
        """Return sum and count of each scalar that was finite at least once. Waits for the device."""
        counts = {name: int(count) for name, count in self._counts.items()}
        return {name: float(self._sums[name]) for name in counts if counts[name]}, {n: c for n, c in counts.items() if c}

    def means(self) -> dict[str, float]:
        """Return the mean of each scalar. Waits for the device."""
        sums, counts = self.read()
        return {name: value / counts[name] for name, value in sums.items()}


def _continued(sum_so_far: Tensor | None, value: Tensor) -> Tensor:
    """Add a step's value, in its type and on its device: a sum that was restored is of another."""
    return value if sum_so_far is None else sum_so_far.to(value) + value
