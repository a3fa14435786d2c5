"""The truth is the layer itself, run in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.reparam.fold import averaged, embed, exact, fold_norm, identity_kernel, sequential


def randomised(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for tensor, low, high in ((norm.running_mean, -3, 3), (norm.running_var, 0.1, 4)):
        tensor.uniform_(low, high)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (8, 1)])
def test_fold_norm_equals_convolution_then_norm(groups: int, stride: int, biased: bool, affine: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, stride=stride, padding=1, groups=groups, bias=biased).double()
    norm = randomised(nn.BatchNorm2d(16, eps=1e-3, affine=affine)).double().eval()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    kernel, bias = fold_norm(conv.weight, norm, conv.bias)
    folded = F.conv2d(x, kernel, bias, stride, 1, 1, groups)
    assert (folded - norm(conv(x))).abs().max() < 1e-12


def test_fold_norm_by_hand() -> None:
    norm = nn.BatchNorm2d(1, eps=0.0).eval()
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(4.0)
    nn.init.constant_(norm.weight, 10.0)
    nn.init.constant_(norm.bias, 1.0)
    kernel, bias = fold_norm(torch.full((1, 1, 1, 1), 2.0), norm, torch.tensor([5.0]))
    assert kernel.item() == 2 * 10 / 2
    assert bias.item() == (5 - 3) * 10 / 2 + 1


def test_fold_norm_is_exact_in_float64_and_mutates_nothing() -> None:
    conv = nn.Conv2d(2, 2, 1, bias=False, dtype=torch.bfloat16)
    norm = nn.BatchNorm2d(2)
    before = conv.weight.detach().clone(), norm.running_mean.clone()
    kernel, bias = fold_norm(conv.weight, norm)
    assert kernel.dtype == bias.dtype == torch.float64
    kernel.zero_()
    bias.add_(1)
    assert torch.equal(conv.weight, before[0])
    assert torch.equal(norm.running_mean, before[1])


def test_fold_norm_refuses_a_norm_without_statistics() -> None:
    with pytest.raises(FgvcError, match="running statistics"):
        fold_norm(torch.ones(2, 2, 1, 1), nn.BatchNorm2d(2, track_running_stats=False))


def test_exact_never_shares_memory() -> None:
    tensor = torch.ones(3, dtype=torch.float64)
    exact(tensor).zero_()
    assert tensor.sum() == 3


@settings(deadline=None, max_examples=60)
@given(
    side=st.sampled_from([3, 5, 7]),
    small=st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 3, 5, 7])),
    stride=st.sampled_from([1, 2, 3]),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
)
def test_an_embedded_kernel_is_the_same_convolution(
    side: int, small: tuple[int, int], stride: int, height: int, width: int
) -> None:
    kernel = torch.randn(4, 3, *small, dtype=torch.float64)
    if max(small) > side:
        with pytest.raises(ValueError, match="no middle place"):
            embed(kernel, side)
        return
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.conv2d(x, kernel, stride=stride, padding=(small[0] // 2, small[1] // 2))
    result = F.conv2d(x, embed(kernel, side), stride=stride, padding=side // 2)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("shape", "side"), [((1, 2), 3), ((2, 1), 3), ((1, 1), 4)])
def test_embed_refuses_what_has_no_middle(shape: tuple[int, int], side: int) -> None:
    with pytest.raises(ValueError, match="no middle place"):
        embed(torch.ones(1, 1, *shape), side)


@pytest.mark.parametrize(("channels", "groups"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_identity_and_average_kernels_equal_the_operations(channels: int, groups: int) -> None:
    x = torch.randn(2, channels, 7, 8, dtype=torch.float64)
    same = identity_kernel(channels, groups)
    assert same.shape == (channels, channels // groups, 1, 1)
    assert torch.equal(F.conv2d(x, same, groups=groups), x)
    for side, stride in ((1, 1), (3, 1), (5, 2)):
        means = F.conv2d(x, averaged(same, side), stride=stride, padding=side // 2, groups=groups)
        expected = F.avg_pool2d(x, side, stride, side // 2, count_include_pad=True)
        assert (means - expected).abs().max() < 1e-12
        point = torch.randn(2 * channels, channels // groups, 1, 1, dtype=torch.float64)
        mixed = F.conv2d(x, averaged(point, side), stride=stride, padding=side // 2, groups=groups)
        assert (mixed - F.conv2d(expected, point, groups=groups)).abs().max() < 1e-12


@settings(deadline=None, max_examples=60)
@given(
    side=st.sampled_from([1, 3, 5]),
    groups=st.sampled_from([1, 2, 3]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    stride=st.sampled_from([1, 2]),
)
def test_sequential_equals_two_convolutions(side: int, groups: int, shape: tuple[int, int, int], stride: int) -> None:
    channels, inner, out = (groups * count for count in shape)
    point = torch.randn(inner, channels // groups, 1, 1, dtype=torch.float64)
    kernel = torch.randn(out, inner // groups, side, side, dtype=torch.float64)
    inner_bias, bias = (torch.randn(count, dtype=torch.float64) for count in (inner, out))
    x = torch.randn(2, channels, 8, 7, dtype=torch.float64)
    expected = F.conv2d(F.conv2d(x, point, inner_bias, groups=groups), kernel, bias, stride, groups=groups)
    both, shift = sequential(point, inner_bias, kernel, bias, groups=groups)
    assert both.shape == (out, channels // groups, side, side)
    assert (F.conv2d(x, both, shift, stride, groups=groups) - expected).abs().max() < 1e-11


def test_sequential_by_hand() -> None:
    """Two channels inside: 2x + 1 and 3x + 5, then weighted 10 and 100 with a bias of 7."""
    point, inner_bias = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1), torch.tensor([1.0, 5.0])
    kernel, bias = torch.tensor([10.0, 100.0]).view(1, 2, 1, 1), torch.tensor([7.0])
    both, shift = sequential(point, inner_bias, kernel, bias, groups=1)
    assert both.item() == 10 * 2 + 100 * 3
    assert shift.item() == 7 + 10 * 1 + 100 * 5
