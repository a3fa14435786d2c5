"""Pages of the reference, made from the code: settings by their pydantic models, verbs by typer, files of a bundle.

`python docs/tables.py` puts them between their marks in `docs/reference/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from typer.main import get_command

from fgvc.cli.app import DATA_VERBS, VERBS, app
from fgvc.config.calibration import Calibration
from fgvc.config.images import Deploy, Preprocess
from fgvc.config.recipe import CLIP, PRETRAINED, Recipe
from fgvc.config.techniques import load_object, settings_by_kind
from fgvc.runtime.bundle import MANIFEST, OPTIONAL, REQUIRED

Schema = Mapping[str, Any]
PREFIX = "#/$defs/"
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def table(*rows: tuple[str, ...]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |\n" for row in lines
    )


def settings() -> str:
    """Every setting of a recipe, section by section; techniques have a page of their own."""
    schema = Recipe.model_json_schema()
    sections = {key: field for key, field in schema["properties"].items() if key != "techniques"}
    alone = {key: field for key, field in sections.items() if not _models(field, schema)}
    parts = [_keys("", alone, schema["required"], schema), _pretrained()]
    parts += [part for key, field in sections.items() if key not in alone for part in _section(key, field, schema)]
    return "\n".join(parts)


def techniques() -> str:
    """What each technique does, where it comes from, and its settings."""
    parts = []
    for kind, model in settings_by_kind().items():
        made, schema = load_object(model.technique), model.model_json_schema()
        rows = {key: field for key, field in schema["properties"].items() if key != "kind"}
        parts += [
            f"## {kind}\n\n{_text(schema)}\n\n{made.source}. Forwards that it adds to a step: {made.forwards}. In the deployed "
            f"graph it leaves {made.leaves}.\n",
            _keys(f"techniques.{kind}.", rows, schema.get("required", ()), schema),
        ]
        parts += [
            part for key, field in rows.items() for part in _section(f"techniques.{kind}.{key}", field, schema, depth=3)
        ]
    return "\n".join(parts)


def _pretrained() -> str:
    """The defaults that depend on the first weights."""
    rows = [
        (f"`{part}.{key}`", f"`{_shown(value)}`") for part, keys in PRETRAINED.items() for key, value in keys.items()
    ]
    rows.append(("`optim.clip_grad`", f"`{_shown(CLIP)}`"))
    return (
        "With pretrained weights (`model.weights` is not `none`) these are the defaults in place of those below; an optimizer "
        "that the recipe names keeps its own, and a run's weights (`model.weights: RUN/ckpt/...`) keep their head:\n\n"
        + table(("setting", "default"), *rows)
    )


def _section(path: str, field: Schema, schema: Schema, *, depth: int = 2) -> Iterator[str]:
    """A heading and the keys of what a field holds; of several kinds, what they share comes first."""
    models = _models(field, schema)
    if not models:
        return
    shared = [
        key
        for key, value in models[0]["properties"].items()
        if len(models) > 1 and all(_same(model, key, value, models[0]) for model in models)
    ]
    about = _text(models[0]) if len(models) == 1 else _text(field) if depth == 2 else ""
    off = " Off where it is null." if {"type": "null"} in field.get("anyOf", ()) else ""
    yield f"{'#' * depth} {path}\n" + (f"\n{about[:1].upper()}{about[1:].rstrip('.')}.{off}\n" if about else "")
    if shared:
        yield "For every `kind`:\n"
        yield _keys(
            f"{path}.", {key: models[0]["properties"][key] for key in shared}, models[0].get("required", ()), schema
        )
    for model in models:
        keys = {key: value for key, value in model["properties"].items() if key not in shared}
        kind = keys.pop("kind", {}).get("const") if len(models) > 1 else None
        if kind is not None:
            yield f"{'#' * (depth + 1)} {path}, `kind: {kind}`\n\n{_text(model)}\n"
        if keys:
            yield _keys(f"{path}.", keys, model.get("required", ()), schema)
        for key, value in keys.items():
            yield from _section(f"{path}.{key}", value, schema, depth=depth + 1)


def _same(model: Schema, key: str, value: Any, first: Schema) -> bool:
    required = [key in other.get("required", ()) for other in (model, first)]
    return model["properties"].get(key) == value and required[0] == required[1]


def _keys(path: str, fields: Mapping[str, Schema], required: Any, schema: Schema) -> str:
    """A line for each setting; `path` is put before its name."""
    rows = [
        (
            f"`{path}{key}`",
            _values(field, schema),
            "required"
            if key in required
            else f"`{_shown(field.get('default', {} if field.get('type') == 'object' else None))}`",
            _text(field),
        )
        for key, field in fields.items()
    ]
    return table(("setting", "values", "default", "what it is"), *rows) if rows else "It has no settings.\n"


def _text(field: Schema) -> str:
    """The description, with its code in code quotes: nothing in it is HTML."""
    return " ".join(field.get("description", "").split()).replace("<", "&lt;")


def _models(field: Schema, schema: Schema) -> list[Schema]:
    """The sections that a field may hold, itself or in a list."""
    if "$ref" in field:
        model = schema["$defs"][field["$ref"].removeprefix(PREFIX)]
        return [model] if "properties" in model else []
    inner = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    inner += [field["items"]] if field.get("items") else []
    return [model for part in inner for model in _models(part, schema)]


def _values(field: Schema, schema: Schema) -> str:
    """What a setting may be, in words."""
    if "anyOf" in field or "oneOf" in field:
        parts = [_values(part, schema) for part in field.get("anyOf", field.get("oneOf", ()))]
        return " or ".join(dict.fromkeys(parts))
    if "$ref" in field:
        return (
            "a section"
            if _models(field, schema)
            else _values(schema["$defs"][field["$ref"].removeprefix(PREFIX)], schema)
        )
    if "enum" in field or "const" in field:
        return ", ".join(f"`{_shown(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return _list(field, schema)
    words = {
        "integer": "whole number",
        "number": "number",
        "boolean": "`true`, `false`",
        "null": "`null`",
        "object": "mapping",
    }
    word = words.get(field.get("type", ""), "path" if field.get("format") == "path" else "text")
    bounds = ", ".join(f"{sign} {field[name]:g}" for name, sign in BOUNDS.items() if name in field)
    return f"{word} {bounds}".strip()


def _list(field: Schema, schema: Schema) -> str:
    if "prefixItems" in field:
        return "[" + ", ".join(_values(part, schema) for part in field["prefixItems"]) + "]"
    items = field.get("items", {})
    if "prefixItems" in items:
        return "knots [[share of the run, value], ...]"
    return f"list of: {_values(items, schema)}"


def _shown(value: Any) -> str:
    """A default as YAML would have it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list() | tuple():
            return f"[{', '.join(map(_shown, value))}]"
        case dict():
            return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    return str(value)


