"""Values of settings that change in the course of a run."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, Field

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Value = float | tuple[tuple[float, float], ...]


def _ordered(value: Value) -> Value:
    if isinstance(value, tuple):
        shares = [share for share, _ in value]
        if not shares or any(b <= a for a, b in pairwise(shares)):
            raise ValueError("give [[share of the run, value], ...] with the shares increasing")
    return value


Scheduled = Annotated[Amount | tuple[tuple[Share, Amount], ...], AfterValidator(_ordered)]
"""A number, or knots [[share of the run, value], ...] with straight lines between them."""


def _share(value: Value) -> Value:
    if ever(value, above=1):
        raise ValueError("a share is at most 1")
    return value


ScheduledShare = Annotated[Scheduled, AfterValidator(_share)]
"""A `Scheduled` whose values are at most 1."""


def ever(value: Value, *, above: float = 0) -> bool:
    """Whether the value is above a bound at any time of the run."""
    return any(value_at(value, share) > above for share in knot_positions(value))


def knot_positions(value: Value) -> list[float]:
    """The shares of the run at which a value is given."""
    return [share for share, _ in value] if isinstance(value, tuple) else [0.0]


def value_at(value: Value, progress: float) -> float:
    """The value at `progress`, the share of train.epochs that is done; constant before the first knot and after the last."""
    if not isinstance(value, tuple):
        return value
    shares, values = zip(*value, strict=True)
    return float(np.interp(progress, shares, values))
