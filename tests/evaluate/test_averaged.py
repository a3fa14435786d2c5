"""Averaged views against one pass at a time; the deployed crop is one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fgvc import api
from fgvc.config import Preprocess, validate
from fgvc.evaluate.averaged import averaged, canvas
from fgvc.image.preprocess import preprocess
from fgvc.recipe import Recipe
from fgvc.types import FgvcError


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
        torch.testing.assert_close(averaged(net, views, (8, 10))(x).exp(), expected)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(300, 200), (120, 260)])
def test_the_centre_of_the_canvas_is_the_deployed_crop(resize: str, size: tuple[int, int]) -> None:
    spec = Preprocess(size=(160, 128), resize=resize, crop_fraction=0.875)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(1, 2)

    averaged(keep, "crops", spec.size)(torch.from_numpy(preprocess(image, canvas(spec)))[None])
    deployed = preprocess(image, spec)  # to a pixel: two centres are rounded one after the other
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    moved = [np.roll(seen[0][0].numpy(), shift, (1, 2))[:, 1:-1, 1:-1] for shift in shifts]
    assert any((part == deployed[:, 1:-1, 1:-1]).all() for part in moved)
    assert [tuple(part.shape[2:]) for part in seen] == [(160, 128)] * 5


def test_they_are_recorded_apart_and_stay_out_of_bundles(tmp_path, recipe_tree: dict) -> None:
    run = api.train(
        validate(Recipe, recipe_tree | {"select": "best", "select_by": "loss"}, where="test"), tmp_path / "r"
    )
    plain, many = api.evaluate(run, "test"), api.evaluate(run, "test", views="flip+crops")
    assert (plain.split, many.split) == ("test", "test-flip+crops")
    assert set(api._recorded(run)) == {"test.best", "test-flip+crops.best"}
    assert {path.name for path in (run / "tables").iterdir()} >= {"classes-test.csv", "confused-test-flip+crops.csv"}
    squashed = recipe_tree | {"deploy": {"resize": "squash"}}
    whole = api.train(validate(Recipe, squashed, where="test"), tmp_path / "squashed")
    with pytest.raises(FgvcError, match="all crops are the same"):
        api.evaluate(whole, "test", views="crops")
    bundle = api.export(run, tmp_path / "bundle").bundle
    assert "flip" not in (bundle / "metrics.json").read_text()
