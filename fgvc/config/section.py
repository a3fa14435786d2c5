"""Base class of all settings, and types of values that several settings share. Settings modules don't import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
)


class Section(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name of a key -> its name today. The former name is an error that names today's."""

    alternatives: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """A key -> those of a recipe's file that it replaces where it is given as an override."""


def _ordered_shares(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError("two shares above 0 and up to 1, the smaller first")
    return value


ShareRange = Annotated[tuple[float, float], AfterValidator(_ordered_shares)]
"""Bounds of a uniform draw: two shares in (0,1]."""


def _square(size: object) -> object:
    if isinstance(size, int):
        return size, size
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"one number for a square, or [height, width]; not {size!r}")
    return size


def _possible_size(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) < 8 or max(size) > 4096:
        raise ValueError(f"between 8 and 4096 pixels a side, not {size}")
    return size


Size = Annotated[tuple[int, int], BeforeValidator(_square), AfterValidator(_possible_size)]  # height, width
