"""Recipes by whatever names one: the recipe itself, its file or id, or a folder of classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fgvc.config.loading import drop_replaced, leaves, override, validate
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import open_recipe, resolve_data, run_name
from fgvc.errors import FgvcError
from fgvc.io.files import StrPath
from fgvc.runs import numbered


def as_recipe(source: Recipe | StrPath, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by its file, its id or a folder of classes (then `any/plain`), with settings laid over it: sections as mappings,
    or dotted keys. Raises FgvcError for a setting that there is not, and where the source is none of these."""
    overrides = list(_assignments(settings or {}))
    return _revised(source, overrides) if isinstance(source, Recipe) else open_recipe(Path(source), overrides).recipe


def default_folder(source: Recipe | StrPath, recipe: Recipe) -> Path:
    """The folder of a run that is given none, as of the command line; `recipe`: what was read of the source."""
    if isinstance(source, Recipe):
        raise FgvcError("out: a recipe that was read has no name to call its run by; name the run's folder")
    return numbered.default_folder(run_name(Path(source)), recipe)[0]


def _revised(recipe: Recipe, overrides: list[str]) -> Recipe:
    if not overrides:
        return recipe
    tree = recipe.model_dump(mode="json")
    drop_replaced(Recipe, tree, [text.partition("=")[0].partition(".")[::2] for text in overrides])
    for text in overrides:
        override(tree, text)
    return resolve_data(validate(Recipe, tree, where="recipe", overrides=overrides))


def _assignments(settings: Mapping[str, Any]) -> Iterator[str]:
    """Settings as on the command line, `section.key=value`."""
    for key, value in leaves(settings):
        yield f"{key}={_text(value)}"


def _text(value: Any) -> str:
    """A value as YAML, in one line."""
    plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    try:
        return yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()
    except yaml.YAMLError as error:
        kind = type(value).__name__
        raise FgvcError(f"a setting is text, a number, a list, a mapping or None, not {kind}: {value!r}") from error
