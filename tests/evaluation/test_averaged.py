"""Averaged views against one pass at a time; the deployed crop is one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc import api
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.evaluation.tta import average_views, canvas, refine_views
from fgvc.images.preprocess import preprocess
from fgvc.runs.loaded import load_run
from fgvc.runs.measured import read_measured
from fgvc.training import trainer


def net(x: torch.Tensor) -> torch.Tensor:
    """Sees where things are, so that no two views give the same."""
    rows = torch.linspace(-1, 1, x[0].numel()).view(1, *x.shape[1:])
    return torch.stack([(x * rows**k).sum((1, 2, 3)) / 50 for k in range(3)], dim=1)


def test_flips_and_crops_are_the_mean_of_their_probabilities() -> None:
    x = torch.randn(2, 3, 10, 13, generator=torch.Generator().manual_seed(0))
    cuts = [x[..., 1:9, 2:12], x[..., :8, :10], x[..., :8, 3:], x[..., 2:, :10], x[..., 2:, 3:]]
    for views, parts in (
        ("crops", cuts),
        ("flip+crops", [*cuts, *(part.flip(-1) for part in cuts)]),
        ("flip", [x, x.flip(-1)]),
    ):
        expected = torch.stack([net(part).softmax(1) for part in parts]).mean(0)
        torch.testing.assert_close(average_views(net, views, (8, 10))(x).exp(), expected)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (120, 260)])
def test_the_centre_of_the_canvas_is_the_deployed_crop(resize: str, size: tuple[int, int]) -> None:
    spec = Preprocess(size=(160, 128), resize=resize, crop_pct=0.875)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    views: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        views.append(x)
        return torch.zeros(1, 2)

    average_views(keep, "crops", spec.size)(torch.from_numpy(preprocess(image, canvas(spec)))[None])
    deployed = preprocess(image, spec)  # to a pixel: two centres are rounded one after the other
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moved = [np.roll(views[0][0].numpy(), shift, (1, 2))[:, 1:-1, 1:-1] for shift in shifts]
    assert any((part == deployed[:, 1:-1, 1:-1]).all() for part in moved)
    assert [tuple(part.shape[2:]) for part in views] == [(160, 128)] * 5


def test_they_are_recorded_apart_and_stay_out_of_bundles(tmp_path, recipe_tree: dict) -> None:
    tree = recipe_tree | {"select": "best", "select_by": "loss", "export": {"exporter": "torchscript"}}
    run = trainer.train(validate(Recipe, tree, where="test"), tmp_path / "r")
    plain, many = api.evaluate(run, "test"), api.evaluate(run, "test", views="flip+crops")
    assert (plain.split, many.split) == ("test", "test-flip+crops")
    assert set(read_measured(run, "metrics.json")) == {"test.best", "test-flip+crops.best"}
    assert {path.name for path in (run / "tables").iterdir()} >= {"classes-test.csv", "confused-test-flip+crops.csv"}
    squashed = recipe_tree | {"deploy": {"resize": "squash"}}
    whole = trainer.train(validate(Recipe, squashed, where="test"), tmp_path / "squashed")
    with pytest.raises(FgvcError, match="all crops are the same"):
        api.evaluate(whole, "test", views="crops")
    bundle = api.export(run, tmp_path / "bundle").bundle
    assert "flip" not in (bundle / "metrics.json").read_text()


@pytest.mark.parametrize("guide", ["attention", "cam"])
def test_a_second_pass_over_the_attended_crop(tmp_path: Path, recipe_tree: dict, guide: str) -> None:
    chosen = {"attention_crop_drop": {"maps": 4, "guide": guide, "map": "gradcam"}}
    recipe = validate(Recipe, recipe_tree | {"image": {"size": 64}, "techniques": chosen}, where="test")
    run = trainer.train(recipe, tmp_path / "run")
    plain, twice = api.evaluate(run), api.evaluate(run, views="refined")
    assert (plain.split, twice.split) == ("val", "val-refined")
    assert (twice.scores.loss != plain.scores.loss) or guide == "attention", "the mean attention may be the whole image"
    step = load_run(run, "last", branches=True).step
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, crops = step.logits_and_crops(x)
        torch.testing.assert_close(logits, step.net(x))
        features = step.net.forward_features(x)
        if guide == "attention":
            maps = step.branches["attention_crop_drop"]["attention"](features)[0].mean(1)
            fine = torch.nn.functional.interpolate(maps[:, None], (64, 64), mode="bilinear")[:, 0]
            rows = torch.nonzero((fine[0] >= 0.1 * fine[0].max()).any(1))[:, 0]
            columns = torch.nonzero((fine[0] >= 0.1 * fine[0].max()).any(0))[:, 0]
            if fine[0].max() > 0:  # the box, widened by 0.05 of 64 pixels, within the picture
                top, bottom = max(float(rows[0]) - 3.2, 0), min(float(rows[-1]) + 1 + 3.2, 64)
                left, right = max(float(columns[0]) - 3.2, 0), min(float(columns[-1]) + 1 + 3.2, 64)
                theta = torch.tensor(
                    [
                        [(right - left) / 64, 0, (left + right) / 64 - 1],
                        [0, (bottom - top) / 64, (top + bottom) / 64 - 1],
                    ]
                )
                grid = torch.nn.functional.affine_grid(theta[None], [1, 3, 64, 64], align_corners=False)
                expected = torch.nn.functional.grid_sample(x[:1], grid, padding_mode="border", align_corners=False)
                torch.testing.assert_close(crops()[:1], expected, rtol=0, atol=1e-3)
        both = torch.stack([logits.softmax(1), step.net(crops()).softmax(1)]).mean(0)
        torch.testing.assert_close(refine_views(step.logits_and_crops, step.net)(x).exp(), both)


def test_a_run_that_can_not_look_twice_says_so(tmp_path: Path, recipe_tree: dict) -> None:
    run = trainer.train(validate(Recipe, recipe_tree, where="test"), tmp_path / "run")
    with pytest.raises(FgvcError, match="--views refined needs a technique that looks twice"):
        api.evaluate(run, views="refined")
