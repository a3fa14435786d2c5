"""What all blocks share; what is in them is tested with the kinds."""

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched, refusal
from fgvc.reparam.kinds import acb


def test_the_origin_keeps_the_convolutions_own_parameters() -> None:
    for conv in (Conv2dSame(8, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2, padding=1)):
        block = acb(conv)
        assert block.origin.weight is conv.weight
        assert block.origin.bias is conv.bias
        assert list(dict(block.named_parameters())) == [
            "origin.weight", "origin.bias",
            "branches.1xk.conv.weight", "branches.1xk.norm.weight", "branches.1xk.norm.bias",
            "branches.kx1.conv.weight", "branches.kx1.norm.weight", "branches.kx1.norm.bias",
        ]  # fmt: skip


def test_without_branches_it_is_the_convolution() -> None:
    for conv in (Conv2dSame(4, 6, 3, stride=2), nn.Conv2d(4, 6, 3, stride=2, padding=1)):
        block, x = Branched(conv, {}), torch.randn(2, 4, 9, 8)
        assert torch.equal(block(x), conv(x))
        kernel, bias = block.fold()
        assert torch.equal(kernel, conv.weight.double())
        assert torch.equal(bias, conv.bias.double())


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1), "1x1 kernel"),
        (nn.Conv2d(4, 4, 2), "2x2 kernel"),
        (nn.Conv2d(4, 4, 4), "4x4 kernel, even"),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "1x3 kernel, not square"),
        (nn.Conv2d(4, 4, 3), "padding (0, 0) with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, padding=(1, 0)), "padding (1, 0) with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding same with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "dilation 2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode reflect"),
        (Conv2dSame(4, 4, 4), "4x4 kernel, even"),
        (nn.Conv2d(4, 4, 3, padding=1), None),
        (nn.Conv2d(4, 4, 7, padding=3, stride=2, groups=4), None),
        (Conv2dSame(4, 4, 5, stride=2), None),
    ],
)
def test_refusals(conv: nn.Conv2d, reason: str | None) -> None:
    assert refusal(conv) == reason
    if reason:
        with pytest.raises(FgvcError, match="can't be put beside"):
            acb(conv)


def test_points_are_a_matter_of_the_kind() -> None:
    assert refusal(nn.Conv2d(4, 4, 1), 1) is None
    assert refusal(Conv2dSame(4, 4, 1, stride=2), 1) is None
    assert refusal(nn.Conv2d(4, 4, 2), 1) == "2x2 kernel, even"
    assert Branched(nn.Conv2d(4, 4, 1), {}).kernel_size == (1, 1)
    with pytest.raises(FgvcError, match="2x2 kernel, even"):
        Branched(nn.Conv2d(4, 4, 2), {})
