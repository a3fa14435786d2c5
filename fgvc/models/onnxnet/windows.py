"""Padding around an input, as convolutions and pooling share it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.nn import functional as F

from fgvc.models.onnxnet.convert import Builder
from fgvc.models.onnxnet.registry import Attributes, text
from fgvc.models.onnxnet.values import Live


def window_pads(
    a: Attributes, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Padding before and after, for each axis."""
    mode = text(a.get("auto_pad", "NOTSET"))
    if mode in ("NOTSET", ""):
        pads = list(a.get("pads", (0,) * 2 * len(kernel)))
        return list(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    if mode == "VALID":
        return [(0, 0)] * len(kernel)
    pairs = []
    for length, k, stride, dilation in zip(size, kernel, strides, dilations, strict=True):
        total = max((math.ceil(length / stride) - 1) * stride + (k - 1) * dilation + 1 - length, 0)
        small, large = total // 2, total - total // 2
        pairs.append((small, large) if mode == "SAME_UPPER" else (large, small))
    return pairs


def pad_input(
    b: Builder, x: Live, pads: Sequence[tuple[int, int]], value: float, most: Sequence[float] | None = None
) -> tuple[Live, tuple[int, ...]]:
    """Pad the input where a layer can't do it by itself: it takes the same on both sides, and `most` at most. Returns the input
    and the padding that is left to the layer."""
    most = (math.inf,) * len(pads) if most is None else most
    if all(before == after <= limit for (before, after), limit in zip(pads, most, strict=True)):
        return x, tuple(before for before, _ in pads)
    return b.call(F.pad, x, [side for pair in reversed(pads) for side in pair], "constant", value), (0,) * len(pads)
