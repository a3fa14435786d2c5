"""The asymmetric convolution block: k x k + 1 x k + k x 1 in training, one k x k convolution afterwards."""

from __future__ import annotations

from timm.layers import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.reparam.fold import embed, exact, fold_norm
from fgvc.types import FgvcError


def refusal(conv: nn.Conv2d) -> str | None:
    """Why `conv` can't become an AcbBlock, in a few words; None: it can."""
    height, width = conv.kernel_size
    if height != width:
        return f"{height}x{width} kernel, not square"
    if height == 1:
        return "1x1 kernel"
    if height % 2 == 0:
        return f"{height}x{width} kernel, even"
    if conv.dilation != (1, 1):
        return f"dilation {max(conv.dilation)}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not isinstance(conv, Conv2dSame) and conv.padding != (height // 2, height // 2):
        return f"padding {conv.padding} with a {height}x{width} kernel"
    return None


class AcbBlock(nn.Module):
    """ACNet's block (ICCV 2019) around an existing convolution; the batch norm behind it stays where it is.

    x (B,C,H,W) -> square(x) + norm(row(x)) + norm(column(x)), (B,C',H',W') as the convolution gives it. `square` keeps
    the convolution's own parameters and the new branches' gamma starts at zero, so that step 0 is the pretrained
    function bit for bit, in train and eval mode. The new kernels are drawn from torch's global generator, as any
    module's. `like` is the batch norm behind the convolution: the branches' own take over its eps and momentum.
    Raises FgvcError for a convolution with a `refusal`.
    """

    norm: str | None = None  # set by fgvc.model.graft: where the folded bias goes

    def __init__(self, conv: nn.Conv2d, like: nn.Module | None = None) -> None:
        super().__init__()
        if reason := refusal(conv):
            raise FgvcError(f"an asymmetric block can't replace this convolution: {reason}")
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.same = isinstance(conv, Conv2dSame)
        self.square = _unpadded(conv) if self.same else conv
        side, middle = conv.kernel_size[0], conv.kernel_size[0] // 2
        pad = 0 if self.same else middle
        self.row = _Branch(conv, like, kernel_size=(1, side), padding=(0, pad))
        self.column = _Branch(conv, like, kernel_size=(side, 1), padding=(pad, 0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.same:
            return self.square(x) + self.row(x) + self.column(x)
        # TensorFlow's padding depends on the input's size. The branches read the same padded image without the rows,
        # or columns, that only the square's outer taps reach: a negative pad crops.
        left, right, top, bottom = pad_same_arg(list(x.shape[-2:]), list(self.kernel_size), list(self.stride))
        middle = self.kernel_size[0] // 2
        square = self.square(F.pad(x, (left, right, top, bottom)))
        row = self.row(F.pad(x, (left, right, top - middle, bottom - middle)))
        return square + row + self.column(F.pad(x, (left - middle, right - middle, top, bottom)))

    def fold(self) -> tuple[Tensor, Tensor]:
        """The equal convolution in eval mode: kernel (C', C/groups, k, k) and bias (C',), float64."""
        kernel = exact(self.square.weight)
        bias = kernel.new_zeros(len(kernel)) if self.square.bias is None else exact(self.square.bias)
        for branch in (self.row, self.column):
            branch_kernel, branch_bias = fold_norm(branch.conv.weight, branch.norm)
            kernel = kernel + embed(branch_kernel, self.kernel_size[0])
            bias = bias + branch_bias
        return kernel, bias


class _Branch(nn.Module):
    """A small convolution with `conv`'s channels, stride and groups, and a batch norm that starts at zero."""

    def __init__(
        self, conv: nn.Conv2d, like: nn.Module | None, *, kernel_size: tuple[int, int], padding: tuple[int, int]
    ) -> None:
        super().__init__()
        device, dtype = conv.weight.device, conv.weight.dtype
        self.conv = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size,
            stride=_pair(conv.stride),
            padding=padding,
            groups=conv.groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.BatchNorm2d(conv.out_channels, device=device, dtype=dtype)
        if like is not None:  # timm's tf_* nets use another eps and momentum than torch
            self.norm.eps, self.norm.momentum = like.eps, like.momentum  # type: ignore[assignment]
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def _unpadded(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution without padding that holds `conv`'s own parameters."""
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        _pair(conv.kernel_size),
        stride=_pair(conv.stride),
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    return sides[0], sides[1]
