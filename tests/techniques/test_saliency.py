"""Saliency against a loop over pixels."""

from __future__ import annotations

import pytest
import torch

from fgvc.techniques.saliencymix.saliency import RADII, REDUCED, peaks, saliency


def test_it_is_the_sum_of_differences_to_the_surroundings() -> None:
    x = torch.randn(2, 3, 36, 28, generator=torch.Generator().manual_seed(0))
    values = saliency(x)
    assert values.shape == (2, 9, 7)
    for b in range(2):
        grey = x[b].double().mean(0).unflatten(0, (9, REDUCED)).unflatten(2, (7, REDUCED)).mean((1, 3))
        for i in range(9):
            for j in range(7):
                expected = 0.0
                for radius in RADII:
                    around = grey[max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1]
                    expected += abs(float(grey[i, j] - (around.sum() - grey[i, j]) / (around.numel() - 1)))
                assert float(values[b, i, j]) == pytest.approx(expected, abs=1e-5)


def test_the_peak_is_in_the_middle_of_a_spot() -> None:
    x = torch.zeros(2, 3, 64, 96)
    x[0, :, 40:44, 8:12] = 1
    x[1, :, 4:8, 88:92] = -1  # dark stands out too
    assert peaks(saliency(x), (64, 96)).tolist() == [[42, 10], [6, 90]]


def test_small_and_flat_images_are_no_error() -> None:
    for size in ((3, 3), (1, 9), (5, 2)):
        values = saliency(torch.zeros(2, 3, *size))
        place = peaks(values, size)
        assert not values.any()
        assert (place >= 0).all()
        assert (place < torch.tensor(size)).all()
