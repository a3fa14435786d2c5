"""A recipe that names a base says only what differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fgvc.config.loading import load
from fgvc.config.recipe import Recipe, with_weight_defaults
from fgvc.config.shipped import recipe_file
from fgvc.config.template import commented
from fgvc.errors import FgvcError

PLAIN = yaml.safe_load(recipe_file("any/plain").read_text())


def written(folder: Path, text: str, name: str = "my.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refusal(path: Path) -> str:
    with pytest.raises(FgvcError) as caught:
        load(Recipe, path)
    return str(caught.value)


def test_what_it_does_not_say_is_that_of_the_base(tmp_path: Path) -> None:
    own = written(tmp_path, "base: any/plain\ndata: {root: leaves}\ntrain: {epochs: 3}\nema: null\ntechniques: {mixup: {}}\n")
    tree = PLAIN | {
        "data": {**PLAIN["data"], "root": "leaves"},
        "train": {**PLAIN["train"], "epochs": 3},
        "ema": None,
        "techniques": {"mixup": {}},
    }
    assert load(Recipe, own) == Recipe.model_validate(tree)
    assert load(Recipe, own, ["train.epochs=5"]).train.epochs == 5


def test_a_base_beside_the_file_comes_before_the_ids(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    (tmp_path / "any" / "plain").write_text("data: {root: here}\nmodel: {backbone: resnet18}\n")
    assert str(load(Recipe, written(tmp_path, "base: any/plain\n")).data.root) == "here"


def test_what_replaces_another_setting_replaces_the_bases(tmp_path: Path) -> None:
    own = written(tmp_path, "base: any/plain\ndata: {root: leaves}\nmodel: {onnx: net.onnx}\n")
    recipe = load(Recipe, own)
    assert (recipe.model.backbone, recipe.model.weights) == (None, "deployed")


def test_data_of_another_kind_have_none_of_the_bases_keys(tmp_path: Path) -> None:
    written(tmp_path, "data: {kind: csv, root: a, file: t.csv}\nmodel: {backbone: resnet18}\n", "table.yaml")
    assert load(Recipe, written(tmp_path, "base: table.yaml\ndata: {kind: folder, root: b}\n")).data.kind == "folder"
    assert load(Recipe, written(tmp_path, "base: table.yaml\ndata: {root: b}\n")).data.kind == "csv"


def test_an_error_names_the_line_of_the_file_that_has_it(tmp_path: Path) -> None:
    base = written(tmp_path, "data: {root: a}\nmodel: {backbone: resnet18}\noptim:\n  lr: fast\n", "base.yaml")
    own = written(tmp_path, "base: base.yaml\ntrain:\n  epochs: 0\n")
    lines = refusal(own).splitlines()
    assert lines[0].startswith(f"{own}:3: train.epochs: must be at least 1")
    assert lines[1].startswith(f"{base}:4: optim.lr: must be a number")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("any/plian", "my.yaml:1: base: any/plian: no such file, nor a recipe's id.*any/plain"),
        ("[1]", r"my.yaml:1: base: must be a recipe's id or file \(got \[1\]\)"),
        ("other.yaml", "my.yaml:1: base: other.yaml has a base itself"),
    ],
)
def test_a_bad_base_is_refused(tmp_path: Path, base: str, message: str) -> None:
    written(tmp_path, "base: any/plain\n", "other.yaml")
    assert re.search(message, refusal(written(tmp_path, f"base: {base}\n")))


def test_a_recipe_with_a_base_is_written_out_whole(tmp_path: Path) -> None:
    own = written(tmp_path, "# mine\nbase: any/plain\ndata: {root: leaves}\nloss: {kind: focal}\n")
    whole = written(tmp_path, commented(Recipe, own, fill=with_weight_defaults), "whole.yaml")
    assert load(Recipe, whole) == load(Recipe, own)
    tree = yaml.safe_load(whole.read_text())
    assert "base" not in tree
    assert tree["ema"]["decay"] == PLAIN["ema"]["decay"]
