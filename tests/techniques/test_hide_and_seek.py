"""Hide-and-Seek's cells: exactly those that were drawn, each by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fgvc.techniques.api import Batch
from fgvc.techniques.hide_and_seek.settings import HideAndSeekSettings
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique

COUNT = 4000


def batch(size: int = 2, sides: tuple[int, int] = (12, 16)) -> Batch:
    x = torch.randn(size, 3, *sides, generator=torch.Generator().manual_seed(1)) + 2
    y = torch.zeros(size, dtype=torch.int64)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def context(draw: object) -> Context:
    return Context(draw=draw, progress=0.0, branches={}, head=torch.abs, pooled=torch.abs, grid=torch.abs)


def cells(seed: int = 0, **settings: object) -> np.ndarray:
    """(N,grid,grid) bool: which cells are hidden."""
    technique = build_technique(HideAndSeekSettings(**{"probability": 1, **settings}))
    return technique.draw(np.random.default_rng(seed), batch(COUNT, (2, 2)))[0].numpy()


@pytest.mark.parametrize(("sides", "grid"), [((12, 16), 4), ((10, 14), 4), ((7, 9), 3), ((5, 5), 2)])
def test_the_drawn_cells_are_hidden_to_the_pixel(sides: tuple[int, int], grid: int) -> None:
    data = batch(3, sides)
    before = data.x.clone()
    hidden = torch.rand(3, grid, grid, generator=torch.Generator().manual_seed(2)) < 0.5
    hidden[2] = False
    out = build_technique(HideAndSeekSettings(grid=grid)).on_batch(data, context((hidden, 0)))
    for b in range(3):
        for i in range(sides[0]):
            for j in range(sides[1]):
                cell = hidden[b, math.floor((i + 0.5) * grid / sides[0]), math.floor((j + 0.5) * grid / sides[1])]
                expected = torch.zeros(3) if cell else before[b, :, i, j]
                assert torch.equal(out.x[b, :, i, j], expected), (b, i, j)
    assert torch.equal(data.x, before), "not in place"
    assert torch.equal(out.x_clean, before)


@pytest.mark.parametrize(("share", "grid"), [(0.5, 4), (0.2, 4), (0.7, 2)])
def test_cells_are_hidden_as_often_as_they_should_be_and_each_by_itself(share: float, grid: int) -> None:
    hidden, count = cells(share=share, grid=grid), grid * grid
    # were all hidden, which happens with share^count, one stays, any of them alike
    expected = share - share**count / count
    error = math.sqrt(share * (1 - share) / COUNT)
    assert np.abs(hidden.mean(0) - expected).max() < 4.5 * error
    numbers = hidden.reshape(COUNT, -1).sum(1)
    likely = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
    likely[count - 1] += likely.pop()
    frequencies = np.bincount(numbers, minlength=count) / COUNT
    assert len(frequencies) == count
    assert np.abs(frequencies - likely).max() < 4 * math.sqrt(0.25 / COUNT)
    if share**count < 1e-3:
        correlations = np.corrcoef(hidden.reshape(COUNT, -1).T) - np.eye(count)
        assert np.abs(correlations).max() < 4.5 / math.sqrt(COUNT)


def test_never_everything_is_hidden() -> None:
    hidden = cells(share=0.99, grid=2).reshape(COUNT, -1)
    assert (hidden.sum(1) == 3).mean() > 0.9
    assert not hidden.all(1).any()
    assert np.abs((~hidden).mean(0) - 0.25).max() < 0.04, "the one that stays may be any"


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_share_of_pictures_with_hidden_cells_is_the_probability(probability: float) -> None:
    share = float(cells(probability=probability).reshape(COUNT, -1).any(1).mean())
    assert share == pytest.approx(probability, abs=0.03)
    if not probability:
        data, technique = batch(), build_technique(HideAndSeekSettings(probability=0))
        assert torch.equal(technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data))).x, data.x)


@pytest.mark.parametrize("fill", ["zero", "mean", "random", "noise"])
def test_each_fill_fills_the_hidden_cells_alone(fill: str) -> None:
    data, technique = batch(), build_technique(HideAndSeekSettings(grid=2, fill=fill))
    hidden = torch.tensor([[[True, False], [False, False]], [[False, False], [False, True]]])
    out, again, other = (technique.on_batch(data, context((hidden, seed))).x for seed in (1, 1, 2))
    parts = [out[0, :, :6, :8].flatten(1), out[1, :, 6:, 8:].flatten(1)]
    for part, x in zip(parts, data.x, strict=True):
        match fill:
            case "zero":
                assert (part == 0).all()
            case "mean":
                torch.testing.assert_close(part, x.double().mean((1, 2)).float()[:, None].expand_as(part))
            case "random":
                assert (part == part[:, :1]).all()
            case "noise":
                assert len(part.unique()) == part.numel()
    assert torch.equal(out, again)
    assert torch.equal(out, other) == (fill in ("zero", "mean"))
    if fill == "random":
        assert not torch.equal(parts[0][:, 0], parts[1][:, 0])


def test_draws_of_a_batch_that_is_mixed_leave_its_target_alone() -> None:
    data, technique = batch(), build_technique(HideAndSeekSettings(probability=1))
    share = torch.tensor([0.3, 0.6])
    data.target = [(data.labels, share), (data.labels + 1, 1 - share)]
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data)))
    assert out.target is data.target
    assert not torch.equal(out.x, data.x)


def test_a_grid_finer_than_the_picture_leaves_a_pixel() -> None:
    technique = build_technique(HideAndSeekSettings(probability=1, grid=32, share=0.95))
    data = batch(200, (8, 8))
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data))).x
    assert (out != 0).flatten(1).any(1).all()
