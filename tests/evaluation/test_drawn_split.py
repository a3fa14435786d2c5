"""A set without splits of its own: its bundle knows which images fgvc set aside to judge, and these judge what is compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.data.beside import read_folder
from fgvc.data.unseen import unseen_rows
from fgvc.errors import FgvcError
from fgvc.evaluation.deployed_recipe import deployed_recipe
from fgvc.improvement.images import divide
from fgvc.runs.folder import read_run
from fgvc.runs.images import read_index
from tests.trained import Once


@pytest.fixture
def flat(colours: Path) -> Path:
    """Folders of classes and no more."""
    return colours / "train"


@pytest.fixture
def shipped(once: Once, recipe_tree: dict, flat: Path) -> tuple[Path, set[str]]:
    """A bundle, and the images of the test split that fgvc drew."""
    run = once.run(Recipe.model_validate(recipe_tree | {"data": {"kind": "folder", "root": str(flat)}}))
    index = read_index(read_run(run))
    return once.bundle(run), set(index.paths[index.rows("test")].tolist())


def test_bundles_are_compared_on_it(shipped: tuple[Path, set[str]], flat: Path) -> None:
    """Not on all of the folder, most of which both have learned from; nor is the same file refused as model.onnx."""
    bundle, drawn = shipped
    assert set(json.loads((bundle / "judge.json").read_text())["images"]) == drawn
    for old, split in ((bundle, None), (bundle, "test"), (bundle / "model.onnx", None), (bundle / "model.onnx", "test")):
        answers = api.compare(old, bundle, data=flat, split=split)
        assert {str(path.relative_to(flat)) for path in answers.paths} == drawn
        assert f"judged on {len(drawn)} unseen images of the test split that fgvc drew" in answers.judged


def test_a_bundle_says_what_its_file_has_seen(shipped: tuple[Path, set[str]], flat: Path, tmp_path: Path) -> None:
    bundle, drawn = shipped
    index = read_folder(flat)
    rows, _, rule = unseen_rows(index, bundle, learned=np.empty(0, np.int64))
    assert set(index.paths[rows].tolist()) == drawn
    assert f"{len(index) - len(drawn)} images that {bundle} names" in rule
    divided = divide(flat, deployed=True, bundle=bundle)
    assert set(divided.index.paths[divided.index.rows("test")].tolist()) <= drawn
    assert divided.counts["test"] > 0
    recipe = deployed_recipe(bundle / "model.onnx", flat)
    assert recipe.tree["deploy"]["seen"] == str(bundle)
    with pytest.raises(FgvcError, match=r"--seen: .*: is a folder without judge\.json"):
        divide(flat, deployed=True, seen=tmp_path)
