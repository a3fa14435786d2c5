"""Runs that begin with a deployed file's weights where too few images are unseen for any to choose."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.runs import checkpoint
from fgvc.runs.folder import read_run
from fgvc.runs.images import first_index
from fgvc.runs.loaded import load_run
from fgvc.studies import run as studies
from tests.e2e.test_deployed_file import NAMES, SPEC, tree
from tests.evaluation.test_judging import COLOURS, draw
from tests.models.onnxnet import small
from tests.studies.test_run import plan
from tests.trained import Once

WIDTH = 40


@pytest.fixture(scope="module")
def by_heart(once: Once) -> tuple[Path, Path]:
    """A set of 4 train and 6 test pictures of three classes, and a file that is right about every train picture: its head
    interpolates their features."""

    def make(folder: Path) -> None:
        for split, count, seed in (("train", 4, 5000), ("test", 6, 0)):
            draw(folder / "set" / split, COLOURS, count, seed)
        rng = np.random.default_rng(0)
        values = {
            "stem.weight": rng.normal(0, 1, (WIDTH, 3, 3, 3)), "stem.bias": rng.normal(0, 1, WIDTH),
            "head.weight": np.eye(len(NAMES), WIDTH), "head.bias": np.zeros(len(NAMES)),
        }  # fmt: skip
        _write(folder / "deployed.onnx", values)
        (folder / "labels.txt").write_text("\n".join(NAMES))
        (folder / "preprocess.json").write_text(json.dumps(SPEC))
        index = first_index(Recipe.model_validate(tree(folder / "deployed.onnx", folder / "set")))
        rows = index.rows("train")
        model = onnx.load(str(folder / "deployed.onnx"))
        model.graph.output[0].name = "d"  # what the head reads
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = WIDTH
        del model.graph.node[-1]
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        features = session.run(None, {"image": _pixels(index, rows)})[0].astype(np.float64)
        targets = 10 * np.eye(len(NAMES))[index.labels[rows]]
        values["head.weight"] = np.linalg.lstsq(features, targets, rcond=None)[0].T
        _write(folder / "deployed.onnx", values)

    folder = once.made("by heart", make)
    return folder / "deployed.onnx", folder / "set"


def _write(path: Path, values: dict[str, np.ndarray]) -> None:
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    path.write_bytes(small.model(small.layers(), tensors).SerializeToString())


def _pixels(index: Any, rows: np.ndarray) -> np.ndarray:
    from PIL import Image

    images = [Image.open(index.path(row)).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR) for row in rows]
    return ((np.stack([np.asarray(image) for image in images]) / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2)


def settings(file: Path, root: Path, **sections: Any) -> dict[str, Any]:
    recipe_tree = tree(file, root, train={"epochs": 2, "max_steps": None}, **sections)
    del recipe_tree["select"]
    return recipe_tree


def test_select_is_the_average_where_the_start_knows_all_of_train(by_heart: tuple[Path, Path], tmp_path: Path) -> None:
    file, root = by_heart
    run = api.train(Recipe.model_validate(settings(file, root)), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    rows = loaded.index.rows("train")
    start = loaded.selecting("start").answers(rows)
    assert (start.logits.argmax(1) == start.labels).all(), "or it is not by heart, and nothing is shown"
    assert loaded.select == "ema"
    assert read_run(tmp_path / "run").ema is not None
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if event["event"] == "validated"], "epoch 0 is no candidate"
    assert not checkpoint.has_checkpoint(tmp_path / "run" / "ckpt" / "best")
    (floor,) = [event for event in events if event["event"] == "floor"]
    assert "top1" not in floor, "no image could score it but those that judge"
    assert api.evaluate(run, "test", select="floor").scores.images == 18
    shipped = loaded.step.net.state_dict()
    began = loaded.selecting("start").step.net.state_dict()
    assert not all(torch.equal(shipped[key], began[key]) for key in shipped)
    answers = api.compare(file, run)
    assert answers.judged == f"judged on 18 unseen images of test, which {tmp_path / 'run'} set aside to judge"
    assert {path.parts[-3] for path in answers.paths} == {"test"}
    exported = api.export(run, tmp_path / "bundle")
    assert exported.proven.written is not None
    assert exported.proven.written.moved


def test_a_resumed_run_ends_with_the_same_bits(by_heart: tuple[Path, Path], tmp_path: Path) -> None:
    file, root = by_heart
    half, whole = settings(file, root), settings(file, root)
    half["train"]["max_steps"] = 1
    api.train(Recipe.model_validate(half), tmp_path / "half")
    api.train(Recipe.model_validate(whole), tmp_path / "half")
    api.train(Recipe.model_validate(whole), tmp_path / "whole")
    states = [load_run(tmp_path / name).step.net.state_dict() for name in ("half", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    api.train(Recipe.model_validate(whole), tmp_path / "half")  # finished, and stays so


@pytest.mark.parametrize("sections", [{"select": "best"}, {"train": {"epochs": 2, "max_steps": None, "refit": True}}])
def test_what_chooses_by_validation_is_refused(sections: dict[str, Any], by_heart: tuple[Path, Path], tmp_path: Path) -> None:
    file, root = by_heart
    with pytest.raises(NoUnseenImagesError, match="of fewer than 200 images .* none may choose"):
        api.train(Recipe.model_validate(settings(file, root) | sections), tmp_path / "run")
    with pytest.raises(FgvcError, match="cross-validation is for starts that have not seen the data"):
        api.train(Recipe.model_validate(settings(file, root, data={"fold": [0, 3]})), tmp_path / "run")


def test_select_of_the_recipe_is_kept(by_heart: tuple[Path, Path], tmp_path: Path) -> None:
    file, root = by_heart
    api.train(Recipe.model_validate(settings(file, root) | {"select": "last"}), tmp_path / "run")
    assert read_run(tmp_path / "run").ema is None


def test_a_study_without_images_to_choose_by_is_scored_by_those_that_judge(
    by_heart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fgvc.studies.cost.PAIRS", 1)
    file, root = by_heart
    base = settings(file, root)
    study = plan(tmp_path, base, {"plain": {}, "faster": {"optim.lr": 0.1}}, seeds=[0])
    assert not studies.ablate(study, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert [(row["arm"], row["split"], row["images"]) for row in rows] == [("plain", "test", "18"), ("faster", "test", "18")]
    assert "none chooses, all score the arms" in capsys.readouterr().err
    assert "## Test: equal epochs" in (tmp_path / "out" / "table.md").read_text()
    before = (tmp_path / "out" / "runs.csv").read_text()
    assert not studies.ablate(study, tmp_path / "out"), "all is done"
    assert (tmp_path / "out" / "runs.csv").read_text() == before
    with pytest.raises(FgvcError, match="nothing is left to read"):
        studies.read_test(study, tmp_path / "out")
    several = plan(tmp_path, base, {"plain": [{}, {"optim.lr": 0.1}]}, seeds=[0])
    with pytest.raises(NoUnseenImagesError, match=r"arms\.plain: of fewer than 200"):
        studies.ablate(several, tmp_path / "several")
