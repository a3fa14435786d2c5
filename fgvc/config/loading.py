"""Reading and writing of recipes: YAML, dotted overrides, and errors with file, line, key and the nearest valid key."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fgvc.config.section import Deferred, Section
from fgvc.errors import FgvcError
from fgvc.io.names import nearest

M = TypeVar("M", bound=BaseModel)


def load(model: type[M], path: Path, overrides: Iterable[str] = ()) -> M:
    """Read a YAML file, apply `a.b=value` overrides and validate.

    Raises FgvcError listing every problem with its file, line, key path and the nearest valid key.
    """
    tree, lines, empty = read_tree(path)
    texts = list(overrides)
    given = (text.partition("=") for text in texts)
    drop_replaced(model, tree, [_section_and_key(dotted) for dotted, _, value in given if value.strip() not in ("", "null", "~")])
    for text in texts:
        override(tree, text)
    made = validate(model, tree, where=str(path), lines=lines, overrides=texts)
    overridden = {tuple(text.partition("=")[0].split(".")) for text in texts}
    for keys in empty:
        parents = _key_path(model, tree, keys[:-1])[1]
        fields = [parent.model_fields[keys[-1]] for parent in parents if keys[-1] in parent.model_fields]
        if any(is_section(field) for field in fields) and not any(given[: len(keys)] == keys for given in overridden):
            print(
                f"WARNING: {path}:{lines[keys]}: {'.'.join(keys)}: empty, so it is off; write {{}} for it with its defaults, "
                "null for off",
                file=sys.stderr,
            )
    return made


def validate(
    model: type[M],
    tree: Mapping[str, Any],
    *,
    where: str,
    lines: Mapping[Keys, int] | None = None,
    overrides: Iterable[str] = (),
) -> M:
    """Validate a nested mapping; `where` is its name in messages, `lines` the line of each key. Errors as in `load`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        overridden = {tuple(text.partition("=")[0].split(".")): text for text in overrides}
        rows = _without_other_members(model, tree, [dict(row) for row in error.errors()])
        texts = [_explain(model, tree, row, where, lines or {}, overridden) for row in rows]
        raise FgvcError("\n".join(dict.fromkeys(texts))) from None


def dump(model: BaseModel) -> str:
    """Settings as YAML, which `load` reads back to an equal model."""
    return yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) for every leaf in which two nested mappings differ."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed[f"{prefix}{key}"] = (a, b)
    return changed


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a nested mapping; an empty mapping is a leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


Keys = tuple[str, ...]


class RecipeText(NamedTuple):
    """What a YAML file says."""

    tree: dict[str, Any]
    lines: dict[Keys, int]  # of every key, from 1
    empty: list[Keys]  # keys after which there is nothing, not even null


