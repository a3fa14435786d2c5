"""From maps to regions: thresholds, boxes, and what an erased region is filled with. All batched, on the maps' device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.settings import Fill, Region


def select(
    maps: Tensor, size: Sequence[int], region: Region, *, values: Tensor | None = None, maximum: float | None = None
) -> Tensor:
    """(B,H,W) bool: the region of each map (B,h,w), enlarged to `size` first, so that it can't miss its own maximum.

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
    chosen = flat >= level[:, None]
    if least:
        chosen |= flat >= _level(flat, least)[:, None]
    # Only where it is needed: ranking all pixels takes longer than all else here.
    large = torch.nonzero(chosen.sum(1) > most * flat.shape[1])[:, 0]
    if len(large):
        chosen[large] &= flat[large] > _level(flat[large], most, above=True)[:, None]
    says = (highest > 0) & (highest - lowest > 1e-6 * highest)
    return (chosen & says[:, None]).view_as(fine)


def united(old: Tensor, maps: Tensor, region: Region, *, largest: float) -> Tensor:
    """Masks `old` (B,h,w) and the region of maps (B,h,w) in [0,1], its highest cells first as long as the whole stays within a
    share `largest` of the cells."""
    new = select(maps, old.shape[1:], region) & ~old
    room = int(largest * old.shape[1] * old.shape[2]) - old.flatten(1).sum(1)
    rank = torch.where(new, maps, -1.0).flatten(1).argsort(1, descending=True).argsort(1)
    return old | (new & (rank < room[:, None]).view_as(new))


def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B,h,w) -> (B,H,W), bilinear; cells are areas, so the borders stay where they are."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def boxes(mask: Tensor, padding: float = 0.0) -> Tensor:
    """(B,4) float32: left, top, right, bottom in pixels around each mask (B,H,W), widened by `padding` times the
    picture's sides, within the picture. An empty mask's box is the whole picture."""
    _, height, width = mask.shape
    (top, bottom), (left, right) = _extent(mask.any(2)), _extent(mask.any(1))
    grown = [left - padding * width, top - padding * height, right + padding * width, bottom + padding * height]
    sides = (width, height, width, height)
    return torch.stack([edge.clamp(0, side) for edge, side in zip(grown, sides, strict=True)], dim=1)


def crop(x: Tensor, box: Tensor, size: Sequence[int], *, pixels: Sequence[int]) -> Tensor:
    """(B,3,H,W): what is in each box (B,4) of x (B,3,h,w), bilinear; boxes are counted in a picture of `pixels` (height,
    width), which x may have at another resolution."""
    height, width = pixels
    with torch.autocast(x.device.type, enabled=False):  # a bfloat16 grid can't even name the last pixels
        box = box.float()
        left, top, right, bottom = (box / box.new_tensor([width, height, width, height])).unbind(1)
        zero = torch.zeros_like(left)
        across = torch.stack([right - left, zero, left + right - 1], dim=1)
        down = torch.stack([zero, bottom - top, top + bottom - 1], dim=1)
        grid = F.affine_grid(torch.stack([across, down], dim=1), [len(x), x.shape[1], *size], align_corners=False)
        cut = F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False).to(x.dtype)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def inside(box: Tensor, size: Sequence[int]) -> Tensor:
    """(B,H,W) bool: the pixels of any of the boxes (B,N,4) of each picture: left, top, right, bottom, right and bottom
    excluded; they may reach over the border."""
    rows, columns = (torch.arange(side, device=box.device) for side in size)
    left, top, right, bottom = box[..., None].unbind(2)
    down = (rows >= top) & (rows < bottom)
    across = (columns >= left) & (columns < right)
    return (down[:, :, :, None] & across[:, :, None]).any(1)


def sparing(mask: Tensor) -> Tensor:
    """The masks (B,H,W), but that of a picture of which nothing would be left is empty."""
    return mask & ~mask.all(2, keepdim=True).all(1, keepdim=True)


def moved(box: Tensor, where: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes (B,4) of the same width and height, at places (B,2) of [0,1): shares of the way down and across that each has
    in a picture of `size` (height, width)."""
    width, height = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    top, left = where[:, 0] * (size[0] - height), where[:, 1] * (size[1] - width)
    return torch.stack([left, top, left + width, top + height], dim=1)


def shifted(mask: Tensor, shift: Tensor) -> Tensor:
    """Masks (B,H,W) moved by (B,2) shares of the height and width, round the edges: every area stays what it is."""
    _, height, width = mask.shape
    down = (shift[:, :1] * height).long()
    across = (shift[:, 1:] * width).long()
    rows = (torch.arange(height, device=mask.device) - down) % height
    columns = (torch.arange(width, device=mask.device) - across) % width
    return mask[torch.arange(len(mask), device=mask.device)[:, None, None], rows[:, :, None], columns[:, None]]


def erase(x: Tensor, mask: Tensor, fill: Fill, *, seed: int = 0) -> Tensor:
    """x (B,3,H,W), normalised, with the masks' pixels (B,H,W) bool replaced (see FILLS); `seed` is of the noise."""
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
    """(B,): the value that `share` of each row reaches. `above`: the next lower one, so that no more than `share` of the
    row is greater."""
    count = flat.shape[1]
    number = int(share * count + 1e-6) if above else max(round(share * count), 1)
    return flat.kthvalue(max(count - number + (0 if above else 1), 1), dim=1).values


def _extent(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each row (B,N) as float32; 0 and N where there is none."""
    count = hit.shape[1]
    places = torch.arange(count, device=hit.device)
    first = torch.where(hit, places, count).amin(1)
    last = torch.where(hit, places + 1, 0).amax(1)
    none = ~hit.any(1)
    return torch.where(none, 0, first).float(), torch.where(none, count, last).float()


def _blurred(x: Tensor) -> Tensor:
    """By averages over an eighth of the side, twice along each axis: no detail is left."""
    side = max(min(x.shape[2:]) // 8, 3) | 1
    half = side // 2
    for _ in range(2):
        x = F.avg_pool2d(x, (side, 1), 1, (half, 0), count_include_pad=False)
        x = F.avg_pool2d(x, (1, side), 1, (0, half), count_include_pad=False)
    return x
