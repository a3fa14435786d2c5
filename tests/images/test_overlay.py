"""Colours over pictures."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from PIL import Image

from fgvc.images.overlay import heat, overlay

GREY = Image.new("RGB", (8, 8), (100, 100, 100))


def test_masks_are_red() -> None:
    over = np.asarray(overlay(GREY, np.array([[False, True], [False, False]])))
    assert (over[4:] == 100).all()
    assert (over[:4, :4] == 100).all()
    assert (over[:4, 4:, 0] > 150).all()


def test_maps_run_from_blue_to_yellow() -> None:
    pixels = np.asarray(overlay(GREY, np.array([[0.0, 1.0]]))).astype(int)
    assert pixels[4, 0, 2] > pixels[4, 0, 1]
    assert pixels[4, 7, 0] > pixels[4, 7, 2]


def test_colours_are_those_of_matplotlib() -> None:
    t = np.linspace(0, 1, 256)
    assert np.abs(heat(t) - 255 * colormaps["plasma"](t)[:, :3]).max() < 8
    assert (heat(np.array([-1.0, 2.0])) == heat(np.array([0.0, 1.0]))).all()
