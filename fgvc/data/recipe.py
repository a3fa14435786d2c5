"""Reading of recipes with all that they leave to files: the kind of the data, the deployed file, the pipeline of augmentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fgvc.config.exporting import refuse_opset
from fgvc.config.loading import load
from fgvc.config.recipe import Recipe
from fgvc.config.shipped import DEFAULT, recipe_file, recipes
from fgvc.config.shipped import run_name as recipe_name
from fgvc.data.deployed import with_file_defaults
from fgvc.data.sources.read import resolved
from fgvc.errors import FgvcError
from fgvc.io.places import is_data

SAVED = "write it with albumentations.save(pipeline, FILE), or data_format='yaml'"


class Opened(NamedTuple):
    """A recipe that was read, and where it is from."""

    recipe: Recipe
    name: str  # of its runs, by default
    path: Path
    images: Path | None  # that were given in the place of a recipe


def open_recipe(source: Path | str, overrides: Iterable[str] = ()) -> Opened:
    """Read a recipe by its file or id, or DEFAULT for images alone, a folder or a table. Raises FgvcError as `load_recipe`."""
    if (images := images_at(source)) is not None:
        path = recipe_file(DEFAULT)
        recipe = load_recipe(path, [f"data.root={json.dumps(str(images))}", f"data.kind={kind_at(images)}", *overrides])
        return Opened(recipe, run_name(source), path, images)
    path = recipe_file(str(source))
    return Opened(load_recipe(path, overrides), run_name(source), path, None)


def run_name(source: Path | str) -> str:
    """The default name of the runs of what `open_recipe` reads."""
    images = images_at(source)
    return recipe_name(recipe_file(str(source))) if images is None else re.sub(r"[^\w.+-]+", "-", images.resolve().stem) or "run"


def images_at(source: Path | str) -> Path | None:
    """The place of images that was given in the place of a recipe; None: it is a recipe's file or id."""
    place = Path(source).expanduser()
    return place if str(source) not in ("", *recipes()) and is_data(place) else None


def kind_at(images: Path) -> str:
    """The `data.kind` of images that were given in the place of a recipe: hf of a .parquet file, so that the names of its columns
    can be given, else auto."""
    return "hf" if images.suffix.lower() == ".parquet" else "auto"


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file with `a.b=value` overrides. Raises FgvcError naming file, line, key and the nearest valid key."""
    recipe = resolve_data(load(Recipe, Path(path), overrides))
    refuse_opset(recipe.export.exporter, recipe.export.opset)
    return recipe


def resolve_data(recipe: Recipe) -> Recipe:
    """A recipe with `data.kind: auto` replaced by the kind that its files are of, what it leaves to its deployed file, and
    a file of `augment.pipeline` replaced by what is in it.

    Called once, before anything is recorded, so that the recorded recipe reads the same set and augments it alike later. Raises
    FgvcError if no kind fits, or several do, and for a file that is no pipeline."""
    recipe = with_file_defaults(recipe)
    data, augment = resolved(recipe.data), recipe.augment
    if isinstance(augment.pipeline, Path):
        augment = augment.model_copy(update={"pipeline": read_pipeline(augment.pipeline)})
    if data is recipe.data and augment is recipe.augment:
        return recipe
    return recipe.model_copy(update={"data": data, "augment": augment})


def read_pipeline(path: Path) -> dict[str, Any]:
    """The tree that albumentations.save wrote to a file, JSON or YAML, with the file's name under `file`. Raises FgvcError."""
    place = f"augment.pipeline: {path}"
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FgvcError(f"{place}: can't read the file: {error.strerror}; {SAVED}") from error
    except UnicodeDecodeError as error:
        raise FgvcError(f"{place}: is not UTF-8 text (byte {error.start}); {SAVED}") from error
    try:
        json_text = text.lstrip().startswith("{") and path.suffix.lower() not in (".yaml", ".yml")
        tree = json.loads(text) if json_text else yaml.safe_load(text)  # YAML takes JSON's 1e-5 for text
    except json.JSONDecodeError as error:
        raise FgvcError(f"{place}:{error.lineno}: not valid JSON: {error.msg}; {SAVED}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f":{mark.line + 1}" if mark else ""
        raise FgvcError(f"{place}{line}: not plain YAML: {problem}; {SAVED}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("transform"), dict):
        raise FgvcError(f"{place}: is no pipeline of albumentations, a mapping with the key transform; {SAVED}")
    return {"file": path.name, **tree}
