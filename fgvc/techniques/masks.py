"""Regions of maps: selecting them by thresholds, moving them, and filling them. All batched, on the maps' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.settings import Fill, Region


def select(
    maps: Tensor, size: Sequence[int], region: Region, *, values: Tensor | None = None, maximum: float | None = None
) -> Tensor:
    """Select the region (B,H,W) bool of each map (B,h,w), enlarged to `size` first, so that it can't miss its own maximum.

    For the rule `share`: `values` (B,), drawn for each sample, instead of the region's own; `maximum`, where a map is a part
    of a larger one that has it.

    A map that is flat, not finite, or nowhere above 0 selects nothing. Of equal values all go or none: a cap that is smaller
    than the map's plateau at its maximum selects nothing either.
    """
    fine = enlarge(torch.where(torch.isfinite(maps).all((1, 2), keepdim=True), maps, 0.0), size)
    flat = fine.flatten(1)
    highest, lowest = flat.amax(1), flat.amin(1)
    match region.rule:
        case "share":
            top = highest if maximum is None else torch.full_like(highest, maximum)
            level = top * (region.value if values is None else values.to(top))
        case "quantile":
            level = _level(flat, 1 - region.value)
        case "mean+std":
            level = flat.mean(1) + region.value * flat.std(1, correction=0)
    least, most = region.area
    selected = flat >= level[:, None]
    if least:
        selected |= flat >= _level(flat, least)[:, None]
    # Only where it is needed: ranking all pixels takes longer than all else here.
    large = torch.nonzero(selected.sum(1) > most * flat.shape[1])[:, 0]
    if len(large):
        selected[large] &= flat[large] > _level(flat[large], most, above=True)[:, None]
    peaked = (highest > 0) & (highest - lowest > 1e-6 * highest)
    return (selected & peaked[:, None]).view_as(fine)


def united(old: Tensor, maps: Tensor, region: Region, *, largest: float) -> Tensor:
    """Union of masks `old` (B,h,w) and the region of maps (B,h,w) in [0,1], whose highest cells come first as long as the whole
    stays within a share `largest` of the cells."""
    new = select(maps, old.shape[1:], region) & ~old
    room = int(largest * old.shape[1] * old.shape[2]) - old.flatten(1).sum(1)
    rank = torch.where(new, maps, -1.0).flatten(1).argsort(1, descending=True).argsort(1)
    return old | (new & (rank < room[:, None]).view_as(new))


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Enlarge maps (B,h,w) to (B,H,W), bilinearly; cells are areas, so the borders stay where they are."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def sparing(mask: Tensor) -> Tensor:
    """Masks (B,H,W), but an empty one for a picture of which nothing would be left."""
    return mask & ~mask.all(2, keepdim=True).all(1, keepdim=True)


def shifted(mask: Tensor, shift: Tensor) -> Tensor:
    """Move masks (B,H,W) by (B,2) shares of the height and width, round the edges: every area stays what it is."""
    _, height, width = mask.shape
    down = (shift[:, :1] * height).long()
    across = (shift[:, 1:] * width).long()
    rows = (torch.arange(height, device=mask.device) - down) % height
    columns = (torch.arange(width, device=mask.device) - across) % width
    return mask[torch.arange(len(mask), device=mask.device)[:, None, None], rows[:, :, None], columns[:, None]]


def erase(x: Tensor, mask: Tensor, fill: Fill, *, seed: int = 0) -> Tensor:
    """Replace the masks' pixels (B,H,W) bool in x (B,3,H,W), normalised (see FILLS); `seed` is of the noise."""
    match fill:
        case "zero":
            new = x.new_zeros(())
        case "mean":
            new = x.mean((2, 3), keepdim=True)
        case "random" | "noise":
            rng = torch.Generator(x.device).manual_seed(seed)
            shape = x.shape if fill == "noise" else (*x.shape[:2], 1, 1)
            new = torch.randn(shape, generator=rng, device=x.device, dtype=x.dtype)
        case "blur":
            new = _blurred(x)
    return torch.where(mask[:, None], new, x)


def _level(flat: Tensor, share: float, *, above: bool = False) -> Tensor:
    """Value (B,) that `share` of each row reaches. `above`: the next lower one, so that no more than `share` of the row is
    greater."""
    count = flat.shape[1]
    number = int(share * count + 1e-6) if above else max(round(share * count), 1)
    return flat.kthvalue(max(count - number + (0 if above else 1), 1), dim=1).values


def _blurred(x: Tensor) -> Tensor:
    """Blur x (B,3,H,W) by averages over an eighth of the side, twice along each axis: no detail is left."""
    side = max(min(x.shape[2:]) // 8, 3) | 1
    half = side // 2
    for _ in range(2):
        x = F.avg_pool2d(x, (side, 1), 1, (half, 0), count_include_pad=False)
        x = F.avg_pool2d(x, (1, side), 1, (0, half), count_include_pad=False)
    return x
