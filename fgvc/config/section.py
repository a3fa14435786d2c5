"""Base class of all settings, and types of values that several settings share. Settings modules don't import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

from fgvc.errors import FgvcError


class Section(BaseModel):
    """A section of a recipe: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name of a key -> its name today. The former name is an error that names today's."""

    has_base: ClassVar[bool] = False
    """Whether a file of it may name another one, `base:`, and say only what differs."""

    alternatives: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """A key -> those of a recipe's file that it replaces where it is given as an override."""

    absent: ClassVar[str] = ""
    """Why a key may be unknown that is spelt as it should be; empty where there is no reason."""


class Deferred:
    """Annotation of a field: a section, or null, whose class is imported when a value is given. `load` raises FgvcError where it
    can't be."""

    def __init__(self, load: Callable[[], type[Section]]) -> None:
        self.load = load

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> Section | None:
            if value is None:
                return None
            try:
                model = self.load()
            except FgvcError as error:
                raise ValueError(str(error)) from error
            return model.model_validate(value)

        def dump(value: Section | None, info: core_schema.SerializationInfo) -> dict[str, Any] | None:
            return None if value is None else value.model_dump(mode=info.mode)

        serialization = core_schema.plain_serializer_function_ser_schema(dump, info_arg=True)
        return core_schema.no_info_plain_validator_function(validate, serialization=serialization)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        model = handler(self.load().__pydantic_core_schema__)
        return {"anyOf": [model, {"type": "null"}], "default": None}


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


Size = Annotated[  # height, width
    tuple[int, int], BeforeValidator(_square, json_schema_input_type=int | tuple[int, int]), AfterValidator(_possible_size)
]
