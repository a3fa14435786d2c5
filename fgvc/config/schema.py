"""JSON schema of a recipe's file, for editors: `configs/recipe.schema.json`, which `docs/tables.py` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgvc.config.recipe import Recipe
from fgvc.config.shipped import recipes_folder

MODELINE = "yaml-language-server:"  # how such a line begins
BASE = "a recipe's id, or a file beside this one, whose settings hold where this one says nothing"


def schema_file() -> Path:
    """The schema that comes with fgvc."""
    return recipes_folder() / "recipe.schema.json"


def modeline() -> str:
    """The comment by which an editor with a YAML language server knows the schema of a file."""
    return f"{MODELINE} $schema={schema_file().resolve().as_uri()}"


def recipe_schema() -> dict[str, Any]:
    """The schema. What is missing in a file may be in its base or on the command line, and a technique may be that of another
    package: neither is an error. Of several kinds of data that fits whose `kind` is given, `auto` where there is none."""
    schema = Recipe.model_json_schema()
    told_apart = {name for union in _unions(schema) for name in union}
    for name, section in [("", schema), *schema["$defs"].items()]:
        section.pop("required", None)
        if name in told_apart - {"AutoData"}:
            section["required"] = ["kind"]
    schema["$defs"]["Techniques"].pop("additionalProperties", None)
    properties = {"base": {"type": "string", "description": BASE}, **schema["properties"]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, "title": "Recipe of fgvc", "properties": properties}


def _unions(tree: Any) -> Iterator[list[str]]:
    """Names of the sections of each union that `kind` tells apart."""
    if isinstance(tree, dict):
        if "discriminator" in tree:
            yield [reference.rpartition("/")[2] for reference in tree["discriminator"]["mapping"].values()]
        tree = list(tree.values())
    if isinstance(tree, list):
        for inner in tree:
            yield from _unions(inner)
