"""What training says of the data before the first step, and keeps with the run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fgvc.api import load_recipe
from fgvc.config.models import Model
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.evaluation.metrics import score_logits
from fgvc.training.trainer import train
from fgvc.training.validate import start_doubt


def test_what_is_odd_about_the_data_is_said_and_kept(recipe_tree: dict, colours: Path, tmp_path: Path, capfd) -> None:
    root = tmp_path / "set"
    shutil.copytree(colours, root)
    (root / "train" / "red" / "phone.heic").write_bytes(b"?")
    for file in root.rglob("*.png"):  # 12 bits in 16
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 16).save(file)
    path, run = tmp_path / "r.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(recipe_tree | {"data": {"kind": "folder", "root": str(root)}}))
    train(load_recipe(path, ["train.max_steps=1"]), run)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    warnings = next(event["warnings"] for event in events if "warnings" in event)
    assert "1 files are of other types than fgvc reads, and left out: .heic 1" in warnings
    assert any("integers of 16 bits (I;16)" in line and "multiply all values by 16" in line for line in warnings)
    captured = capfd.readouterr()
    for line in warnings:
        assert f"WARNING: {line}" in captured.out + captured.err


def test_boxes_in_shares_are_refused_for_training(boxed_tree: dict, boxed: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(boxed, root)
    lines = [line.split() for line in (root / "bounding_boxes.txt").read_text().splitlines()]
    (root / "bounding_boxes.txt").write_text(
        "\n".join(" ".join([number, *(str(float(side) / 48) for side in box)]) for number, *box in lines) + "\n"
    )
    path = tmp_path / "r.yaml"
    tree = boxed_tree | {"data": {"kind": "cub", "root": str(root)}, "techniques": {"box_head": {}}}
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(FgvcError, match="are they shares of the image's sides"):
        train(load_recipe(path, ["train.max_steps=1"]), tmp_path / "run")


@pytest.mark.parametrize("head", ["timm", "zero", "probe"])
def test_the_doubt_of_a_start_names_settings_that_there_are(head: str) -> None:
    model = Model(backbone="resnet18", weights="hub", head=head)
    doubt = start_doubt(score_logits(np.array([[90.0, 0], [0, 0]]), np.array([1, 0])), model)
    assert doubt is not None
    keys = re.findall(r"\b(?:model|deploy)\.\w+", doubt)
    assert keys
    for section, _, key in (name.partition(".") for name in keys):
        assert key in Recipe.model_fields[section].annotation.model_fields, doubt
