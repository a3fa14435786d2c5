"""The published re-parameterised blocks, each with its branches.

Each function takes a convolution and `like`, the batch norm behind it, and raises FgvcError for a convolution with a `refusal`.
"""

from __future__ import annotations

from torch import nn

from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched, refusal
from fgvc.reparam.branches import (
    AverageNorm,
    ConvNorm,
    IdentityNorm,
    PointConvNorm,
    is_depthwise,
    keeps_shape,
)


def acb(conv: nn.Conv2d, like: nn.Module | None = None) -> Branched:
    """ACNet's block (ICCV 2019, arXiv:1908.03930): 1 x k and k x 1."""
    side = _side(conv, 3)
    return Branched(conv, {"1xk": ConvNorm(conv, like, (1, side)), "kx1": ConvNorm(conv, like, (side, 1))})


def dbb(conv: nn.Conv2d, like: nn.Module | None = None) -> Branched:
    """The Diverse Branch Block (CVPR 2021, arXiv:2103.13425): 1x1, 1x1 - k x k and average - 1x1; depthwise 1x1 - k x k and
    average."""
    _side(conv, 3)
    deep = PointConvNorm(conv, like)
    if is_depthwise(conv):
        return Branched(conv, {"1x1-kxk": deep, "average": AverageNorm(conv, like)})
    return Branched(
        conv, {"1x1": ConvNorm(conv, like, (1, 1)), "1x1-kxk": deep, "average-1x1": AverageNorm(conv, like)}
    )


def repvgg(conv: nn.Conv2d, like: nn.Module | None = None) -> Branched:
    """RepVGG's block (CVPR 2021, arXiv:2101.03697), for any k: 1x1, and the identity if the convolution keeps the shape."""
    _side(conv, 3)
    return Branched(conv, {"1x1": ConvNorm(conv, like, (1, 1))} | _identity(conv, like))


def overparam(conv: nn.Conv2d, like: nn.Module | None = None, *, branches: int = 4) -> Branched:
    """MobileOne's block (CVPR 2023, arXiv:2206.04040): `branches` times k x k, 1x1 unless k is 1, and the identity if the
    convolution keeps the shape."""
    side = _side(conv, 1)
    modules: dict[str, nn.Module] = {f"kxk{number}": ConvNorm(conv, like, (side, side)) for number in range(branches)}
    if side > 1:
        modules["1x1"] = ConvNorm(conv, like, (1, 1))
    return Branched(conv, modules | _identity(conv, like))


def _identity(conv: nn.Conv2d, like: nn.Module | None) -> dict[str, nn.Module]:
    return {"identity": IdentityNorm(conv, like)} if keeps_shape(conv) else {}


def _side(conv: nn.Conv2d, smallest: int) -> int:
    if reason := refusal(conv, smallest):
        raise FgvcError(f"branches can't be put beside this convolution: {reason}")
    return conv.kernel_size[0]
