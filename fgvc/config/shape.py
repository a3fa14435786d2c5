"""Section classes behind the fields of settings, members of unions and deferred ones included."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fgvc.config.section import Deferred
from fgvc.errors import FgvcError


def tag_of(model: type[BaseModel]) -> object:
    """The value of `kind` that selects a section class in a union; None if it has no `kind`."""
    kind = model.model_fields.get("kind")
    return kind.default if isinstance(kind, FieldInfo) else None


def models_of(field: FieldInfo) -> list[type[BaseModel]]:
    """The section classes of a field. One that is deferred is imported; where it can't be there is none."""
    deferred: list[type[BaseModel]] = []
    for mark in field.metadata:
        if isinstance(mark, Deferred):
            with suppress(FgvcError):
                deferred.append(mark.load())
    return [*deferred, *models_in(field.annotation)]


def is_section(field: FieldInfo) -> bool:
    """Whether a field's value is a section; nothing is imported."""
    return bool(models_in(field.annotation)) or any(isinstance(mark, Deferred) for mark in field.metadata)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes in an annotation: the class itself, or the members of a union."""
    if get_origin(annotation) is Annotated:
        return models_in(get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, type(int | str)):
        return [m for member in get_args(annotation) for m in models_in(member)]
    return []
