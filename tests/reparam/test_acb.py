"""The truth: the block's own forward in float64 against one F.conv2d with the folded kernel."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import nn
from torch.nn import functional as F

from fgvc.reparam.acb import AcbBlock, refusal
from fgvc.types import FgvcError


def convolution(*, side: int, stride: int, groups: int, bias: bool, same: bool, channels: int = 8) -> nn.Conv2d:
    if same:
        return Conv2dSame(channels, channels, side, stride=stride, groups=groups, bias=bias)
    return nn.Conv2d(channels, channels, side, stride=stride, padding=side // 2, groups=groups, bias=bias)


def randomised(block: AcbBlock) -> AcbBlock:
    for branch in (block.row, block.column):
        nn.init.normal_(branch.norm.weight)
        nn.init.normal_(branch.norm.bias)
        branch.norm.running_mean.normal_()
        branch.norm.running_var.uniform_(0.1, 4)
    return block


def folded(block: AcbBlock, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    kernel, bias = block.fold()
    if isinstance(conv, Conv2dSame):
        return conv2d_same(x, kernel, bias, conv.stride, (0, 0), (1, 1), conv.groups)
    return F.conv2d(x, kernel, bias, conv.stride, conv.padding, 1, conv.groups)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_folded_equals_forward(side: int, groups: int, stride: int, same: bool) -> None:
    torch.manual_seed(side + groups + stride)
    conv = convolution(side=side, stride=stride, groups=groups, bias=groups == 2, same=same)
    block = randomised(AcbBlock(conv, BatchNormAct2d(8, eps=1e-3))).double().eval()
    for height, width in ((14, 14), (13, 13), (14, 13), (9, 16)):
        x = torch.randn(2, 8, height, width, dtype=torch.float64)
        result = folded(block, conv, x)
        assert result.shape == block(x).shape == conv(x).shape
        assert (result - block(x)).abs().max() < 1e-11
        assert (result - conv(x)).abs().max() > 1e-2  # the branches count: the test would notice their loss


@settings(deadline=None, max_examples=80)
@given(
    side=st.sampled_from([3, 5, 7]),
    stride=st.integers(1, 4),
    depthwise=st.booleans(),
    same=st.booleans(),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_folded_equals_forward_for_any_size(
    side: int, stride: int, depthwise: bool, same: bool, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    conv = convolution(side=side, stride=stride, groups=4 if depthwise else 1, bias=False, same=same, channels=4)
    block = randomised(AcbBlock(conv)).double().eval()
    x = torch.randn(1, 4, height, width, dtype=torch.float64)
    assert (folded(block, conv, x) - block(x)).abs().max() < 1e-11


def test_channels_may_differ() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, 3, padding=1, groups=3, bias=False)
    block = randomised(AcbBlock(conv)).double().eval()
    x = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    assert (folded(block, conv, x) - block(x)).abs().max() < 1e-11


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("channels", [3, 8])
def test_a_new_block_is_the_convolution_bit_for_bit(
    channels: int, same: bool, training: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = convolution(side=3, stride=2, groups=1, bias=False, same=same, channels=channels)
    x = torch.randn(4, channels, 15, 16).contiguous(memory_format=memory_format)
    plain = copy.deepcopy(conv).to(memory_format=memory_format)
    block = AcbBlock(conv).to(memory_format=memory_format).train(training)
    assert torch.equal(block(x), plain(x))


def test_the_square_keeps_the_convolutions_own_parameters() -> None:
    for same in (False, True):
        conv = convolution(side=3, stride=2, groups=1, bias=True, same=same)
        block = AcbBlock(conv)
        assert block.square.weight is conv.weight
        assert block.square.bias is conv.bias
        assert list(dict(block.named_parameters())) == [
            "square.weight", "square.bias", "row.conv.weight", "row.norm.weight", "row.norm.bias",
            "column.conv.weight", "column.norm.weight", "column.norm.bias",
        ]  # fmt: skip


def test_branches_take_over_eps_and_momentum() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    block = AcbBlock(conv, BatchNormAct2d(4, eps=1e-3, momentum=0.01))
    assert {(branch.norm.eps, branch.norm.momentum) for branch in (block.row, block.column)} == {(1e-3, 0.01)}


def test_fold_is_repeatable_and_changes_nothing() -> None:
    block = randomised(AcbBlock(nn.Conv2d(4, 4, 3, padding=1))).eval()
    before = copy.deepcopy(block.state_dict())
    first, second = block.fold(), block.fold()
    first[0].add_(1)
    first[1].add_(1)
    assert torch.equal(first[0], second[0] + 1)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_trains_under_bfloat16_autocast() -> None:
    torch.manual_seed(0)
    block = AcbBlock(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(2, 4, 8, 8)).square().mean().backward()
    assert block.row.norm.weight.grad.abs().sum() > 0
    assert block.column.norm.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 1), "1x1 kernel"),
        (nn.Conv2d(4, 4, 2), "2x2 kernel, even"),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "1x3 kernel, not square"),
        (nn.Conv2d(4, 4, 3), r"padding \(0, 0\) with a 3x3 kernel"),
        (nn.Conv2d(4, 4, 3, padding=(1, 0)), r"padding \(1, 0\)"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding same"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "dilation 2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode reflect"),
        (Conv2dSame(4, 4, 4), "4x4 kernel, even"),
    ],
)
def test_refusals(conv: nn.Conv2d, reason: str) -> None:
    with pytest.raises(FgvcError, match=reason):
        AcbBlock(conv)
    assert refusal(conv)
