"""What a run starts from: a fitted head, and batch norms that keep the statistics of the pretrained weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fgvc.config.data import Augment
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.errors import FgvcError
from fgvc.runs.build import build_net
from fgvc.runs.folder import recorded_preprocess
from fgvc.runs.images import read_index
from fgvc.training import trainer


@pytest.fixture
def pretrained(tmp_path: Path, recipe_tree: dict) -> dict:
    """The recipe with weights from a file, whose batch norms have statistics that no batch of these images has."""
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", num_classes=10)
    for norm in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.uniform_(norm.weight, 0.2, 0.5)
    save_file(net.state_dict(), tmp_path / "start.safetensors")
    (tmp_path / "start.safetensors.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    model = {"backbone": "test_resnet", "weights": str(tmp_path / "start.safetensors")}
    return recipe_tree | {"model": model, "optim": {"lr": 0.01, "clip_grad": 1}}


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = {k: tree.get(k, {}) | v if isinstance(v, dict) else v for k, v in sections.items()}
    return validate(Recipe, tree | merged, where="test")


def last(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / "last" / "net.safetensors")


def clean_loss(one: Recipe, run: Path) -> float:
    """Mean cross-entropy of the training images as evaluation sees them."""
    index = read_index(one)
    net = timm.create_model("test_resnet", num_classes=len(index.classes))
    net.load_state_dict(last(run))
    spec, net = recorded_preprocess(run), net.eval()
    batches = list(evaluation_loader(index, index.rows("train"), spec=spec, batch_size=64, workers=0))
    with torch.inference_mode():
        z = torch.cat([net(batch.images) for batch in batches])
    return float(torch.nn.functional.cross_entropy(z, torch.cat([batch.labels for batch in batches])))


def test_the_head_is_fitted_to_the_frozen_net_before_the_first_step(tmp_path: Path, pretrained: dict) -> None:
    still = {"train": {"max_steps": 1}, "optim": {"lr": 1e-12}}
    for head in ("timm", "zero", "probe"):
        trainer.train(recipe(pretrained, **still, model={"head": head, "batch_norm": "frozen"}), tmp_path / head)
    start = load_file(tmp_path / "start.safetensors")
    for name, value in last(tmp_path / "probe").items():
        if not name.startswith("fc."):
            torch.testing.assert_close(value, start[name], rtol=1e-5, atol=1e-7)
    one = recipe(pretrained)
    losses = {head: clean_loss(one, tmp_path / head) for head in ("timm", "zero", "probe")}
    assert losses["zero"] == pytest.approx(math.log(len(read_index(one).classes)), rel=1e-4)
    assert losses["probe"] < 0.8 * losses["zero"]
    assert losses["probe"] < losses["timm"]


def test_a_run_that_goes_on_does_not_fit_anew(tmp_path: Path, pretrained: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"head": "probe", "batch_norm": "frozen"}
    trainer.train(recipe(pretrained, model=model, ema={"decay": 0.9}), tmp_path / "whole")
    trainer.train(recipe(pretrained, model=model, ema={"decay": 0.9}, train={"max_steps": 3}), tmp_path / "parts")
    monkeypatch.setattr("fgvc.training.trainer.fit_floor", lambda session: pytest.fail("fitted again"))
    trainer.train(recipe(pretrained, model=model, ema={"decay": 0.9}), tmp_path / "parts")
    for name in ("net", "ema"):
        whole, parts = (load_file(tmp_path / run / "ckpt" / "last" / f"{name}.safetensors") for run in ("whole", "parts"))
        assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_the_first_checkpoint_holds_the_fitted_head_and_so_does_its_average(
    tmp_path: Path, pretrained: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgvc.training.trainer._run_epochs", lambda *_: None)
    one = recipe(pretrained, model={"head": "probe"}, ema={"decay": 0.9})
    trainer.train(one, tmp_path / "run")
    assert clean_loss(one, tmp_path / "run") < 0.5
    average = load_file(tmp_path / "run" / "ckpt" / "last" / "ema.safetensors")
    assert all(torch.equal(average[key], value) for key, value in last(tmp_path / "run").items())


@pytest.mark.parametrize("technique", [{}, {"dcl": {"grid": 2}}, {"acb": {}}])
def test_frozen_statistics_stay_and_scale_and_shift_learn(tmp_path: Path, pretrained: dict, technique: dict) -> None:
    start = load_file(tmp_path / "start.safetensors")
    for norm in ("frozen", "batch"):
        trainer.train(recipe(pretrained, model={"batch_norm": norm}, techniques=technique), tmp_path / norm)
        weights = last(tmp_path / norm)
        statistics = [key for key in start if key.endswith(("running_mean", "running_var"))]
        assert statistics
        assert all(torch.equal(weights[key], start[key]) == (norm == "frozen") for key in statistics)
        assert not any(torch.equal(weights[key], start[key]) for key in start if key.endswith("bn1.weight"))


def test_swa_keeps_frozen_statistics(tmp_path: Path, pretrained: dict) -> None:
    one = recipe(pretrained, model={"batch_norm": "frozen"}, swa={"start": 0.5})
    trainer.train(one, tmp_path / "run")
    start, average = load_file(tmp_path / "start.safetensors"), load_file(tmp_path / "run" / "ckpt" / "last" / "ema.safetensors")
    assert all(torch.equal(average[key], start[key]) for key in start if key.endswith(("running_mean", "running_var")))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"weights": "none", "head": "probe"}}, "pretrained features"),
        ({"model": {"weights": "none", "batch_norm": "frozen"}}, "no statistics to keep"),
        ({"model": {"batch_norm": "frozen"}, "train": {"precise_bn": 8}}, r"train\.precise_bn"),
    ],
)
def test_refuses_what_contradicts(pretrained: dict, sections: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        recipe(pretrained, **sections)


@pytest.mark.parametrize("head", [{}, {"head": "zero"}])
def test_a_net_whose_head_cannot_be_fitted_is_told_the_way_out(tmp_path: Path, recipe_tree: dict, head: dict) -> None:
    name = "deit_tiny_distilled_patch16_224"
    save_file(timm.create_model(name).state_dict(), tmp_path / "two.safetensors")
    model = {"backbone": name, "weights": str(tmp_path / "two.safetensors"), **head}
    one = recipe(recipe_tree | {"model": model, "image": {"size": 224}})
    with pytest.raises(FgvcError, match=rf"model\.head: {one.model.head}: .*; set model\.head=timm"):
        build_net(one, 3)


def test_views_before_training_are_of_every_image_and_of_no_epoch(recipe_tree: dict, tmp_path: Path) -> None:
    one = recipe(recipe_tree)
    index = read_index(one)
    trainer.train(recipe(recipe_tree, train={"max_steps": 1}), tmp_path / "run")
    augmenter = Augmenter(Augment(), recorded_preprocess(tmp_path / "run"), seed=0)
    rows = index.rows("train")[:7]
    images = {}
    for workers in (0, 1):
        batches = list(
            augmented_views(index, rows, augmenter=augmenter, views=2, batch_size=5, seed=0, workers=workers)
        )
        assert torch.cat([batch.index for batch in batches]).tolist() == rows.tolist() * 2
        images[workers] = torch.cat([batch.images for batch in batches])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0][:7], images[0][7:])
