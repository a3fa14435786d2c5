"""Algebra of folding branches into one convolution, in float64 on the CPU, since half precision keeps two or three digits.

Transforms I to VI are those of the Diverse Branch Block (Ding et al., CVPR 2021, arXiv:2103.13425, section 3.2); see
docs/methods.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError


def exact(tensor: Tensor) -> Tensor:
    """A detached float64 copy on the CPU."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def pair(sides: tuple[int, ...]) -> tuple[int, int]:
    """Height and width, of what torch's types call a tuple of any length."""
    return sides[0], sides[1]


def fold_conv(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of a convolution, or of a block in its place, as it computes in eval mode; float64."""
    if callable(fold := getattr(conv, "fold", None)):
        return fold()
    assert isinstance(conv, nn.Conv2d)
    return exact(conv.weight), None if conv.bias is None else exact(conv.bias)


def fold_norm(weight: Tensor, norm: nn.BatchNorm2d, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The one convolution that equals a convolution followed by a batch norm in eval mode (Transform I).

    weight (out, in/groups, kh, kw), bias (out,) -> kernel of the same shape and bias (out,), both float64. Any
    stride, padding and groups: K' = K g/sqrt(var+eps), b' = beta + (b - mean) g/sqrt(var+eps). Raises FgvcError for a norm
    without running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise FgvcError("a batch norm without running statistics has no fixed scale and can't be folded")
    deviation = (exact(norm.running_var) + norm.eps).sqrt()
    scale = (exact(norm.weight) if norm.affine else 1) / deviation
    shift = -exact(norm.running_mean) if bias is None else exact(bias) - exact(norm.running_mean)
    folded = shift * scale
    if norm.affine:
        folded = folded + exact(norm.bias)
    return exact(weight) * scale[:, None, None, None], folded


def embed(kernel: Tensor, size: int) -> Tensor:
    """A smaller kernel (..., kh, kw), odd sides, in the middle of a size x size one (size odd), zero around it (Transform VI).

    Equal to the small one if both are aligned: the small one's padding is the large one's minus
    (size - kh) / 2 rows and (size - kw) / 2 columns. Raises ValueError for even sides, and where `size` is smaller.
    """
    height, width = kernel.shape[-2:]
    if not (size % 2 and height % 2 and width % 2) or max(height, width) > size:
        raise ValueError(f"a {height}x{width} kernel has no middle place in a {size}x{size} one")
    rows, columns = (size - height) // 2, (size - width) // 2
    return F.pad(kernel, (columns, columns, rows, rows))


def identity_kernel(channels: int, groups: int = 1) -> Tensor:
    """The kernel of the 1x1 identity convolution: (channels, channels/groups, 1, 1), float64."""
    inside = torch.arange(channels) % (channels // groups)  # a channel's number within its group
    kernel = torch.zeros(channels, channels // groups, 1, 1, dtype=torch.float64)
    kernel[torch.arange(channels), inside] = 1
    return kernel


def averaged(point: Tensor, size: int) -> Tensor:
    """The convolution that averages over size x size, zeros of the border included, with a 1x1 behind or before it
    (Transform V): (out, in/groups, 1, 1) -> (out, in/groups, size, size), float64. With `identity_kernel`: the average alone."""
    return exact(point).expand(-1, -1, size, size) / size**2


def sequential(
    point: Tensor, inner_bias: Tensor, kernel: Tensor, bias: Tensor, *, groups: int
) -> tuple[Tensor, Tensor]:
    """The one convolution that equals a 1x1 followed by a k x k of as many groups (Transform III).

    point (inner, in/groups, 1, 1), inner_bias (inner,), kernel (out, inner/groups, k, k), bias (out,) ->
    (out, in/groups, k, k) and (out,), all float64. Exact if the k x k reads `inner_bias`, not zero, around the image: if the
    image is padded before the 1x1.
    """
    first = point.flatten(1).unflatten(0, (groups, -1))  # (g, inner/g, in/g)
    second = kernel.unflatten(0, (groups, -1))  # (g, out/g, inner/g, k, k)
    shift = torch.einsum("gomhw,gm->go", second, inner_bias.unflatten(0, (groups, -1)))
    return torch.einsum("gomhw,gmi->goihw", second, first).flatten(0, 1), bias + shift.flatten()
