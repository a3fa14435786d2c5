"""Each branch's forward against its formula, written out with torch's own operations, in train and eval mode."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.reparam.branches import AverageNorm, ConvNorm, IdentityNorm, PointConvNorm
from fgvc.reparam.kinds import acb, dbb, overparam, repvgg


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """(x - mean) / sqrt(var + eps) * gamma + beta, of the batch in train mode, else of the running statistics."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    mean, var, gamma, beta = (value[:, None, None] for value in (mean, var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * gamma + beta


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    side = conv.kernel_size[0]
    if isinstance(conv, Conv2dSame):
        return pad_same(x, list(conv.kernel_size), list(conv.stride))
    return nn.ZeroPad2d(side // 2)(x)


def middle(x: Tensor, side: int, kernel_size: tuple[int, int]) -> Tensor:
    rows, columns = (side - kernel_size[0]) // 2, (side - kernel_size[1]) // 2
    return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]


def means(x: Tensor, side: int, stride: int) -> Tensor:
    """Average pooling by loops over the positions of the window."""
    rows = range(0, x.shape[2] - side + 1, stride)
    columns = range(0, x.shape[3] - side + 1, stride)
    cells = [x[:, :, i : i + side, j : j + side].sum((2, 3)) / side**2 for i in rows for j in columns]
    return torch.stack(cells, dim=2).unflatten(2, (len(rows), len(columns)))


def expected(branch: nn.Module, conv: nn.Conv2d, x: Tensor) -> Tensor:
    side, stride, groups, p = conv.kernel_size[0], conv.stride[0], conv.groups, padded(x, conv)
    if isinstance(branch, ConvNorm):
        kernel = branch.conv.weight
        return normalised(F.conv2d(middle(p, side, kernel.shape[2:]), kernel, None, stride, 0, 1, groups), branch.norm)
    if isinstance(branch, IdentityNorm):
        return normalised(x, branch.norm)
    if isinstance(branch, AverageNorm):
        point = p if branch.conv is None else F.conv2d(p, branch.conv.weight, None, 1, 0, 1, groups)
        return normalised(means(point, side, stride), branch.norm)
    inside = normalised(F.conv2d(p, branch.point.conv.weight, None, 1, 0, 1, groups), branch.point.norm)
    assert isinstance(branch, PointConvNorm)
    return normalised(F.conv2d(inside, branch.conv.weight, None, stride, 0, 1, groups), branch.norm)


def randomise(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(value)
            norm.running_var.uniform_(0.1, 4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("make", [acb, dbb, repvgg, overparam])
def test_a_block_is_the_sum_of_its_formulas(
    make: Callable, side: int, groups: int, stride: int, same: bool, training: bool
) -> None:
    torch.manual_seed(side + groups + stride)
    padding = {} if same else {"padding": side // 2}
    conv = (Conv2dSame if same else nn.Conv2d)(6, 6, side, stride=stride, groups=groups, **padding).double()
    block = make(conv).double().train(training)
    randomise(block)
    x = torch.randn(3, 6, 9, 12, dtype=torch.float64)
    y = conv(x) + sum(expected(branch, conv, x) for branch in block.branches.values())
    assert (block(x) - y).abs().max() < 1e-10


@pytest.mark.parametrize("groups", [1, 8])
def test_zeros_between_the_two_convolutions_would_not_fold(groups: int) -> None:
    """The border that the 1x1's batch norm makes of zeros is its bias; only with it is the fold exact."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False)
    branch = dbb(conv).branches["1x1-kxk"].double().eval()
    randomise(branch)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    kernel, bias = branch.fold()
    result = F.conv2d(x, kernel, bias, 1, 1, 1, groups)
    inside = branch.point.norm(branch.point.conv(x))
    naive = branch.norm(F.conv2d(inside, branch.conv.weight, None, 1, 1, 1, groups))
    assert (result - branch(x, (1, 1, 1, 1))).abs().max() < 1e-11
    assert (result - naive)[:, :, 1:-1, 1:-1].abs().max() < 1e-11  # inside they agree
    assert (result - naive).abs().max() > 0.1  # at the border they can't
    border = branch.point.norm(torch.zeros(1, len(inside[0]), 1, 1, dtype=torch.float64))
    right = F.conv2d(
        torch.where(F.pad(torch.ones_like(inside), (1, 1, 1, 1)) > 0, F.pad(inside, (1, 1, 1, 1)), border),
        branch.conv.weight, None, 1, 0, 1, groups,
    )  # fmt: skip
    assert (result - branch.norm(right)).abs().max() < 1e-11


def test_averages_count_the_zeros_of_the_border() -> None:
    """By hand: a map of ones, k = 3. A corner sees four ones of nine, an edge six."""
    branch = AverageNorm(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1, eps=0.0)).eval()
    nn.init.ones_(branch.norm.weight)
    means = branch(torch.ones(1, 1, 3, 3), (1, 1, 1, 1))[0, 0]
    torch.testing.assert_close(means * 9, torch.tensor([[4.0, 6, 4], [6, 9, 6], [4, 6, 4]]))


def test_the_border_is_that_of_the_batch_in_training() -> None:
    """It does not lag behind: with running statistics of another world, the branch still normalises zeros by the batch's."""
    torch.manual_seed(0)
    branch = dbb(nn.Conv2d(4, 4, 3, padding=1)).branches["1x1-kxk"].train()
    nn.init.ones_(branch.norm.weight)
    x = torch.randn(4, 4, 5, 5)
    first = branch(x, (1, 1, 1, 1))
    branch.point.norm.running_mean.fill_(100.0)
    assert torch.equal(branch(x, (1, 1, 1, 1)), first)


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, stride=2)])
def test_no_identity_where_the_shape_changes(conv: nn.Conv2d) -> None:
    with pytest.raises(ValueError, match="changes the shape"):
        IdentityNorm(conv, None)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_papers_batch_norm_before_the_average_changes_nothing(stride: int, groups: int) -> None:
    """1x1 - BN - average - BN of the padded input, in float64 with an eps of nothing: the same to the last digits."""
    torch.manual_seed(0)
    exact = nn.BatchNorm2d(6, eps=1e-30)
    conv = nn.Conv2d(6, 6, 3, padding=1, stride=stride, groups=groups)
    branch = AverageNorm(conv, exact).double().train()
    randomise(branch)
    x = torch.randn(4, 6, 7, 8, dtype=torch.float64)
    between = nn.BatchNorm2d(6, eps=1e-30).double()
    nn.init.uniform_(between.weight, 0.5, 2)
    nn.init.normal_(between.bias)
    inside = normalised(F.conv2d(padded(x, conv), branch.conv.weight, groups=groups), between)
    papers = normalised(means(inside, 3, stride), branch.norm)
    assert (branch(x, (1, 1, 1, 1)) - papers).abs().max() < 1e-11


def test_a_stem_trains_in_channels_last() -> None:
    """torch crashes in strided 1x1 convolutions of three channels_last channels: here they must not be strided."""
    for make in (dbb, repvgg, overparam):
        block = make(nn.Conv2d(3, 8, 3, stride=2, padding=1)).to(memory_format=torch.channels_last)
        assert all(c.stride == (1, 1) for c in block.modules() if isinstance(c, nn.Conv2d) and c.kernel_size == (1, 1))
        block(torch.randn(4, 3, 33, 32).contiguous(memory_format=torch.channels_last)).sum().backward()
