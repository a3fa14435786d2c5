"""Re-parameterised block: a convolution with parallel branches in training, folded into one convolution afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, cast

from timm.layers import Conv2dSame
from timm.layers.padding import pad_same_arg
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.reparam.fold import embed, fold_conv, pair

Pads = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes them


class Branch(Protocol):
    """A module parallel to a convolution, with its input and output shapes. Its last batch norm starts at zero."""

    def __call__(self, x: Tensor, pads: Pads) -> Tensor:
        """The branch's output for x (B,C,H,W), not padded; `pads`: the zeros that the k x k convolution reads around it."""
        ...

    def fold(self) -> tuple[Tensor, Tensor]:
        """The equal convolution in eval mode: kernel (C', C/groups, kh, kw), to be embedded in k x k, and bias (C',), float64."""
        ...


def refusal(conv: nn.Conv2d, smallest: int = 3) -> str | None:
    """The reason why `conv` can't have branches, in a few words, or None. `smallest`: the least side of its kernel."""
    height, width = conv.kernel_size
    if height != width:
        return f"{height}x{width} kernel, not square"
    if height < smallest:
        return f"{height}x{width} kernel"
    if height % 2 == 0:
        return f"{height}x{width} kernel, even"
    if conv.dilation != (1, 1):
        return f"dilation {max(conv.dilation)}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode}"
    if not is_same(conv) and conv.padding != (height // 2, height // 2):
        return f"padding {conv.padding} with a {height}x{width} kernel"
    return None


def is_same(conv: nn.Conv2d) -> bool:
    """Whether a convolution pads as TensorFlow does, by the size of its input, which no fixed padding can express."""
    return isinstance(conv, Conv2dSame)


class Branched(nn.Module):
    """The sum of a convolution and its branches; the batch norm behind the convolution stays where it is.

    x (B,C,H,W) -> origin(x) + branches(x), (B,C',H',W') as the convolution's output. `origin` keeps the convolution's
    parameters, and every branch starts at zero, so that step 0 is the pretrained function bit for bit, in train and
    eval mode. Raises FgvcError for a convolution with a `refusal`.
    """

    norm: str | None = None  # set by fgvc.reparam.replace: the batch norm that takes the folded bias

    def __init__(self, conv: nn.Conv2d, branches: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if reason := refusal(conv, 1):
            raise FgvcError(f"branches can't be put beside this convolution: {reason}")
        self.kernel_size, self.stride = conv.kernel_size, conv.stride
        self.same = is_same(conv)
        self.origin = _unpadded(conv) if self.same else conv
        self.branches = nn.ModuleDict(branches)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:  # padded once, here; all convolutions after that are without padding
            left, right, top, bottom = pad_same_arg(list(x.shape[-2:]), list(self.kernel_size), list(self.stride))
            pads = (left, right, top, bottom)
            y = self.origin(F.pad(x, pads))
        else:
            middle = self.kernel_size[0] // 2
            pads = (middle, middle, middle, middle)
            y = self.origin(x)
        for branch in self.branches.values():
            y = y + branch(x, pads).to(y.dtype)  # under autocast a batch norm of the input may be wider than y
        return y

    def fold(self) -> tuple[Tensor, Tensor]:
        """The equal convolution in eval mode: kernel (C', C/groups, k, k) and bias (C',), float64."""
        kernel, bias = fold_conv(self.origin)
        bias = kernel.new_zeros(len(kernel)) if bias is None else bias
        for branch in self.branches.values():
            branch_kernel, branch_bias = cast("Branch", branch).fold()
            kernel = kernel + embed(branch_kernel, self.kernel_size[0])
            bias = bias + branch_bias
        return kernel, bias


def _unpadded(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution without padding that shares the parameters of `conv`."""
    plain = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        pair(conv.kernel_size),
        stride=pair(conv.stride),
        groups=conv.groups,
        bias=conv.bias is not None,
        device="meta",
    )
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain
