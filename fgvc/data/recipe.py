"""Recipes with their data: read from a file, the kind of the set decided."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fgvc.config.loading import load
from fgvc.config.recipe import Recipe
from fgvc.data.sources.read import decided


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file with `a.b=value` overrides. Raises FgvcError naming file, line, key and the nearest valid key."""
    return decide(load(Recipe, Path(path), overrides))


def decide(recipe: Recipe) -> Recipe:
    """With the kind that its files are of, where the recipe leaves that to them (`data.kind: auto`): once, before anything is
    recorded, so that what is recorded reads the same set later. Raises FgvcError where no kind fits, or several do."""
    data = decided(recipe.data)
    return recipe if data is recipe.data else recipe.model_copy(update={"data": data})