def verbs() -> str:
    """Every verb of the command line, with its arguments and options."""
    commands = get_command(app).commands
    groups = [("fgvc", commands, VERBS), ("fgvc data", commands["data"].commands, DATA_VERBS)]
    return "\n".join(
        _verb(f"{group} {name}", part[name], verb) for group, part, known in groups for name, verb in known.items()
    )


def _verb(title: str, command: Any, verb: Callable[..., None]) -> str:
    hints = get_type_hints(verb, include_extras=True)
    rows, usage = [], [title]
    for parameter in command.params:
        kind, info = get_args(hints[parameter.name])[:2]
        required = inspect.signature(verb).parameters[parameter.name].default is inspect.Parameter.empty
        option = parameter.opts[0].startswith("-")
        name = ", ".join(f"`{word}`" for word in [*parameter.opts, *parameter.secondary_opts])
        if not option:
            word = info.metavar or parameter.name.upper()
            more = " ..." if _many(kind) else ""
            name, usage = f"`{word}`", [*usage, f"{word}{more}" if required else f"[{word}]{more}"]
        bounds = [f"{sign} {value:g}" for sign, value in (("≥", info.min), ("≤", info.max)) if value is not None]
        default = "required" if required else _default(parameter.default)
        value = ", ".join(filter(None, [_type(kind), *bounds, "several times" if _many(kind) else ""]))
        rows.append((name, value, default, (info.help or "").replace("<", "&lt;")))
    about = inspect.cleandoc(verb.__doc__ or "")
    options = " [OPTIONS]" if any(parameter.opts[0].startswith("-") for parameter in command.params) else ""
    body = table(("argument or option", "value", "default", "what it is"), *rows)
    return f"## {title}\n\n{about}\n\n```text\n{' '.join(usage)}{options}\n```\n\n{body}"


def _default(value: Any) -> str:
    return "" if value in (None, False) or callable(value) else f"`{_shown(value)}`"


def _type(kind: Any) -> str:
    """A parameter's type in words; nothing for a flag."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    parts = [part for part in get_args(kind) if part is not type(None)]
    if parts:
        return _type(parts[0])
    return {bool: "", int: "whole number", float: "number", Path: "path"}.get(kind, "text")


def _many(kind: Any) -> bool:
    return any(get_origin(part) is list for part in (kind, *get_args(kind)))


def bundle() -> str:
    """The files of a bundle, and the keys of the two that a reader in another language needs."""
    rows = [(f"`{name}`", "always", about) for name, about in REQUIRED.items()]
    rows += [(f"`{name}`", "where it applies", about) for name, about in OPTIONAL.items()]
    rows.append((f"`{MANIFEST}`", "always", "the SHA-256 of every other file, checked when the bundle is loaded"))
    parts = [table(("file", "is there", "what it holds"), *rows)]
    for file, model in (("preprocess.json", Preprocess), ("calibration.json", Calibration)):
        parts.append(f"## {file}\n\n{_keys_of(model)}")
    return "\n".join(parts)


def _keys_of(model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    deploy = Deploy.model_json_schema()["properties"]  # says what the same keys of preprocess.json are
    rows = [
        (f"`{key}`", _values(field, schema), _text(field) or _text(deploy.get(key, {})))
        for key, field in schema["properties"].items()
    ]
    return table(("key", "values", "what it is"), *rows)
