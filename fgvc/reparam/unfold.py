"""Convolutions that a batch norm was folded into, as they are trained: with a scale, or with a norm of their own.

A file that was exported for inference holds kernels W = w gamma/sigma. At one rate W moves, in units of itself, (sigma/gamma)^2
times as fast as the net's own w would by SGD, and sigma/gamma times by Adam: channel by channel another factor, which spans
orders of magnitude within one layer. So W is trained as s v with a fixed scale s for each channel. The bias
b = beta - mean gamma/sigma needs none: its gradient is that of beta, whose shift of the output it has, so it moves as beta does.

Scales are powers of two. Dividing and multiplying by them is exact: the net's function, and every value that did not move, keep
their bits. For the rate that is within a factor of two of any other scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.reparam.fold import exact, fold_conv, fold_norm, pair

EPS = 2.0**-17  # of restored norms, near torch's 1e-5: gamma^2 - EPS is a float32, see `restored_norm`
DIGITS = 12  # bits of a restored gamma: its square has 24, as many as a float32
LARGEST_EXPONENT = 24  # of a scale: beyond it a channel has no spread to speak of


class ScaledConv2d(nn.Conv2d):
    """A convolution whose kernel is a fixed scale, one a channel, times its weight; of `conv`, whose parameters it takes over.

    x (B,C,H,W) -> (B,C',H',W'). The scale starts at 1; see `rescale`. Raises FgvcError for a padding that is not zeros.
    """

    norm: str | None = None  # it has no place but its own for a bias
    scale: Tensor  # (C',1,1,1)

    def __init__(self, conv: nn.Conv2d) -> None:
        if conv.padding_mode != "zeros":
            raise FgvcError(f"a kernel with padding mode {conv.padding_mode} can't be scaled")
        super().__init__(
            conv.in_channels, conv.out_channels, pair(conv.kernel_size), pair(conv.stride), conv.padding,  # type: ignore[arg-type]
            pair(conv.dilation), conv.groups, bias=conv.bias is not None, device="meta",
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias
        self.register_buffer("scale", conv.weight.new_ones(conv.out_channels, 1, 1, 1))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.scale, self.bias)

    @torch.no_grad()
    def rescale(self, target: Tensor) -> None:
        """Set the scale to the powers of two next to `target` (C',), and the weight so that the kernel stays, bit for bit.
        Channels where that is impossible, or `target` is no number above 0, get a scale of 1."""
        kernel = self.weight * self.scale
        exponents = target.to(kernel.device, torch.float64).log2().round()
        usable = exponents.isfinite() & (exponents.abs() <= LARGEST_EXPONENT)
        scale = torch.where(usable, exponents, 0).exp2().to(kernel)[:, None, None, None]
        kept = ((kernel / scale) * scale == kernel).flatten(1).all(1)  # not where tiny values lose digits
        scale = torch.where(kept[:, None, None, None], scale, 1)
        self.weight.copy_(kernel / scale)
        self.scale.copy_(scale)

    def fold(self) -> tuple[Tensor, Tensor | None]:
        """Kernel (C',C/groups,k,k) and bias (C',) as they are in the file, float64."""
        return exact(self.weight) * exact(self.scale), None if self.bias is None else exact(self.bias)


class NormedConv2d(nn.Module):
    """A convolution with the batch norm that was folded into it put back behind it.

    x (B,C,H,W) -> (B,C',H',W'). The convolution's bias is not trained: under the batch's statistics the norm takes it out, and
    its own shift stands for it. The norm starts as the identity; see `restore`. Raises FgvcError for a convolution without a
    bias, in which the norm's shift would have no place afterwards.
    """

    norm: str | None = None

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.bias is None:
            raise FgvcError("a convolution without a bias has no place for the shift of a batch norm")
        conv.bias.requires_grad_(False)
        self.conv = ScaledConv2d(conv)
        self.batch_norm = nn.BatchNorm2d(conv.out_channels, eps=EPS, device=conv.weight.device, dtype=conv.weight.dtype)
        self.restore(conv.bias.new_zeros(conv.out_channels), conv.bias.new_ones(conv.out_channels))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch_norm(self.conv(x))

    @torch.no_grad()
    def restore(self, mean: Tensor, variance: Tensor) -> None:
        """Give the norm the statistics (C',) of the convolution's output: gamma = sigma, beta = mean, so that the function stays.

        sigma is rounded to 12 bits, by 0.02 % at most, and the running variance is sigma^2 - eps, which a float32 holds exactly
        up to a sigma of 8: so folding gives the kernel and bias that were there, not their neighbours.
        """
        mantissa, exponent = (variance.double() + EPS).sqrt().frexp()
        sigma = torch.ldexp((mantissa * 2**DIGITS).ceil(), exponent - DIGITS)
        assert self.batch_norm.running_mean is not None
        assert self.batch_norm.running_var is not None
        self.batch_norm.weight.copy_(sigma)
        self.batch_norm.bias.copy_(mean)
        self.batch_norm.running_mean.copy_(mean)
        self.batch_norm.running_var.copy_(sigma.square() - EPS)

    def fold(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the one convolution that equals both in eval mode, float64."""
        kernel, bias = fold_conv(self.conv)
        return fold_norm(kernel, self.batch_norm, bias)


UNFOLDED = (ScaledConv2d, NormedConv2d)


def unfold(net: nn.Module, names: Sequence[str], *, norms: bool) -> None:
    """Give the convolutions of these names a scale, and by `norms` a batch norm. The function stays: until `fit` the scales are 1
    and the norms identities."""
    for name in names:
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        net.set_submodule(name, NormedConv2d(conv) if norms else ScaledConv2d(conv), strict=True)


@dataclass(frozen=True, slots=True)
class Spread:
    """Statistics of the output of a convolution over images and places, (C',) each, float64."""

    mean: Tensor
    variance: Tensor


def fit(net: nn.Module, batches: Iterable[Tensor], scales: Mapping[str, Tensor] | None = None) -> None:
    """Fit all scales and restored norms to what their convolutions give for `batches` (B,3,H,W): the weight v of W = s v has
    outputs of unit spread, and a norm the statistics of its input. The net ends in eval mode, of the same function.

    `scales`: those (C',) that are known, by the name that the convolution's weight had before `unfold`. Raises FgvcError
    without a batch, and where an output is not finite."""
    convs = {name: module for name, module in net.named_modules() if isinstance(module, ScaledConv2d)}
    for name, spread in output_spreads(net, list(convs), batches).items():
        given_scales = (scale for key, scale in (scales or {}).items() if f"{name}.".startswith(key.removesuffix("weight")))
        convs[name].rescale(next(given_scales, spread.variance.sqrt()))
        owner = net.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, NormedConv2d):
            owner.restore(spread.mean, spread.variance)


@torch.no_grad()
def output_spreads(net: nn.Module, names: Sequence[str], batches: Iterable[Tensor]) -> Mapping[str, Spread]:
    """Statistics of the outputs (B,C',H',W') of modules over `batches` (B,3,H,W), in eval mode, in which the net ends."""
    counts = dict.fromkeys(names, 0)
    sums: dict[str, list[Tensor]] = {}

    def record(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        places = output.numel() // output.shape[1]
        variance, mean = torch.var_mean(output.float(), (0, 2, 3), correction=0)
        mean, variance = mean.double(), variance.double()
        first, second = sums.setdefault(name, [torch.zeros_like(mean), torch.zeros_like(mean)])
        first += places * mean
        second += places * (variance + mean.square())
        counts[name] += places

    net.eval()
    with ExitStack() as stack:
        for name in names:
            handle = net.get_submodule(name).register_forward_hook(partial(record, name))
            stack.callback(handle.remove)
        for x in batches:
            net(x)
    spreads = {}
    for name, (first, second) in sums.items():
        mean = first / counts[name]
        spreads[name] = Spread(mean, (second / counts[name] - mean.square()).clamp(min=0))
        if not (mean.isfinite().all() and spreads[name].variance.isfinite().all()):
            raise FgvcError(f"{name}: its output for training images is not finite; the net's weights are broken")
    if len(spreads) < len(counts):
        raise FgvcError("no image to take the spread of the convolutions' outputs from")
    return spreads