def merge(tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put settings into a recipe's tree, in place: mappings into mappings, dotted keys where they point."""
    for key, value in settings.items():
        *sections, last = str(key).split(".")
        if isinstance(value, Mapping):
            merge(section(tree, (*sections, last)), value)
        else:
            section(tree, sections)[last] = copy.deepcopy(value)


def read_tree(path: Path) -> RecipeText:
    """The tree of a YAML file, with the lines of its keys. Raises FgvcError if it is no readable mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FgvcError(f"{path}: can't read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FgvcError(f"{path}: the recipe is not UTF-8 text (byte {error.start})") from error
    return _parse(text, path)


def _parse(text: str, path: Path) -> RecipeText:
    lines: dict[Keys, int] = {}
    empty: list[Keys] = []

    def walk(node: yaml.Node | None, keys: Keys) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            at = (*keys, str(key.value))
            if at in lines:
                line, key_path = key.start_mark.line + 1, ".".join(at)
                raise FgvcError(f"{path}:{line}: {key_path}: given twice, first on line {lines[at]}: remove one")
            lines[at] = key.start_mark.line + 1
            if isinstance(value, yaml.ScalarNode) and not value.value and value.style is None:
                empty.append(at)
            walk(value, at)

    try:
        walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
        tree = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise FgvcError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise FgvcError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise FgvcError(f"{path}: a recipe is a mapping of sections, this is a {type(tree).__name__}")
    return RecipeText(tree, lines, empty)


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set one `section.key=value` in a tree, in place. Raises FgvcError if it is malformed."""
    dotted, equals, text = assignment.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise FgvcError(f"override {assignment!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise FgvcError(f"override {assignment!r}: the value is not valid YAML") from error
    section(tree, keys[:-1])[keys[-1]] = value


def _section_and_key(dotted: str) -> tuple[str, str]:
    name, _, key = dotted.partition(".")
    return name, key


def drop_replaced(model: type[BaseModel], tree: dict[str, Any], keys: Iterable[tuple[str, str]]) -> None:
    """Drop the keys of a tree that others, given over it as (section, key), replace, in place: see `Section.alternatives`."""
    for name, key in keys:
        kept, field = tree.get(name), model.model_fields.get(name)
        if field is None or not isinstance(kept, dict):
            continue
        for section_class in models_in(field.annotation):
            for other in getattr(section_class, "alternatives", {}).get(key, ()):
                kept.pop(other, None)


def section(tree: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The section under `keys`, created if missing; a value in its place is replaced."""
    for key in keys:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    return tree


def _without_other_members(
    model: type[BaseModel], tree: Mapping[str, Any], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """pydantic's errors without those of the members of a union that are of another type than the value, where another member
    is of its type."""

    def is_of_type(row: Mapping[str, Any]) -> bool:
        return str(row["type"]).endswith(("_type", "_parsing", "_from_float"))

    paths = [tuple(_key_path(model, tree, tuple(row["loc"]))[0]) for row in rows]
    fits = [path for path, row in zip(paths, rows, strict=True) if not is_of_type(row)]

    def belongs(path: tuple[str | int, ...], row: Mapping[str, Any]) -> bool:
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        return not (is_of_type(row) and (deeper or path in fits))

    return [row for path, row in zip(paths, rows, strict=True) if belongs(path, row)]


def _explain(
    model: type[BaseModel],
    tree: Mapping[str, Any],
    row: dict[str, Any],
    where: str,
    lines: Mapping[Keys, int],
    overridden: Mapping[Keys, str],
) -> str:
    """One of pydantic's errors as a line: file and line or override, key path, message."""
    loc, models = _key_path(model, tree, tuple(row["loc"]))
    names = tuple(str(key) for key in loc)
    source = where
    for end in range(len(names), 0, -1):
        deeper = next((text for keys, text in overridden.items() if keys[:end] == names[:end]), None)
        if deeper is not None and names[:end] not in lines:
            source = f"override {deeper!r}"
            break
        if names[:end] in overridden:
            source = f"override {overridden[names[:end]]!r}"
            break
        if names[:end] in lines:
            source = f"{where}:{lines[names[:end]]}"
            break
    message = _unknown(names[-1], models) if row["type"] == "extra_forbidden" else _in_words(row)
    return f"{source}: {'.'.join(names) or 'recipe'}: {message}"


def _unknown(key: str, models: Iterable[type[BaseModel]]) -> str:
    """The message for a key that none of the section classes `models` has."""
    renamed = {old: new for m in models if issubclass(m, Section) for old, new in m.renamed.items()}
    if key in renamed:
        return f"is called {renamed[key]!r} now"
    fields = sorted({name for m in models for name in m.model_fields})
    near = nearest(key, fields)
    absent = next((m.absent for m in models if issubclass(m, Section) and m.absent), "")
    if near:
        return f"unknown key; did you mean {near[0]!r}?" + f" If not, {absent}" * bool(absent)
    return f"unknown key{absent and f', or {absent}'}; valid here: {', '.join(fields)}"


def _in_words(row: Mapping[str, Any]) -> str:
    """The message for an invalid value: what it must be, and what it is."""
    kind, limits = row["type"], row.get("ctx", {})
    if kind == "missing":
        return "missing; give it a value"
    if kind in ("value_error", "union_tag_invalid", "union_tag_not_found"):  # their messages name the value
        return str(row["msg"]).removeprefix("Value error, ")
    must = _MUST[kind].format(**limits) if kind in _MUST else str(row["msg"]).replace("Input should be", "must be", 1)
    return f"{must} (got {row['input']!r})"


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


def _key_path(
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
