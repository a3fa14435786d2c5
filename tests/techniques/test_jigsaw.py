"""The jigsaw against a loop written from the formula, its exact inverse, and the odds of the draw worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgvc.errors import FgvcError
from fgvc.techniques.dcl.jigsaw import cut, draw_jigsaws, places

GRIDS = st.integers(2, 9)
REACHES = st.floats(0.6, 12)


def by_the_formula(noise: np.ndarray, n: int) -> list[int]:
    """The permutation by the formula: sort i + U(-k,k) in every row, then in every column of the result."""
    picture = [[(i, j) for j in range(n)] for i in range(n)]
    for i in range(n):
        order = sorted(range(n), key=lambda j: j + noise[0, i, j])
        picture[i] = [picture[i][j] for j in order]
    for j in range(n):
        order = sorted(range(n), key=lambda i: i + noise[1, j, i])
        column = [picture[i][j] for i in order]
        for i in range(n):
            picture[i][j] = column[i]
    return [i * n + j for row in picture for i, j in row]


@given(GRIDS, REACHES, st.integers(0, 2**32))
def test_the_draw_is_the_formula(n: int, reach: float, seed: int) -> None:
    sources = draw_jigsaws(np.random.default_rng(seed), 3, grid=n, reach=reach)
    noise = np.random.default_rng(seed).uniform(-reach, reach, size=(2, 3, n, n))
    assert sources.tolist() == [by_the_formula(noise[:, b], n) for b in range(3)]


@given(GRIDS, REACHES, st.integers(0, 2**32))
def test_it_is_a_permutation_within_its_reach(n: int, reach: float, seed: int) -> None:
    sources = draw_jigsaws(np.random.default_rng(seed), 4, grid=n, reach=reach)
    assert (np.sort(sources, axis=1) == np.arange(n * n)).all()
    cell = np.arange(n * n)
    assert np.abs(sources // n - cell // n).max() < 2 * reach
    assert np.abs(sources % n - cell % n).max() < 2 * reach


@given(GRIDS, st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**32))
def test_the_inverse_puts_the_picture_together_again(n: int, more: int, wider: int, seed: int) -> None:
    x = torch.rand(2, 3, n + more, n + wider, generator=torch.Generator().manual_seed(seed))
    source = torch.from_numpy(draw_jigsaws(np.random.default_rng(seed), 2, grid=n, reach=2))
    shuffled = cut(x, source)
    assert torch.equal(cut(shuffled, source.argsort(1)), x)
    h, w = (n + more) // n, (n + wider) // n
    assert torch.equal(shuffled[:, :, n * h :], x[:, :, n * h :]), "the border stays"
    assert torch.equal(shuffled[:, :, :, n * w :], x[:, :, :, n * w :])
    for b in range(2):
        for cell, origin in enumerate(source[b].tolist()):
            (i, j), (k, m) = divmod(cell, n), divmod(origin, n)
            patch = x[b, :, k * h : (k + 1) * h, m * w : (m + 1) * w]
            assert torch.equal(shuffled[b, :, i * h : (i + 1) * h, j * w : (j + 1) * w], patch)


def test_channels_last_pictures_keep_their_layout() -> None:
    x = torch.rand(2, 3, 14, 21).contiguous(memory_format=torch.channels_last)
    shuffled = cut(x, torch.from_numpy(draw_jigsaws(np.random.default_rng(0), 2, grid=7, reach=2)))
    assert shuffled.is_contiguous(memory_format=torch.channels_last)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("reach", "swap"), [(1.0, 1 / 8), (2.0, 9 / 32), (0.75, 1 / 18)])
def test_two_cells_swap_as_often_as_they_should(reach: float, swap: float) -> None:
    """P(U1 - U2 > 1) = (2k-1)^2 / (8 k^2) for U in (-k,k); the four rows and columns of a 2 x 2 grid are independent."""
    draws = 20_000
    sources = draw_jigsaws(np.random.default_rng(0), draws, grid=2, reach=reach)
    rows = [[int(b) for b in f"{code:04b}"] for code in range(16)]  # row 0, row 1, column 0, column 1 swapped?
    odds: dict[tuple[int, ...], float] = {}
    for swapped in rows:
        noise = np.zeros((2, 2, 2))
        noise[..., 0] = 2.0 * np.reshape(swapped, (2, 2))  # cell 0 behind cell 1
        key = tuple(by_the_formula(noise, 2))
        odds[key] = odds.get(key, 0.0) + float(np.prod([swap if s else 1 - swap for s in swapped]))
    assert sum(odds.values()) == pytest.approx(1)
    counts = np.array([(sources == key).all(1).sum() for key in odds])
    assert counts.sum() == draws
    assert chi_square(counts, draws * np.array(list(odds.values()))) < 45  # 15 degrees at most: p of 1e-4 is 44.3


def test_with_a_wide_reach_every_cell_comes_from_everywhere_alike() -> None:
    draws = 12_000
    sources = draw_jigsaws(np.random.default_rng(1), draws, grid=3, reach=1e6)
    for cell in range(9):
        counts = np.bincount(sources[:, cell], minlength=9)
        assert chi_square(counts, np.full(9, draws / 9)) < 31.8  # 8 degrees of freedom: p of 1e-4


@pytest.mark.parametrize(("reach", "stays"), [(1, 0.79), (2, 0.47), (3, 0.34)])
def test_cells_stay_in_their_row_as_often_as_measured_elsewhere(reach: float, stays: float) -> None:
    sources = draw_jigsaws(np.random.default_rng(2), 4000, grid=7, reach=reach)
    assert (sources // 7 == np.arange(49) // 7).mean() == pytest.approx(stays, abs=0.012)  # N = 7


def test_places_are_shares_of_the_side() -> None:
    home = places(torch.arange(4)[None])
    assert home[0].tolist() == [[[0.25, 0.25], [0.75, 0.75]], [[0.25, 0.75], [0.25, 0.75]]]
    assert places(torch.tensor([[3, 2, 1, 0]]))[0, 0].tolist() == [[0.75, 0.75], [0.25, 0.25]]


def test_a_grid_that_is_finer_than_the_image_is_an_error() -> None:
    with pytest.raises(FgvcError, match="16 x 16 patches needs larger images than 8 x 40"):
        cut(torch.zeros(1, 3, 8, 40), torch.arange(256)[None])
