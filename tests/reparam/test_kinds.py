"""The truth: the block's own forward in float64 against one convolution with the folded kernel, every kind alike."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched
from fgvc.reparam.kinds import acb, dbb, overparam, repvgg

KINDS: dict[str, Callable[..., Branched]] = {"acb": acb, "dbb": dbb, "repvgg": repvgg, "overparam": overparam}
EVERY = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def convolution(
    *, side: int, stride: int = 1, groups: int = 1, bias: bool = False, same: bool = False, channels: int = 8,
    out: int | None = None,
) -> nn.Conv2d:  # fmt: skip
    if same:
        return Conv2dSame(channels, out or channels, side, stride=stride, groups=groups, bias=bias)
    return nn.Conv2d(channels, out or channels, side, stride=stride, padding=side // 2, groups=groups, bias=bias)


def randomised(block: Branched) -> Branched:
    """Every batch norm with a scale, shift and statistics of its own, none of them trivial."""
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 4)
    return block


def folded(block: Branched, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    kernel, bias = block.fold()
    assert kernel.shape == conv.weight.shape
    assert kernel.dtype == bias.dtype == torch.float64
    if isinstance(conv, Conv2dSame):
        return conv2d_same(x, kernel, bias, conv.stride, (0, 0), (1, 1), conv.groups)
    return F.conv2d(x, kernel, bias, conv.stride, conv.padding, 1, conv.groups)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float(((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).detach())


def reach(kernel: torch.Tensor) -> list[list[bool]]:
    """Which taps of a kernel are used by any channel."""
    return (kernel.abs().amax((0, 1)) > 1e-9).tolist()


@EVERY
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("side", [3, 5, 7])
def test_folded_equals_forward(make: Callable, side: int, groups: int, stride: int, same: bool) -> None:
    torch.manual_seed(side + groups + stride)
    conv = convolution(side=side, stride=stride, groups=groups, bias=groups == 2, same=same)
    block = randomised(make(conv, BatchNormAct2d(8, eps=1e-3))).double().eval()
    for height, width in ((14, 14), (13, 13), (14, 13), (9, 16)):
        x = torch.randn(2, 8, height, width, dtype=torch.float64)
        assert apart(folded(block, conv, x), block(x)) < 1e-11
        assert block(x).shape == conv(x).shape
    for branch in block.branches.values():  # each counts: the test would notice the loss of one
        kernel, bias = branch.fold()
        assert kernel.abs().max() > 1e-3
        assert bias.abs().max() > 1e-3


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    side=st.sampled_from([3, 5, 7]),
    stride=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 4]),
    wider=st.sampled_from([0.5, 1, 2]),
    same=st.booleans(),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    seed=st.integers(0, 2**20),
)
def test_folded_equals_forward_for_any_size(
    kind: str, side: int, stride: int, groups: int, wider: float, same: bool, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    out = max(groups, int(4 * wider))
    conv = convolution(side=side, stride=stride, groups=groups, same=same, channels=4, out=out)
    block = randomised(KINDS[kind](conv)).double().eval()
    x = torch.randn(1, 4, height, width, dtype=torch.float64)
    assert apart(folded(block, conv, x), block(x)) < 1e-9


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(
    ("channels", "out", "groups", "stride"), [(6, 6, 1, 1), (6, 9, 3, 1), (6, 6, 6, 1), (3, 6, 1, 2)]
)
def test_folded_points_equal_forward(channels: int, out: int, groups: int, stride: int, same: bool) -> None:
    torch.manual_seed(0)
    conv = convolution(side=1, stride=stride, groups=groups, same=same, channels=channels, out=out)
    block = randomised(overparam(conv, branches=2)).double().eval()
    x = torch.randn(2, channels, 7, 8, dtype=torch.float64)
    assert list(block.branches) == ["kxk0", "kxk1"] + (["identity"] if channels == out and stride == 1 else [])
    assert apart(folded(block, conv, x), block(x)) < 1e-11


@EVERY
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("channels", "groups", "stride"), [(3, 1, 2), (8, 1, 1), (8, 8, 1), (8, 8, 2)])
def test_a_new_block_is_the_convolution_bit_for_bit(
    make: Callable, channels: int, groups: int, stride: int, same: bool, training: bool,
    memory_format: torch.memory_format,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    conv = convolution(side=3, stride=stride, groups=groups, same=same, channels=channels)
    x = torch.randn(4, channels, 15, 16).contiguous(memory_format=memory_format)
    plain = copy.deepcopy(conv).to(memory_format=memory_format)
    block = make(conv).to(memory_format=memory_format).train(training)
    assert torch.equal(block(x), plain(x))


@pytest.mark.parametrize(
    ("make", "conv", "branches"),
    [
        (acb, convolution(side=3, stride=2), ["1xk", "kx1"]),
        (dbb, convolution(side=3, stride=2), ["1x1", "1x1-kxk", "average-1x1"]),
        (dbb, convolution(side=5, groups=2), ["1x1", "1x1-kxk", "average-1x1"]),
        (dbb, convolution(side=5, groups=8), ["1x1-kxk", "average"]),
        (dbb, convolution(side=3, groups=8, out=16), ["1x1", "1x1-kxk", "average-1x1"]),  # two for each channel
        (repvgg, convolution(side=3), ["1x1", "identity"]),
        (repvgg, convolution(side=3, groups=8), ["1x1", "identity"]),
        (repvgg, convolution(side=3, stride=2), ["1x1"]),
        (repvgg, convolution(side=3, out=16), ["1x1"]),
        (overparam, convolution(side=3), ["kxk0", "kxk1", "kxk2", "kxk3", "1x1", "identity"]),
        (partial(overparam, branches=1), convolution(side=3, stride=2), ["kxk0", "1x1"]),
        (partial(overparam, branches=2), convolution(side=1), ["kxk0", "kxk1", "identity"]),
    ],
)
def test_which_branches_stand_where(make: Callable, conv: nn.Conv2d, branches: list[str]) -> None:
    assert list(make(conv).branches) == branches


def test_each_branch_writes_where_it_should() -> None:
    """By hand, for k = 3: rows and columns of taps, all, or the middle one."""
    line, middle, full = [False, True, False], [[False] * 3, [False, True, False], [False] * 3], [[True] * 3] * 3
    expected = {
        "1xk": [[False] * 3, [True] * 3, [False] * 3],
        "kx1": [line, line, line],
        **dict.fromkeys(["1x1-kxk", "average-1x1", "average", "kxk0"], full),
        **dict.fromkeys(["1x1", "identity"], middle),
    }
    for groups in (1, 8):
        for make in KINDS.values():
            conv = convolution(side=3, groups=groups)
            block = randomised(make(conv)).eval()
            for name, branch in block.branches.items():
                nn.init.zeros_(conv.weight)
                for other in block.branches.values():
                    nn.init.zeros_(other.norm.weight)
                nn.init.constant_(branch.norm.weight, 1.5)
                if name in expected:
                    assert reach(block.fold()[0]) == expected[name], name


def test_depthwise_blocks_are_twice_as_wide_inside() -> None:
    assert dbb(convolution(side=3, groups=8)).branches["1x1-kxk"].point.conv.weight.shape == (16, 1, 1, 1)
    point = dbb(convolution(side=3, groups=2)).branches["1x1-kxk"].point
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(point.conv(x), x)  # as many inside: the 1x1 starts as the identity


@EVERY
def test_eps_and_momentum_are_those_of_the_norm_behind(make: Callable) -> None:
    block = make(convolution(side=3), BatchNormAct2d(8, eps=1e-3, momentum=0.01))
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    assert all((branch.norm.weight == 0).all() for branch in block.branches.values())
    last = {id(branch.norm) for branch in block.branches.values()}
    assert all((norm.weight == 1).all() for norm in norms if id(norm) not in last)  # else nothing would learn


@EVERY
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("groups", [1, 8])
def test_every_branch_learns_and_still_folds(make: Callable, groups: int, same: bool) -> None:
    torch.manual_seed(0)
    conv = convolution(side=3, groups=groups, same=same)
    plain, norm, teacher = copy.deepcopy(conv), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
    block = make(conv, norm).train()
    start = copy.deepcopy(dict(block.named_parameters()))
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randn(8, 8, 9, 9)
        optimizer.zero_grad()
        F.mse_loss(block(x), teacher(x).detach()).backward()
        optimizer.step()
    for name, parameter in block.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    for name, branch in block.branches.items():
        assert (branch.norm.weight != 0).all(), name
        assert branch.norm.num_batches_tracked == 5
    block.double().eval()
    x = torch.randn(2, 8, 9, 8, dtype=torch.float64)
    assert apart(folded(block, plain, x), block(x)) < 1e-11
    assert apart(block(x), plain.double()(x)) > 1e-3


@EVERY
def test_trains_under_bfloat16_autocast(make: Callable) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    block, x = make(conv), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, conv(x))
        y.square().mean().backward()
    for branch in block.branches.values():
        assert branch.norm.weight.grad.isfinite().all()
        assert branch.norm.weight.grad.abs().sum() > 0


@EVERY
def test_fold_is_repeatable_and_changes_nothing(make: Callable) -> None:
    block = randomised(make(nn.Conv2d(4, 4, 3, padding=1))).eval()
    before = copy.deepcopy(block.state_dict())
    first, second = block.fold(), block.fold()
    first[0].add_(1)
    first[1].add_(1)
    assert torch.equal(first[0], second[0] + 1)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


REFUSED = [
    (nn.Conv2d(4, 4, 2), "2x2 kernel|even"),
    (nn.Conv2d(4, 4, 4, padding=2), "4x4 kernel, even"),
    (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "1x3 kernel, not square"),
    (nn.Conv2d(4, 4, 3), r"padding \(0, 0\) with a 3x3 kernel"),
    (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "dilation 2"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding mode reflect"),
]


@EVERY
@pytest.mark.parametrize(("conv", "reason"), REFUSED)
def test_refusals(make: Callable, conv: nn.Conv2d, reason: str) -> None:
    with pytest.raises(FgvcError, match=reason):
        make(conv)


def test_only_overparam_takes_points() -> None:
    for kind, make in KINDS.items():
        if kind == "overparam":
            assert "1x1" not in make(nn.Conv2d(4, 4, 1)).branches
        else:
            with pytest.raises(FgvcError, match="1x1 kernel"):
                make(nn.Conv2d(4, 4, 1))
    with pytest.raises(FgvcError, match=r"padding \(1, 1\) with a 1x1"):
        overparam(nn.Conv2d(4, 4, 1, padding=1))
