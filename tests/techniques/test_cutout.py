"""Cutout's squares: exactly where they were drawn, and drawn as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.api import Batch
from fgvc.techniques.cutout.settings import CutoutSettings
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique

COUNT = 4000


def batch(size: int = 3, sides: tuple[int, int] = (24, 32)) -> Batch:
    x = torch.randn(size, 3, *sides, generator=torch.Generator().manual_seed(1)) + 2
    y = torch.zeros(size, dtype=torch.int64)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def blank(size: int, sides: tuple[int, int]) -> Batch:
    """A batch for draws only."""
    x = torch.empty(size, 3, *sides, device="meta")
    y = torch.zeros(size, dtype=torch.int64)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def context(draw: object) -> Context:
    return Context(draw=draw, progress=0.0, branches={}, head=torch.abs, pooled=torch.abs, grid=torch.abs)


def cut(data: Batch, boxes: list, *, seed: int = 5, **settings: object) -> Tensor:
    before, clean = data.x.clone(), data.x_clean.clone()
    ctx = context((torch.tensor(boxes, dtype=torch.float32), seed))
    out = build_technique(CutoutSettings(**settings)).on_batch(data, ctx)
    assert torch.equal(data.x, before), "the input is not changed in place"
    assert torch.equal(out.x_clean, clean), "the clean image stays"
    mask = ctx.shown["erased"][1]
    assert torch.equal(out.x[~mask[:, None].expand_as(out.x)], before[~mask[:, None].expand_as(before)])
    return out.x


# one in the middle, one over the corner and one over the other, one whose picture is spared
BOXES = [[[4, 2, 8, 6], [0, 0, 0, 0]], [[-2, -2, 2, 2], [30, 22, 34, 26]], [[0, 0, 0, 0], [0, 0, 0, 0]]]


def holes() -> np.ndarray:
    mask = np.zeros((3, 24, 32), dtype=bool)
    mask[0, 2:6, 4:8] = True
    mask[1, :2, :2] = mask[1, 22:, 30:] = True
    return mask


@pytest.mark.parametrize("fill", ["zero", "mean", "random", "noise", "blur"])
def test_what_was_drawn_is_erased_and_nothing_else(fill: str) -> None:
    data = batch()
    out, mask = cut(data, BOXES, fill=fill), torch.from_numpy(holes())
    changed = (out != data.x).any(1)
    assert torch.equal(changed, mask)
    erased = [out[b][:, mask[b]] for b in range(2)]
    match fill:
        case "zero":
            assert all((part == 0).all() for part in erased)
        case "mean":
            for b, part in enumerate(erased):
                mean = data.x[b].double().mean((1, 2), keepdim=True)[:, 0].float()
                torch.testing.assert_close(part, mean.expand_as(part))
        case "random":
            assert all((part == part[:, :1]).all() for part in erased)
            assert not torch.equal(erased[0][:, 0], erased[1][:, 0]), "a colour of its own for every picture"
        case "noise":
            assert all(len(part.unique()) == part.numel() for part in erased)
        case "blur":
            assert float(erased[0].std(1).mean()) < float(data.x[0][:, mask[0]].std(1).mean())
    assert torch.equal(out, cut(data, BOXES, fill=fill)), "the draw alone decides"
    if fill in ("random", "noise"):
        assert not torch.equal(out, cut(data, BOXES, fill=fill, seed=6))


def test_noise_is_normal() -> None:
    data = batch(1, (64, 64))
    noise = cut(data, [[[0, 0, 64, 60]]], fill="noise")[0, :, :60].flatten().numpy()
    below = np.array([math.erf(v / math.sqrt(2)) / 2 + 0.5 for v in np.sort(noise)])
    assert np.abs(below - np.arange(len(noise)) / len(noise)).max() < 1.95 / math.sqrt(len(noise))


@pytest.mark.parametrize(("sides", "length", "side"), [((12, 16), 0.25, 3), ((16, 12), 0.5, 6), ((9, 9), 0.05, 1)])
def test_centres_are_uniform_over_the_picture(sides: tuple[int, int], length: float, side: int) -> None:
    boxes, _ = build_technique(CutoutSettings(length=length)).draw(np.random.default_rng(0), blank(COUNT, sides))
    left, top, right, bottom = boxes[:, 0].T
    assert boxes.shape == (COUNT, 1, 4)
    assert boxes.dtype == torch.float32
    assert (right - left == side).all()
    assert (bottom - top == side).all()
    for first, extent in ((top, sides[0]), (left, sides[1])):
        counts = np.bincount((first + side // 2).int().numpy(), minlength=extent)
        assert len(counts) == extent
        expected = COUNT / extent  # chi-squared: mean extent - 1, variance twice that
        assert ((counts - expected) ** 2 / expected).sum() < extent - 1 + 4 * math.sqrt(2 * (extent - 1))
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.06


def test_clipped_at_the_border_the_erased_share_is_its_expectation() -> None:
    height, width, side = 12, 16, 5
    technique = build_technique(CutoutSettings(length=side / 12))
    data = batch(COUNT, (height, width))
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(1), data))).x
    shares = (out == 0).all(1).double().mean((1, 2))

    def inside(extent: int) -> float:
        covered = [sum(0 <= c + d < extent for d in range(-(side // 2), side - side // 2)) for c in range(extent)]
        return sum(covered) / extent**2

    error = float(shares.std()) / math.sqrt(COUNT)
    assert abs(float(shares.mean()) - inside(height) * inside(width)) < 4 * error


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_share_of_cut_pictures_is_the_probability(probability: float) -> None:
    technique = build_technique(CutoutSettings(probability=probability, holes=2))
    data = batch(COUNT // 4)
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(2), data))).x
    share = float((out != data.x).flatten(1).any(1).double().mean())
    assert share == pytest.approx(probability, abs=4 * math.sqrt(0.21 / len(data.x)) if probability == 0.3 else 0)
    if not probability:
        assert torch.equal(out, data.x)


def test_holes_are_drawn_one_by_one() -> None:
    boxes, _ = build_technique(CutoutSettings(holes=3)).draw(np.random.default_rng(0), blank(COUNT, (32, 32)))
    assert boxes.shape == (COUNT, 3, 4)
    assert abs(np.corrcoef(boxes[:, 0, 0], boxes[:, 1, 0])[0, 1]) < 0.06


def test_the_same_key_draws_the_same_and_seeds_differ() -> None:
    technique = build_technique(CutoutSettings(fill="noise"))
    first, again, other = (technique.draw(np.random.default_rng(seed), batch()) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1] != other[1]


def test_blur_is_of_the_picture_itself() -> None:
    data = batch(1, (32, 32))
    out = cut(data, [[[0, 0, 32, 31]]], fill="blur")
    x = data.x.double()  # two box averages over 5 pixels, an eighth of the side and odd, of what is there
    for _ in range(2):
        ones = torch.ones_like(x)
        kernel = torch.ones(3, 1, 5, 5, dtype=torch.float64)
        x = F.conv2d(x, kernel, padding=2, groups=3) / F.conv2d(ones, kernel, padding=2, groups=3)
    torch.testing.assert_close(out[0, :, :31].double(), x[0, :, :31], rtol=1e-5, atol=1e-6)


def test_never_everything_is_erased() -> None:
    technique = build_technique(CutoutSettings(length=0.97))
    data = batch(COUNT // 4, (12, 12))
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data))).x
    assert (out != 0).flatten(1).any(1).all()
