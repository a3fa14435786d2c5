"""Maps and masks in colour over a picture, by Pillow and numpy alone, since servers draw them too."""

from __future__ import annotations

import numpy as np
from PIL import Image

MASKED = 220, 30, 30  # red
HEAT = (
    "0d0887 5302a3 8b0aa5 b83289 db5c68 f48849 febd2a f0f921"  # matplotlib's plasma: dark blue to yellow, for all eyes
)
_HEAT = np.array([list(bytes.fromhex(colour)) for colour in HEAT.split()], dtype=float)


def overlay(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """An RGB picture with a map (h,w) in [0,1] over it as colours, smoothly enlarged; of a mask (bool) with its cells in red."""
    if values.dtype == bool:
        colours, share = np.full((*values.shape, 3), MASKED, dtype=np.uint8), 0.6 * values
        resample = Image.Resampling.NEAREST
    else:
        colours, share = heat(values), np.full(values.shape, 0.55)
        resample = Image.Resampling.BILINEAR
    over = Image.fromarray(colours).resize(picture.size, resample)
    return Image.composite(over, picture, Image.fromarray(np.uint8(255 * share)).resize(picture.size, resample))


def heat(values: np.ndarray) -> np.ndarray:
    """Colours (...,3) uint8 of values, clipped to [0,1]."""
    anchors = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(values, anchors, channel) for channel in _HEAT.T], axis=-1).round().astype(np.uint8)
