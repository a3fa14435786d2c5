"""A recipe written out with every key, value and description."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fgvc.config.loading import recipe_tree
from fgvc.config.shape import is_section, models_in, models_of, tag_of
from fgvc.errors import FgvcError

WIDTH = 118


def header(path: Path) -> list[str]:
    """The comment lines at the top of a recipe, without `#`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    top = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").strip() for line in lines[:top]]


def commented(
    model: type[BaseModel],
    path: Path,
    *,
    fill: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    top: Iterable[str] | None = None,
) -> str:
    """The recipe in `path` with every key and its description. `fill` adds what it leaves open; `top`: lines above it, in place
    of its own."""
    tree = fill(recipe_tree(model, path).tree)
    lines = [f"# {line}".rstrip() for line in (header(path) if top is None else top)]
    return "\n".join([*lines, "", *_section(model, tree, 0)]) + "\n"


def _section(model: type[BaseModel], tree: Mapping[str, Any], depth: int) -> Iterator[str]:
    """The lines of a section; a subsection that is off is null, with its description."""
    pad = "  " * depth
    for key, field in model.model_fields.items():
        value = tree.get(key)
        if value is not None and not isinstance(value, Mapping) and models_of(field):
            raise FgvcError(f"{key}: a section of settings is expected, not {value!r}")
        inner = _inner(field, value)
        if inner is not None and (value is not None or not _optional(field)):
            if depth == 0:
                yield ""
            yield from _comment(field, pad)
            rows = list(_section(inner, value or {}, depth + 1))
            optional = all(row.lstrip().startswith("#") for row in rows)
            yield f"{pad}{key}: {{}}" if optional else f"{pad}{key}:"
            yield from rows
        elif inner is not None or is_section(field):
            doc = (field.description or "").strip()
            yield f"{pad}# {key}: {{...}}  ({doc})" if depth else f"\n# {doc}\n{key}: null"
        else:
            yield from _leaf(key, field, value, key in tree, pad)


def _leaf(key: str, field: FieldInfo, value: Any, present: bool, pad: str) -> Iterator[str]:
    if not present and field.is_required():
        yield from _comment(field, pad)
        yield f"{pad}# {key}: REQUIRED, or give it on the command line"
        return
    if not present:
        value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple | list):
        value = [item.model_dump(mode="json") if isinstance(item, BaseModel) else item for item in value]
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        .strip()
        .removesuffix("...")
        .strip()
    )
    line = f"{pad}{key}: {text}"
    if field.description and len(line) + len(field.description) + 4 <= WIDTH:
        yield f"{line}  # {field.description}"
    else:
        yield from _comment(field, pad)
        yield line


def _comment(field: FieldInfo, pad: str) -> Iterator[str]:
    for line in textwrap.wrap(field.description or "", WIDTH - len(pad) - 2):
        yield f"{pad}# {line}"


def _inner(field: FieldInfo, value: Any) -> type[BaseModel] | None:
    """The section class of a field; of a union, the member that the `kind` of `value` names, or
    the first. None: deferred and off."""
    models = models_of(field) if value is not None else models_in(field.annotation)
    if len(models) > 1 and isinstance(value, Mapping):
        return next((m for m in models if tag_of(m) == value.get("kind", tag_of(models[0]))), None)
    return models[0] if len(models) == 1 else None


def _optional(field: FieldInfo) -> bool:
    return field.default is None
