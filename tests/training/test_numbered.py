"""Where a run is that was given no folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvc.config.loading import dump, validate
from fgvc.config.recipe import Recipe
from fgvc.data.recipe import open_recipe
from fgvc.runs.numbered import default_folder

TREE = {"data": {"kind": "folder", "root": "leaves"}, "model": {"backbone": "test_efficientnet"}}


def recipe(**more: object) -> Recipe:
    return validate(Recipe, {**TREE, **more}, where="test")


def begun(folder: Path, config: Recipe) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_is_numbered_where_another_run_has_the_name() -> None:
    assert default_folder("leaves", recipe()) == (Path("runs/leaves"), "")
    begun(Path("runs/leaves"), recipe())
    assert default_folder("leaves", recipe()) == (Path("runs/leaves"), "")  # the same command goes on
    assert default_folder("leaves", recipe(train={"epochs": 20})) == (Path("runs/leaves"), "")  # it may change
    other = recipe(optim={"lr": 0.5})
    second, reason = default_folder("leaves", other)
    assert second == Path("runs/leaves-2")
    assert reason == "runs/leaves holds a run of other settings (optim.lr): this run is runs/leaves-2"
    begun(second, other)
    assert default_folder("leaves", other)[0] == second
    assert default_folder("leaves", recipe())[0] == Path("runs/leaves")
    assert default_folder("leaves", recipe(optim={"lr": 0.25}))[0] == Path("runs/leaves-3")


def test_anew_gives_the_next_number() -> None:
    begun(Path("runs/leaves"), recipe())
    assert default_folder("leaves", recipe(), anew=True)[0] == Path("runs/leaves-2")


def test_what_is_no_run_is_left_alone() -> None:
    Path("runs/leaves").mkdir(parents=True)
    Path("runs/leaves/notes.txt").touch()
    Path("runs/leaves-2").touch()
    assert default_folder("leaves", recipe())[0] == Path("runs/leaves-3")


def test_images_alone_are_a_recipe(colours: Path) -> None:
    opened = open_recipe(colours, ["train.epochs=2"])
    assert (opened.name, opened.images) == (colours.name, colours)
    assert (opened.recipe.data.kind, opened.recipe.data.root, opened.recipe.train.epochs) == ("folder", colours, 2)
    assert opened.recipe.model == open_recipe("any/plain", [f"data.root={colours}"]).recipe.model
