"""A transformer of any size at 4:1, whose 64 tokens are a square's, too: trained by what looks at cells, explained, exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.exporting.onnx import explain_model
from fgvc.reparam.plain import strip
from fgvc.report.explain import explain
from fgvc.runs.loaded import load_run
from fgvc.training import trainer

SIZE, CELLS = (64, 256), (4, 16)
TECHNIQUES = {
    "adl": {"stages": [-1, "features"]}, "dropblock": {}, "dcl": {"grid": 4}, "acol": {}, "attention_crop_drop": {},
    "cam_erasing": {}, "multiscale_head": {"stages": [-2, "features"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": list(SIZE)},
        "deploy": {"resize": "squash"},
        "model": {"backbone": "test_vit", "kwargs": {"dynamic_img_size": True, "global_pool": "avg", "fc_norm": False}},
        "train": {"epochs": 1, "batch_size": 8, "max_steps": 2, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.01, "warmup_epochs": 0},
        "ema": {"decay": 0.9},
        "techniques": TECHNIQUES,
    }
    out = tmp_path_factory.mktemp("runs") / "run"
    trainer.train(validate(Recipe, tree, where="test"), out)
    return out


def test_maps_and_what_gates_drop_lie_on_the_pictures_grid(run: Path) -> None:
    step = load_run(run).step
    assert step.attachments.shapes()[0][1:] == CELLS


@pytest.mark.parametrize("method", ["cam", "gradcam", "ablationcam"])
def test_explained_maps_have_the_grid_of_the_tokens(run: Path, colours: Path, tmp_path: Path, method: str) -> None:
    picture = next((colours / "test" / "red").iterdir())
    assert explain(run, [picture], tmp_path / "looks", methods=[method]) == 0
    arrays = np.load(tmp_path / "looks" / "maps" / f"{picture.stem}.npz")
    assert arrays[f"raw_{method}"].shape == CELLS
    assert arrays["maps"].shape == (1, *SIZE)


def test_the_exported_maps_are_those_of_the_tokens_one_by_one(run: Path) -> None:
    loaded = load_run(run)
    plain = strip(loaded.step.net, backbone="test_vit", num_classes=3, kwargs=loaded.recipe.model.kwargs).eval()
    explains, reason = explain_model(plain, size=SIZE)
    assert explains is not None, reason
    x = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (z, maps), tokens = explains(x), plain.forward_features(x)
    weight = plain.get_classifier().weight
    for row, column in ((0, 0), (1, 3), (3, 15)):
        token = tokens[0, plain.num_prefix_tokens + row * CELLS[1] + column]
        torch.testing.assert_close(maps[0, :, row, column], weight @ token)
    torch.testing.assert_close(maps.mean((2, 3)) + explains.bias, z)
