"""What a study takes for the same run, and what not."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.runs import checkpoint
from fgvc.studies import identity
from fgvc.training import trainer


def digest(tree: dict, **sections: Any) -> str:
    identity._data.clear()
    return identity.digest(validate(Recipe, tree | sections, where="test"))


@pytest.fixture
def teacher(tmp_path: Path, recipe_tree: dict) -> Path:
    tree = recipe_tree | {"train": recipe_tree["train"] | {"epochs": 1}, "export": {"exporter": "torchscript"}, "select": "last"}
    return trainer.train(validate(Recipe, tree, where="test"), tmp_path / "teacher")


def test_where_things_lie_and_how_a_run_is_kept_is_no_matter(tmp_path: Path, recipe_tree: dict) -> None:
    recipe_tree = recipe_tree | {"select": "last"}
    moved = copy.deepcopy(recipe_tree)
    moved["data"]["root"] = str(shutil.copytree(recipe_tree["data"]["root"], tmp_path / "moved"))
    same = digest(recipe_tree)
    assert digest(moved) == same
    for section, keys in {
        "train": recipe_tree["train"] | {"validate_every": 2, "workers": 1},
        "checkpoint": {"every_steps": 3},
        "log": {"every_steps": 3},
        "cache_dir": str(tmp_path),
    }.items():
        assert digest(recipe_tree, **{section: keys}) == same, section
    chosen = digest(recipe_tree, select="best")
    rarely = recipe_tree["train"] | {"validate_every": 2}
    assert len({same, chosen, digest(recipe_tree, select="best", train=rarely)}) == 3, "which epochs may win"


def test_other_labels_are_other_data(tmp_path: Path, recipe_tree: dict) -> None:
    moved = copy.deepcopy(recipe_tree)
    root = shutil.copytree(recipe_tree["data"]["root"], tmp_path / "moved")
    moved["data"]["root"] = str(root)
    before = digest(moved)
    one, other = sorted((root / "train").iterdir())[:2]
    picture = next(one.iterdir())
    picture.rename(other / f"was-{picture.name}")
    assert digest(moved) != before


@pytest.mark.parametrize("kind", ["run", "bundle", "timm"])
def test_a_teacher_and_first_weights_are_their_contents(
    kind: str, tmp_path: Path, recipe_tree: dict, teacher: Path
) -> None:
    def net(run: Path) -> Path:
        return run / "ckpt/last/net.safetensors"

    def bundle(run: Path) -> Path:
        return api.export(run, run.parent / f"{run.name}-bundle").bundle

    make: dict[str, Callable[[Path], dict]] = {
        "run": lambda run: {"techniques": {"distill": {"teachers": [{"kind": "run", "path": str(run)}]}}},
        "bundle": lambda run: {"techniques": {"distill": {"teachers": [{"kind": "bundle", "path": str(bundle(run))}]}}},
        "timm": lambda run: {"model": recipe_tree["model"] | {"weights": str(net(run))}},
    }
    copied = Path(shutil.copytree(teacher, tmp_path / "copied", symlinks=True))
    before = digest(recipe_tree, **make[kind](teacher))
    assert before != digest(recipe_tree)
    assert digest(recipe_tree, **make[kind](copied)) == before
    other = Path(shutil.copytree(teacher, tmp_path / "other", symlinks=True))
    state = checkpoint.load(other / "ckpt")
    more = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.net.items()}
    checkpoint.save(other / "ckpt", replace(state, net=more))
    assert digest(recipe_tree, **make[kind](other)) != before


def test_a_teacher_is_there_and_has_learnt_to_the_end(recipe_tree: dict, teacher: Path) -> None:
    sections = {"techniques": {"distill": {"teachers": [{"kind": "run", "path": str(teacher)}]}}}
    with_cache = {"techniques": {"distill": sections["techniques"]["distill"] | {"cache": "somewhere"}}}
    assert digest(recipe_tree, **sections) == digest(recipe_tree, **with_cache)
    state = checkpoint.load(teacher / "ckpt")
    checkpoint.save(teacher / "ckpt", replace(state, progress=replace(state.progress, finished=False)))
    with pytest.raises(FgvcError, match="this teacher's training is not finished"):
        digest(recipe_tree, **sections)
    shutil.rmtree(teacher)
    with pytest.raises(FgvcError, match="teacher"):
        digest(recipe_tree, **sections)
