"""What is the same from one run to the next, for what is kept of its images."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.runs.distributed import process_group
from fgvc.training.epoch_start import _images_key
from fgvc.training.session import open_session


def facts(tree: dict, **sections: object) -> str | None:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    config = validate(Recipe, merged, where="test")
    with process_group(config.train) as process, open_session(config, process) as session:
        return _images_key(session)


def test_answers_of_other_images_are_not_taken_for_those_of_these(
    recipe_tree: dict, colours: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(colours, tmp_path / "colours")
    tree = recipe_tree | {"data": recipe_tree["data"] | {"root": str(root)}}
    first = facts(tree)
    assert first is not None
    assert facts(tree) == first
    assert facts(tree, optim={"lr": 0.5}) == first, "the images are the same"
    picture = sorted((root / "train").rglob("*.png"))[0]
    before = picture.stat()
    picture.write_bytes(picture.read_bytes() + b"\0")
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert facts(tree) not in (first, None)


@pytest.mark.parametrize(
    "sections", [{"train": {"seed": 7}}, {"augment": {"flip": 0.0}}, {"image": {"size": 48}}], ids=str
)
def test_other_images_have_another_key(recipe_tree: dict, sections: dict) -> None:
    assert facts(recipe_tree, **sections) not in (facts(recipe_tree), None)


@pytest.mark.parametrize(
    "sections", [{"train": {"sampling": "balanced"}}, {"techniques": {"ae_psl": {"rounds": 2}}}], ids=str
)
def test_images_that_no_other_run_sees_are_kept_by_none(recipe_tree: dict, sections: dict) -> None:
    assert facts(recipe_tree | {"image": {"size": 64}}, **sections) is None
