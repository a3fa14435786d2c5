"""Recipes of rungs and trials: settings over the recipe that all of a task's rungs share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fgvc.config.loading import drop_replaced, merge, validate
from fgvc.config.recipe import Recipe
from fgvc.io.files import make_folder, write_atomic

Tree = Mapping[str, Any]


def merged(*settings: Tree) -> dict[str, Any]:
    """Merge settings, the later ones over the earlier."""
    tree: dict[str, Any] = {}
    for one in settings:
        merge(tree, one)
    return tree


def recipe_of(shared: Tree, settings: Tree) -> dict[str, Any]:
    """The tree of a recipe with settings over the shared one, whose alternatives they replace."""
    tree = copy.deepcopy(dict(shared))
    drop_replaced(Recipe, tree, [(name, key) for name, keys in settings.items() for key in keys])
    merge(tree, settings)
    return tree


def write_recipe(tree: Tree, path: Path) -> None:
    """Write a recipe's tree. Raises FgvcError where it is none."""
    validate(Recipe, tree, where=str(path))
    make_folder(path.parent)
    write_atomic(path, yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True))
