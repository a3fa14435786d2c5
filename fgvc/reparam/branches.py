"""The kinds of branches, which all end in a batch norm whose gamma starts at zero.

The first step moves that gamma, and from then on the kernels before it learn, too. The kernels are drawn from torch's global
generator, as any module's. `like` is the batch norm behind the convolution, whose eps and momentum the branches' norms take over.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.reparam.block import Pads, is_same
from fgvc.reparam.fold import averaged, fold_norm, identity_kernel, pair, sequential


def keeps_shape(conv: nn.Conv2d) -> bool:
    """Whether the output has the input's shape, so that an identity can stand beside the convolution."""
    return conv.in_channels == conv.out_channels and pair(conv.stride) == (1, 1)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether each channel of a convolution has its own kernel and nothing else: groups, inputs and outputs are as many."""
    return conv.groups == conv.in_channels == conv.out_channels


class ConvNorm(nn.Module):
    """A convolution with the channels, stride and groups of `conv`, with a kernel as large or smaller, and a batch norm."""

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        height, width = kernel_size
        side = conv.kernel_size[0]
        # The padding that only outer taps of the large kernel reach. None: a fixed padding, which this convolution has itself.
        self.margin = ((side - height) // 2, (side - width) // 2) if is_same(conv) else None
        # torch's CPU backend crashes in 1x1 convolutions with a stride on few channels_last channels (a stem's three).
        thins = kernel_size == (1, 1) and conv.in_channels <= 4
        self.thin = pair(conv.stride) if thins else (1, 1)
        self.conv = _conv(
            conv,
            conv.in_channels,
            conv.out_channels,
            kernel_size,
            stride=(1, 1) if thins else pair(conv.stride),
            padding=(height // 2, width // 2) if self.margin is None else (0, 0),
        )
        self.norm = _norm(conv, like, conv.out_channels, gamma=0.0)

    def forward(self, x: Tensor, pads: Pads) -> Tensor:
        if self.margin is not None:
            (rows, columns), (left, right, top, bottom) = self.margin, pads
            x = F.pad(x, (left - columns, right - columns, top - rows, bottom - rows))  # a negative pad crops
        if self.thin != (1, 1):
            x = x[:, :, :: self.thin[0], :: self.thin[1]]
        return self.norm(self.conv(x))

    def fold(self) -> tuple[Tensor, Tensor]:
        return fold_norm(self.conv.weight, self.norm)


class IdentityNorm(nn.Module):
    """A batch norm of the input itself (RepVGG, arXiv:2101.03697), for a convolution that `keeps_shape`."""

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None) -> None:
        super().__init__()
        if not keeps_shape(conv):
            raise ValueError("the convolution changes the shape: no identity can stand beside it")
        self.groups = conv.groups
        self.norm = _norm(conv, like, conv.out_channels, gamma=0.0)

    def forward(self, x: Tensor, pads: Pads) -> Tensor:
        return self.norm(x)  # at stride 1 TensorFlow's padding is symmetric, too, so that the middle tap reads x

    def fold(self) -> tuple[Tensor, Tensor]:
        return fold_norm(identity_kernel(self.norm.num_features, self.groups), self.norm)


class PointConvNorm(nn.Module):
    """1x1 - BN - k x k - BN (DBB, arXiv:2103.13425), with as many inner channels as inputs, twice as many if depthwise."""

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None) -> None:
        super().__init__()
        self.point = _PaddedPoint(conv, like, conv.in_channels * (2 if is_depthwise(conv) else 1))
        inner, side = self.point.conv.out_channels, pair(conv.kernel_size)
        self.conv = _conv(conv, inner, conv.out_channels, side, stride=pair(conv.stride))
        self.norm = _norm(conv, like, conv.out_channels, gamma=0.0)

    def forward(self, x: Tensor, pads: Pads) -> Tensor:
        return self.norm(self.conv(self.point(x, pads)))

    def fold(self) -> tuple[Tensor, Tensor]:
        return sequential(*self.point.fold(), *fold_norm(self.conv.weight, self.norm), groups=self.conv.groups)


class AverageNorm(nn.Module):
    """Average over k x k - 1x1 - BN (DBB, arXiv:2103.13425); in a depthwise convolution without the 1x1.

    The paper has 1x1 - BN - average - BN. Averages and 1x1 can be swapped, and what a batch norm does to each channel, border
    included, the batch norm behind it undoes: the same function of the kernel, for less work.
    """

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None) -> None:
        super().__init__()
        self.side, self.stride = conv.kernel_size[0], pair(conv.stride)
        self.same = is_same(conv)
        self.conv = None if is_depthwise(conv) else _conv(conv, conv.in_channels, conv.out_channels, (1, 1))
        self.norm = _norm(conv, like, conv.out_channels, gamma=0.0)

    def forward(self, x: Tensor, pads: Pads) -> Tensor:
        # The zeros of the border count, as they do for a kernel of 1/k^2.
        padding, x = (0, F.pad(x, pads)) if self.same else (self.side // 2, x)
        means = F.avg_pool2d(x, self.side, self.stride, padding, count_include_pad=True)
        return self.norm(means if self.conv is None else self.conv(means))

    def fold(self) -> tuple[Tensor, Tensor]:
        channels = self.norm.num_features
        point = identity_kernel(channels, channels) if self.conv is None else self.conv.weight
        return fold_norm(averaged(point, self.side), self.norm)


class _PaddedPoint(nn.Module):
    """1x1 - BN of the padded input, (B,C,H,W) -> (B,inner,H+pads,W+pads), for a valid k x k operation to read.

    Since the padding comes first, the batch norm maps the border to the output of the folded 1x1 for zeros, its bias, in train
    and in eval mode, and the fold is exact. Zeros put between the two operations would not fold, and a border set from the
    running statistics lags behind the batch's in training (as in DBB's official code). The price: the batch statistics
    include the border. The 1x1 starts as the identity if the number of channels allows it.
    """

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None, inner: int) -> None:
        super().__init__()
        self.conv = _conv(conv, conv.in_channels, inner, (1, 1))
        if inner == conv.in_channels:
            with torch.no_grad():
                self.conv.weight.copy_(identity_kernel(inner, conv.groups))
        self.norm = _norm(conv, like, inner, gamma=1.0)

    def forward(self, x: Tensor, pads: Pads) -> Tensor:
        return self.norm(self.conv(F.pad(x, pads)))

    def fold(self) -> tuple[Tensor, Tensor]:
        return fold_norm(self.conv.weight, self.norm)


def _conv(
    like: nn.Conv2d,
    channels: int,
    out: int,
    kernel_size: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> nn.Conv2d:
    """A convolution without bias, with the groups, device and dtype of `like`."""
    return nn.Conv2d(
        channels, out, kernel_size, stride=stride, padding=padding, groups=like.groups, bias=False,
        device=like.weight.device, dtype=like.weight.dtype,
    )  # fmt: skip


def _norm(conv: nn.Conv2d, like: nn.Module | None, channels: int, *, gamma: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, device=conv.weight.device, dtype=conv.weight.dtype)
    if like is not None:  # timm's tf_* nets use another eps and momentum than torch
        norm.eps, norm.momentum = like.eps, like.momentum  # type: ignore[assignment]
    nn.init.constant_(norm.weight, gamma)
    return norm
