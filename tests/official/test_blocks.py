"""Re-parameterised blocks: ACNet, the Diverse Branch Block, RepVGG, MobileOne. The origin's batch norm is the identity there, as
timm's own stands behind the sum here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.reparam import kinds
from fgvc.reparam.block import Branched
from tests.official.conftest import Arrays

NORM = ("weight", "bias", "mean", "var")
CASES = {
    "acnet": ("dense", "grouped", "depthwise", "large"),
    "dbb": ("dense", "grouped", "depthwise", "large"),
    "repvgg": ("dense", "grouped", "depthwise"),
    "mobileone": ("dense", "grouped", "depthwise", "large", "point"),
}
ATOL = {"acnet": 3.6e-14, "dbb": 3.6e-14, "repvgg": 8.9e-15, "mobileone": 3.6e-14}  # of outputs up to 25
MADE: Mapping[str, Callable[[nn.Conv2d], Branched]] = {
    "acnet": kinds.acb, "dbb": kinds.dbb, "repvgg": kinds.repvgg,
    "mobileone": lambda conv: kinds.overparam(conv, branches=2),
}  # fmt: skip


def normed(module: nn.Module, a: Arrays, name: str) -> None:
    """A convolution and its batch norm, or a batch norm alone."""
    with torch.no_grad():
        if f"{name}_weight" in a:
            module.conv.weight.copy_(a[f"{name}_weight"])
        give(module.norm, *(a[f"{name}_norm_{part}"] for part in NORM))


def give(norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def block(kind: str, a: Arrays) -> Branched:
    side, groups = a.number("side"), a.number("groups")
    channels, (out, _, _, _) = a["input"].shape[1], a["origin_weight"].shape
    conv = nn.Conv2d(channels, out, side, a.number("stride"), side // 2, groups=groups, bias=False).double()
    block_ = MADE[kind](conv).double()
    with torch.no_grad():
        conv.weight.copy_(a["origin_weight"])
    branches = block_.branches
    if kind == "acnet":
        normed(branches["1xk"], a, "row")
        normed(branches["kx1"], a, "column")
        return block_
    if kind == "dbb":
        return diverse(block_, a)
    for number in range(sum(name.startswith("kxk") for name in branches)):
        normed(branches[f"kxk{number}"], a, f"branch{number}")
    assert ("1x1" in branches) == ("point_weight" in a)
    assert ("identity" in branches) == ("identity_norm_weight" in a)
    if "1x1" in branches:
        normed(branches["1x1"], a, "point")
    if "identity" in branches:
        normed(branches["identity"], a, "identity")
    return block_


def diverse(net: Branched, a: Arrays) -> Branched:
    deep, average = net.branches["1x1-kxk"], net.branches[next(n for n in net.branches if n.startswith("average"))]
    normed(deep.point, a, "deep_point")
    normed(deep, a, "deep")
    weight, bias, mean, var = (a[f"average_norm_{part}"] for part in NORM)
    if average.conv is None:
        give(average.norm, weight, bias, mean, var)
        return net
    normed(net.branches["1x1"], a, "point")
    with torch.no_grad():
        average.conv.weight.copy_(a["average_point_weight"])
    first = {part: a[f"average_point_norm_{part}"] for part in NORM}
    # Two batch norms there, one here: y = t (scale x + shift - mean) + bias.
    scale = first["weight"] / (first["var"] + 1e-5).sqrt()
    shift, t = first["bias"] - first["mean"] * scale, weight / (var + 1e-5).sqrt()
    give(average.norm, t * scale, bias + t * (shift - mean), torch.zeros_like(t), torch.full_like(t, 1 - 1e-5))
    return net


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in CASES.items() for case in cases])
def test_in_evaluation_and_folded(kind: str, case: str, official: Callable[[str], Arrays]) -> None:
    a = official(kind).of(case)
    net = block(kind, a).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(a["input"]), a["output"], rtol=0, atol=ATOL[kind])
        kernel, bias = net.fold()
    torch.testing.assert_close(kernel, a["kernel"], rtol=0, atol=ATOL[kind])
    torch.testing.assert_close(bias, a["bias"], rtol=0, atol=ATOL[kind])
    folded = F.conv2d(a["input"], kernel, bias, a.number("stride"), a.number("side") // 2, groups=a.number("groups"))
    torch.testing.assert_close(folded, a["output"], rtol=0, atol=2 * ATOL[kind])


def trained(net: nn.Module, a: Arrays) -> tuple[Tensor, Tensor]:
    x = a["input"].clone().requires_grad_()
    y = net.train()(x)
    (gradient,) = torch.autograd.grad((y * a["train_cotangent"]).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize(("kind", "case"), [(k, c) for k in ("acnet", "repvgg", "mobileone") for c in CASES[k]])
def test_in_training_by_the_batch_s_statistics(kind: str, case: str, official: Callable[[str], Arrays]) -> None:
    a = official(kind).of(case)
    y, gradient = trained(block(kind, a), a)
    torch.testing.assert_close(y, a["train_output"], rtol=0, atol=ATOL[kind])
    torch.testing.assert_close(gradient, a["train_grad_input"], rtol=0, atol=1e-6)


class Theirs(nn.Module):
    """The Diverse Branch Block as published: the border between two operations has the value that the RUNNING statistics of the
    batch norm before it give a zero, also in training, without a gradient."""

    def __init__(self, a: Arrays) -> None:
        super().__init__()
        self.a = a
        self.stride, self.groups, self.half = a.number("stride"), a.number("groups"), a.number("side") // 2

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.a[f"{name}_norm_weight"], self.a[f"{name}_norm_bias"]
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)

    def padded(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (self.a[f"{name}_norm_{part}"] for part in NORM)
        with torch.no_grad():  # moved by this very batch already
            mean = torch.lerp(mean, x.mean((0, 2, 3)), 0.1)
            var = torch.lerp(var, x.var((0, 2, 3)), 0.1)
        border = bias - mean * weight / (var + 1e-5).sqrt()
        inside = self.norm(x, name)
        return F.pad(inside - border.view(-1, 1, 1), (self.half,) * 4) + border.view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, stride, groups = self.a, self.stride, self.groups
        side = 2 * self.half + 1
        y = F.conv2d(x, a["origin_weight"], None, stride, self.half, groups=groups)
        deep = self.padded(F.conv2d(x, a["deep_point_weight"], groups=groups), "deep_point")
        y = y + self.norm(F.conv2d(deep, a["deep_weight"], None, stride, groups=groups), "deep")
        if "point_weight" not in a:
            return y + self.norm(F.avg_pool2d(x, side, stride, self.half), "average")
        y = y + self.norm(F.conv2d(x, a["point_weight"], None, stride, groups=groups), "point")
        mean = self.padded(F.conv2d(x, a["average_point_weight"], groups=groups), "average_point")
        return y + self.norm(F.avg_pool2d(mean, side, stride), "average")


@pytest.mark.parametrize("case", CASES["dbb"])
def test_known_the_border_of_a_diverse_branch_in_training(case: str, official: Callable[[str], Arrays]) -> None:
    """Theirs lags behind the batch there; ours pads first, so that border and inside share their statistics."""
    a = official("dbb").of(case)
    y, gradient = trained(Theirs(a), a)
    torch.testing.assert_close(y, a["train_output"], rtol=0, atol=4e-14)
    torch.testing.assert_close(gradient, a["train_grad_input"], rtol=0, atol=4e-14)
    ours, own_gradient = trained(block("dbb", a), a)
    assert 0.25 < (ours - a["train_output"]).abs().max() < 4.5
    assert 0.13 < (own_gradient - a["train_grad_input"]).abs().max() < 1.9


@pytest.mark.parametrize("kind", CASES)
def test_batch_norms_are_of_the_default(kind: str, official: Callable[[str], Arrays]) -> None:
    a = official(kind)
    assert (a.number("norm_eps"), a.number("norm_momentum")) == (nn.BatchNorm2d(1).eps, nn.BatchNorm2d(1).momentum)
