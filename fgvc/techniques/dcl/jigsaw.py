"""The jigsaw of DCL's region confusion (Chen et al., CVPR 2019): drawing permutations of patches, and applying them.

A jigsaw is `source` (B, N*N) int64: cell t of the shuffled picture, counted row by row, shows cell source[t] of the
original. It is always a permutation: rows are shuffled first, then the columns of the result. (The formula in the paper
moves both at once, which loses and doubles patches in almost every draw.)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.errors import FgvcError


def draw_jigsaws(rng: np.random.Generator, count: int, *, grid: int, reach: float) -> NDArray[np.int64]:
    """Draw `count` independent jigsaws of grid x grid cells, (count, grid^2); along each axis a cell moves less than
    2 * `reach` cells (paper: k). Every row and column is ordered by i + U(-reach, reach)."""
    noise = rng.uniform(-reach, reach, size=(2, count, grid, grid))
    along_row, along_column = np.argsort(np.arange(grid) + noise, axis=-1)
    row = np.swapaxes(along_column, 1, 2)  # (B,N,N): the source row of every cell, once the rows are shuffled
    column = np.take_along_axis(along_row, row, axis=1)  # [b,i,j] = along_row[b, row[b,i,j], j]
    return np.asarray(row * grid + column, dtype=np.int64).reshape(count, grid * grid)


def cut(x: Tensor, source: Tensor) -> Tensor:
    """Shuffle the patches of `x` (B,C,H,W) of any size, in a copy.

    Patches are floor(H/N) x floor(W/N) pixels; what remains at the right and the lower border stays where it is. Raises FgvcError
    where a patch would be empty.
    """
    (b, c, height, width), n = x.shape, round(source.shape[1] ** 0.5)
    h, w = height // n, width // n
    if not h or not w:
        raise FgvcError(f"a jigsaw of {n} x {n} patches needs larger images than {height} x {width}: lower its grid")
    pieces = x[:, :, : n * h, : n * w].reshape(b, c, n, h, n, w).permute(0, 2, 4, 1, 3, 5).reshape(b, n * n, c, h, w)
    moved = pieces[torch.arange(b, device=x.device)[:, None], source].view(b, n, n, c, h, w)
    shuffled = x.clone()
    shuffled[:, :, : n * h, : n * w] = moved.permute(0, 3, 1, 4, 2, 5).reshape(b, c, n * h, n * w)
    return shuffled


def places(source: Tensor) -> Tensor:
    """Source row and column (B,2,N,N) float32 of each cell, as its centre's share of the side."""
    n = round(source.shape[1] ** 0.5)
    place = torch.stack([source // n, source % n], dim=1).float()
    return ((place + 0.5) / n).view(len(source), 2, n, n)
