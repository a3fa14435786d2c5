"""Grid of a transformer's tokens: the number of prefix tokens, and the rows and columns of patches."""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import Any

from torch import nn

from fgvc.errors import FgvcError

Size = tuple[int, int]  # height, width


def token_grid(net: nn.Module, count: int, size: Size | None) -> tuple[int, Size]:
    """The number of prefix tokens (classes, registers) among `count`, and the rows and columns of the patches after them.

    `size`: height and width of the input in pixels. The count alone is ambiguous: 144 tokens are 12 x 12 of a square, and
    9 x 16 of 144 x 256 pixels. Without `size` only the grid of a net that takes one size is known. Raises FgvcError if the tokens
    form no grid, or may form several.
    """
    name = type(net).__name__
    if size is None:
        grid = _fixed_grid(net)
        if grid is None or grid[0] * grid[1] + _declared(net) != count:
            raise FgvcError(
                f"{name}: {count} tokens may form several grids; give feature_map the height and width of the input"
            )
        return _declared(net), grid
    if 0 < count <= _declared(net):
        raise FgvcError(f"{name}: its features are class tokens alone, without the patches")
    # In the middle of a net prefix tokens may not be there yet (XCiT, CaiT).
    prefixes = {_declared(net), 0}
    for sizes in (
        _by_embedding(net, size),
        _by_strides(size, _strides(net)),
        _by_strides(size, range(1, max(size) + 1)),
    ):
        grids = {(count - h * w, (h, w)) for h, w in sizes if count - h * w in prefixes and h * w}
        if len(grids) == 1:
            prefix, grid = grids.pop()
            if hasattr(net, "reroll") and grid not in _by_strides(size, _strides(net)[-1:]):
                raise FgvcError(f"{name}: before its last stage its tokens are not in the order of the picture")
            return prefix, grid
        if grids:
            several = " or ".join(f"{h} x {w}" for _, (h, w) in sorted(grids))
            raise FgvcError(f"{name}: {count} tokens of {size[0]} x {size[1]} pixels may be {several} patches")
    raise FgvcError(f"{name}: {count} tokens do not form a grid of {size[0]} x {size[1]} pixels")


def _declared(net: nn.Module) -> int:
    """The number of prefix tokens. Some of timm's nets (VOLO, PiT, CoaT) have a class token without declaring it."""
    declared = getattr(net, "num_prefix_tokens", None)
    if declared is not None:
        return int(declared)
    class_tokens = [value.shape[1] for key, value in net.named_parameters(recurse=False) if key.startswith("cls_token")]
    return max(class_tokens, default=0)


def _fixed_grid(net: nn.Module) -> Size | None:
    """The grid of a net that takes only one size; None for others."""
    for embedding in (getattr(net, "patch_embed", None), getattr(net, "stem", None)):
        grid = getattr(embedding, "grid_size", None)
        if grid is not None and getattr(embedding, "strict_img_size", False):
            return int(grid[0]), int(grid[1])
    return None


def _by_embedding(net: nn.Module, size: Size) -> list[Size]:
    """The grid that timm's patch embedding computes for an input, also for patches that are not square; empty without it."""
    feat_size = getattr(getattr(net, "patch_embed", None), "dynamic_feat_size", None)
    return [] if feat_size is None else [feat_size(size)]


def _strides(net: nn.Module) -> tuple[int, ...]:
    """Pixels per cell at the ends of the stages in timm's feature_info."""
    stages: Any = getattr(net, "feature_info", None) or ()
    return tuple(sorted({stage["reduction"] for stage in stages}))


@lru_cache(maxsize=256)
def _by_strides(size: Size, strides: tuple[int, ...] | range) -> frozenset[Size]:
    """The grids of cells of these strides, with the remainder at the borders cut off, or padded to a cell."""
    height, width = size
    cut = {(height // stride, width // stride) for stride in strides}
    return frozenset(cut | {(ceil(height / stride), ceil(width / stride)) for stride in strides})
