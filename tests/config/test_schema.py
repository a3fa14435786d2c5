"""The schema for editors: what fgvc reads fits it, and what it refuses does not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgvc.cli.app import main
from fgvc.config.loading import read_tree
from fgvc.config.schema import recipe_schema, schema_file
from fgvc.config.shipped import recipes

SCHEMA = json.loads(schema_file().read_text(encoding="utf-8"))
TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "null": (type(None),),
}  # fmt: skip


def faults(value: Any, schema: Mapping[str, Any], path: str = "") -> list[str]:
    """Where a value does not fit a schema, by the keywords of JSON schema that this one has."""
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path)
    problems: list[str] = []
    for word, allowed in (("anyOf", None), ("oneOf", 1)):
        if word in schema:
            fitting = [part for part in schema[word] if not faults(value, part, path)]
            if not fitting or (allowed is not None and len(fitting) > allowed):
                problems.append(f"{path}: fits {len(fitting)} of {word}")
    kind = schema.get("type")
    if kind == "boolean":
        problems += [f"{path}: no boolean"] * (not isinstance(value, bool))
    elif kind is not None and (isinstance(value, bool) or not isinstance(value, TYPES[kind])):
        return [*problems, f"{path}: no {kind}"]
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        problems.append(f"{path}: not allowed")
    if isinstance(value, dict) and kind == "object":
        properties = schema.get("properties", {})
        problems += [f"{path}: lacks {key}" for key in schema.get("required", ()) if key not in value]
        for key, inner in value.items():
            if key in properties:
                problems += faults(inner, properties[key], f"{path}.{key}")
            elif schema.get("additionalProperties") is False:
                problems.append(f"{path}.{key}: unknown")
    if isinstance(value, list):
        problems += [f"{path}: length"] * (not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)))
        for at, inner in enumerate(value):
            parts = schema.get("prefixItems", ())
            problems += faults(inner, parts[at] if at < len(parts) else schema.get("items", {}), f"{path}.{at}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        problems += [f"{path}: out of range"] * (not (low <= value <= high and above < value < below))
    return problems


def test_the_file_is_that_of_the_settings() -> None:
    assert recipe_schema() == SCHEMA  # else: python docs/tables.py


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_fits_it(name: str, tmp_path: Path) -> None:
    assert faults(read_tree(recipes()[name]).tree, SCHEMA) == []
    with pytest.raises(SystemExit):
        main(["init", name, str(tmp_path / "my.yaml")])
    written = (tmp_path / "my.yaml").read_text()
    assert faults(yaml.safe_load(written), SCHEMA) == []
    line = written.splitlines()[0]
    place = re.fullmatch(r"# yaml-language-server: \$schema=file://(/.*)", line)
    assert place is not None
    assert Path(place[1]) == schema_file().resolve()


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("base: any/plain\ndata: {root: leaves}\n", True), ("image: {size: 224}\n", True), ("image: {size: [112, 224]}\n", True),
        ("train: {batch_size: auto, precision: auto, patience: 3}\n", True), ("log: {to: mlflow}\n", True),
        ("data: {kind: csv, root: a, file: b.csv}\n", True), ("techniques: {of_a_package: {x: 1}}\n", True),
        ("techniques: {distill: {teachers: [{kind: run, path: runs/a}]}}\n", True), ("deploy: {fill: 0}\n", True),
        ("epochs: 3\n", False), ("train: {epochs: 0}\n", False), ("train: {epoch: 3}\n", False), ("image: {size: big}\n", False),
        ("data: {kind: folder, file: b.csv}\n", False), ("data: {root: a, file: b.csv}\n", False),
        ("train: {precision: half}\n", False),
        ("techniques: {mixup: {alfa: 1}}\n", False), ("base: 3\n", False),
    ],
)  # fmt: skip
def test_what_is_refused_does_not_fit_it(text: str, fits: bool) -> None:
    assert (faults(yaml.safe_load(text), SCHEMA) == []) is fits
