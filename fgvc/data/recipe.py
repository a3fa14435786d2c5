"""Reading of recipes with the kind of their data resolved, and what they leave to a deployed file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fgvc.config.loading import load
from fgvc.config.recipe import Recipe
from fgvc.data.deployed import with_file_defaults
from fgvc.data.sources.read import resolved


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file with `a.b=value` overrides. Raises FgvcError naming file, line, key and the nearest valid key."""
    return resolve_data(load(Recipe, Path(path), overrides))


def resolve_data(recipe: Recipe) -> Recipe:
    """A recipe with `data.kind: auto` replaced by the kind that its files are of, and what it leaves to its deployed file.

    Called once, before anything is recorded, so that the recorded recipe reads the same set later. Raises FgvcError if no kind
    fits, or several do."""
    recipe, data = with_file_defaults(recipe), resolved(recipe.data)
    return recipe if data is recipe.data else recipe.model_copy(update={"data": data})
