"""Messages for settings that are not valid: file and line or override, key path, what it must be, the nearest valid key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from fgvc.config.section import Section
from fgvc.config.shape import models_in, models_of, tag_of
from fgvc.config.usual import usual_key, usual_value
from fgvc.io.names import nearest

Keys = tuple[str, ...]


def without_other_members(
    model: type[BaseModel], tree: Mapping[str, Any], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """pydantic's errors without those of the members of a union that are of another type than the value, where another member
    is of its type."""

    def is_of_type(row: Mapping[str, Any]) -> bool:
        return str(row["type"]).endswith(("_type", "_parsing", "_from_float"))

    paths = [tuple(key_path(model, tree, tuple(row["loc"]))[0]) for row in rows]
    fits = [path for path, row in zip(paths, rows, strict=True) if not is_of_type(row)]

    def belongs(path: tuple[str | int, ...], row: Mapping[str, Any]) -> bool:
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        return not (is_of_type(row) and (deeper or path in fits))

    return [row for path, row in zip(paths, rows, strict=True) if belongs(path, row)]


def explain(
    model: type[BaseModel],
    tree: Mapping[str, Any],
    row: dict[str, Any],
    where: str,
    places: Mapping[Keys, str],
    overridden: Mapping[Keys, str],
) -> str:
    """One of pydantic's errors as a line: file and line or override, key path, message."""
    loc, models = key_path(model, tree, tuple(row["loc"]))
    names = tuple(str(key) for key in loc)
    source = where
    for end in range(len(names), 0, -1):
        deeper = next((text for keys, text in overridden.items() if keys[:end] == names[:end]), None)
        if deeper is not None and names[:end] not in places:
            source = f"override {deeper!r}"
            break
        if names[:end] in overridden:
            source = f"override {overridden[names[:end]]!r}"
            break
        if names[:end] in places:
            source = places[names[:end]]
            break
    message = _unknown(model, names, models) if row["type"] == "extra_forbidden" else _in_words(names, row)
    return f"{source}: {'.'.join(names) or 'recipe'}: {message}"


def _unknown(model: type[BaseModel], names: Keys, models: Sequence[type[BaseModel]]) -> str:
    """The message for a key that none of the section classes `models` has; `names`: the keys on the way to it from `model`."""
    key = names[-1]
    renamed = {old: new for m in models if issubclass(m, Section) for old, new in m.renamed.items()}
    if key in renamed:
        return f"is called {renamed[key]!r} now"
    fields = sorted({name for m in models for name in m.model_fields})
    near = nearest(key, fields)
    hint = usual_key(model, names)
    if hint and not (near and hint == f"did you mean {'.'.join((*names[:-1], near[0]))}?"):
        return f"unknown key; {hint}"
    absent = next((m.absent for m in models if issubclass(m, Section) and m.absent), "")
    if near:
        return f"unknown key; did you mean {near[0]!r}?" + f" If not, {absent}" * bool(absent)
    return f"unknown key{absent and f', or {absent}'}; valid here: {', '.join(fields)}"


def _in_words(names: Keys, row: Mapping[str, Any]) -> str:
    """The message for an invalid value: what it must be, and what it is."""
    kind, limits = row["type"], row.get("ctx", {})
    if kind == "missing":
        return "missing; give it a value"
    if kind in ("value_error", "union_tag_invalid", "union_tag_not_found"):  # their messages name the value
        return str(row["msg"]).removeprefix("Value error, ")
    must = _MUST[kind].format(**limits) if kind in _MUST else str(row["msg"]).replace("Input should be", "must be", 1)
    hint = usual_value(names, row["input"]) if kind in ("model_type", "model_attributes_type") else ""
    return f"{must} (got {row['input']!r})" + f"; {hint}" * bool(hint)


_MUST = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping of keys",
    "model_attributes_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "path_type": "must be a path",
}
"""pydantic's error types in this project's words; other types keep pydantic's message."""


def key_path(
    model: type[BaseModel], tree: Mapping[str, Any], loc: tuple[str | int, ...]
) -> tuple[list[str | int], list[type[BaseModel]]]:
    """pydantic's location of an error without its tags of unions, and the section classes that may hold the last key."""
    path: list[str | int] = []
    valid: list[type[BaseModel]] = [model]
    models: list[type[BaseModel]] = [model]
    for key in loc:
        members = [m for m in models if tag_of(m) == key]
        if members and len(models) > 1:
            models = valid = members
            continue
        if isinstance(key, int):  # of a list
            path.append(key)
            continue
        field = next((m.model_fields[key] for m in models if isinstance(key, str) and key in m.model_fields), None)
        if field is None and (not models or str(key).startswith(("function-", "constrained-"))):
            continue
        path.append(key)
        if field is None:
            break
        items = get_args(field.annotation) if get_origin(field.annotation) is tuple else ()
        models = models_of(field) or (models_in(items[0]) if items else [])
        valid = models or valid
    return path, valid
