"""The limit of a picture's pixels: one default, and a setting or an option of every verb that reads pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from fgvc.cli import shipping
from fgvc.cli.app import app, main
from fgvc.config.images import MAX_PIXELS
from fgvc.data.recipe import load_recipe
from fgvc.data.sources.read import read_source
from fgvc.serving.limits import Limits

Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def fgvc(capfd: pytest.CaptureFixture[str]) -> Ask:
    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, "".join(capfd.readouterr())

    return run


def test_the_limit_has_one_default() -> None:
    assert Limits().pixels == MAX_PIXELS
    for verb in (shipping.predict, shipping.serve):
        assert inspect.signature(verb).parameters["megapixels"].default * 1e6 == MAX_PIXELS
    for verb in ("eval", "localize", "report", "predict", "explain", "compare", "serve"):
        page = CliRunner().invoke(app, [verb, "--help"], terminal_width=200, env={"TERM": "dumb"}).stdout
        assert "--megapixels" in page


def test_every_verb_has_its_limit(recipe_tree: dict, colours: Path, tmp_path: Path, fgvc: Ask) -> None:
    """Pictures are of 1,920 pixels, and one in ten of the test split of 2,400."""
    root = tmp_path / "set"
    for file in sorted(colours.rglob("*.png")):
        place = root / file.relative_to(colours)
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(place)
    large = root / "test" / "red" / "00.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(large)
    path, run, bundle = tmp_path / "r.yaml", tmp_path / "run", tmp_path / "bundle"
    data = {"kind": "folder", "root": str(root), "max_megapixels": 0.002, "max_unreadable": 0.1}
    path.write_text(yaml.safe_dump(recipe_tree | {"data": data, "image": {"size": 64}}))
    assert read_source(load_recipe(path).data).max_pixels == 2000
    too_many = "red/00.png: too many pixels: 60 x 40 = 0.0024 megapixels, the limit is 0.002"
    code, output = fgvc("data", "check", path)
    assert "too many pixels: 60 x 40 = 0.0024 megapixels, the limit is 0.002; data.max_megapixels" in output
    assert "too many" not in fgvc("data", "check", path, "data.max_megapixels=0.003")[1]
    code, output = fgvc("train", path, "train.max_steps=2", "--out", run)
    assert code == 0, output
    code, output = fgvc("eval", run, "--split", "test")
    assert (code, too_many in output) == (0, True), output
    code, output = fgvc("eval", run, "--split", "test", "--megapixels", "0.003")
    assert (code, "too many" in output) == (0, False), output
    # A run that goes on may have another limit, and what reads it then has it, too.
    code, output = fgvc("train", path, "train.max_steps=3", "data.max_megapixels=0.003", "--out", run)
    assert code == 0, output
    code, output = fgvc("eval", run, "--split", "test")
    assert (code, "too many" in output) == (0, False), output
    code, output = fgvc("export", run, "-o", bundle)
    assert code == 0, output
    for verb in (("predict", bundle, large), ("explain", run, large, "-o", tmp_path / "seen")):
        code, output = fgvc(*verb, "--megapixels", "0.002")
        assert (code, too_many in output) == (1, True), output
    assert fgvc("predict", bundle, large)[0] == 0
    assert too_many in fgvc("compare", run, bundle, "--data", root, "--split", "test", "--megapixels", "0.002")[1]
    assert too_many in fgvc("compare", run, bundle, "--data", path, "--split", "test")[1]
