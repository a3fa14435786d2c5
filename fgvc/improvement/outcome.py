"""Outcome of a rung of the ladder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Status = Literal["done", "dropped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Outcome of a rung."""

    status: Status
    reason: str = ""
    right: int = 0  # of the images that choose
    of: int = 0
    seconds: float = 0.0  # that it took
    share: float = 1.0  # of the way from its start to its end, where it is best: that is what is right

    @property
    def accuracy(self) -> float:
        return self.right / self.of if self.of else math.nan
