"""Reading and writing of recipes: YAML, dotted overrides, and errors with file, line, key and the nearest valid key."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fgvc.config.messages import Keys, explain, key_path, without_other_members
from fgvc.config.shape import is_section, models_in, models_of, tag_of
from fgvc.config.shipped import recipe_file
from fgvc.errors import FgvcError
from fgvc.io.places import is_data, what_it_is

M = TypeVar("M", bound=BaseModel)


def load(model: type[M], path: Path, overrides: Iterable[str] = ()) -> M:
    """Read a YAML file, apply `a.b=value` overrides and validate.

    Raises FgvcError listing every problem with its file, line, key path and the nearest valid key.
    """
    tree, places, empty = recipe_tree(model, path)
    texts = list(overrides)
    given = (text.partition("=") for text in texts)
    drop_replaced(model, tree, [_section_and_key(dotted) for dotted, _, value in given if value.strip() not in ("", "null", "~")])
    for text in texts:
        override(tree, text)
    made = validate(model, tree, where=str(path), places=places, overrides=texts)
    overridden = {tuple(text.partition("=")[0].split(".")) for text in texts}
    for keys in empty:
        parents = key_path(model, tree, keys[:-1])[1]
        fields = [parent.model_fields[keys[-1]] for parent in parents if keys[-1] in parent.model_fields]
        if any(is_section(field) for field in fields) and not any(given[: len(keys)] == keys for given in overridden):
            print(
                f"WARNING: {places[keys]}: {'.'.join(keys)}: empty, so it is off; write {{}} for it with its defaults, "
                "null for off",
                file=sys.stderr,
            )
    return made


def validate(
    model: type[M],
    tree: Mapping[str, Any],
    *,
    where: str,
    places: Mapping[Keys, str] | None = None,
    overrides: Iterable[str] = (),
) -> M:
    """Validate a nested mapping; `where` is its name in messages, `places` file and line of each key. Errors as in `load`."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        overridden = {tuple(text.partition("=")[0].split(".")): text for text in overrides}
        rows = without_other_members(model, tree, [dict(row) for row in error.errors()])
        texts = [explain(model, tree, row, where, places or {}, overridden) for row in rows]
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


class RecipeText(NamedTuple):
    """Content of a recipe's YAML file."""

    tree: dict[str, Any]
    places: dict[Keys, str]  # of every key: file:line
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
    """The tree of a YAML file, with the places of its keys. Raises FgvcError if it is no readable mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FgvcError(f"{path}: can't read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FgvcError(f"{path}: the recipe is not UTF-8 text (byte {error.start}){what_it_is(path)}") from error
    return _parse(text, path)


def recipe_tree(model: type[BaseModel], path: Path) -> RecipeText:
    """The tree of a recipe's file, laid over that of its `base`: a recipe's id, or a file beside it. Raises FgvcError for a base
    that is not there, or has a base itself."""
    own = read_tree(path)
    if not getattr(model, "has_base", False) or "base" not in own.tree:
        return own
    name, where = own.tree.pop("base"), f"{own.places.pop(('base',))}: base"
    if not isinstance(name, str):
        raise FgvcError(f"{where}: must be a recipe's id or file (got {name!r})")
    beside = path.parent / Path(name).expanduser()
    try:
        base = read_tree(beside if beside.is_file() else recipe_file(name))
    except FgvcError as error:
        raise FgvcError(f"{where}: {error}") from error
    if "base" in base.tree:
        raise FgvcError(
            f"{where}: {name} has a base itself, and bases go one level deep; write {name} out whole, `fgvc init {name} FILE`"
        )
    _lay_over(model, base.tree, own.tree)
    return RecipeText(base.tree, {**base.places, **own.places}, own.empty)


def _lay_over(model: type[BaseModel], tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put a recipe's settings over its base's, in place. A section of another `kind` than the base's keeps none of its keys."""
    for name, given in settings.items():
        below, field = tree.get(name), model.model_fields.get(name)
        if not isinstance(given, Mapping) or not isinstance(below, Mapping) or field is None:
            continue
        members = models_of(field)
        kind = below.get("kind", tag_of(members[0]) if members else None)
        if len(members) > 1 and given.get("kind", kind) != kind:
            del tree[name]
        drop_replaced(model, tree, [(name, key) for key, value in given.items() if value is not None])
    merge(tree, settings)


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
    return RecipeText(tree, {keys: f"{path}:{line}" for keys, line in lines.items()}, empty)


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set one `section.key=value` in a tree, in place. Raises FgvcError if it is malformed."""
    dotted, equals, text = assignment.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        path = Path(assignment)
        hint = f"; did you mean data.root={assignment}?" if is_data(path) else what_it_is(path)
        raise FgvcError(f"override {assignment!r}: write it as section.key=value{hint}")
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
    """The section under `keys`, created if missing; a value in its place is replaced. Of a list a key is the number, from 0, of
    an item that is a section itself: `techniques.distill.teachers.0`. Raises FgvcError where the list has none such."""
    path, place = list(keys), tree
    for at, key in enumerate(path):
        inner = place.get(key)
        if isinstance(inner, list) and at + 1 < len(path):
            items = {str(number): item for number, item in enumerate(inner) if isinstance(item, dict)}
            if path[at + 1] not in items:
                raise FgvcError(_not_in_the_list(".".join(path[: at + 1]), path[at + 1], items))
            inner = items
        elif not isinstance(inner, dict):
            inner = place[key] = {}
        place = inner
    return place


def _not_in_the_list(name: str, key: str, items: Mapping[str, Any]) -> str:
    ways = f"one of its items ({', '.join(items)}), or " if items else ""
    return f"{name}: a list, which has no {key!r}; give {ways}the whole list"
