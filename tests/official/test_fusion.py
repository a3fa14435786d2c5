"""ASFF: every stage at the size of one of them, and the weights by which they are added."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.techniques.multiscale_head.asff import Asff
from tests.official.conftest import Arrays

NORM = ("weight", "bias", "mean", "var")
SHAPES = ((8, 3, 3), (6, 6, 6), (6, 12, 12))


def normed(a: Arrays, name: str, x: Tensor, slope: float) -> Tensor:
    """Their add_conv: convolution, batch norm in evaluation, LeakyReLU."""
    kernel = a[f"{name}_weight"]
    stride = 2 if kernel.shape[2] == 3 else 1
    weight, bias, mean, var = (a[f"{name}_norm_{part}"] for part in NORM)
    y = F.batch_norm(F.conv2d(x, kernel, None, stride, kernel.shape[2] // 2), mean, var, weight, bias, eps=1e-5)
    return F.leaky_relu(y, slope)


def resized(a: Arrays, level: int, number: int, stage: Tensor, slope: float) -> Tensor:
    for _ in range(number - level - 1):
        stage = F.max_pool2d(stage, 3, stride=2, padding=1)
    if f"resize{number}_weight" in a:
        stage = normed(a, f"resize{number}", stage, slope)
    size = SHAPES[level][1:]
    return stage if stage.shape[2:] == size else F.interpolate(stage, size, mode="nearest")


def ours(a: Arrays, level: int) -> Asff:
    fusion = Asff(SHAPES, level=level, width=SHAPES[level][0]).double().eval()
    with torch.no_grad():
        for number, (resize, weigh) in enumerate(zip(fusion.resize, fusion.weigh, strict=True)):
            if f"resize{number}_weight" in a:
                resize.conv.weight.copy_(a[f"resize{number}_weight"])
                weight, bias, mean, var = (a[f"resize{number}_norm_{part}"] for part in NORM)
                resize.norm.weight.copy_(weight)
                resize.norm.bias.copy_(bias)
                resize.norm.running_mean.copy_(mean)
                resize.norm.running_var.copy_(var)
            else:  # left alone there
                nn.init.dirac_(resize.conv.weight)
                resize.norm.running_var.fill_(1 - 1e-5)
            # 1x1 - BN, then the rows of the joint 1x1 that read this stage: one linear map.
            weight, bias, mean, var = (a[f"weigh{number}_norm_{part}"] for part in NORM)
            scale = weight / (var + 1e-5).sqrt()
            row = a["weight_levels_weight"][number, 2 * number : 2 * number + 2, 0, 0]
            weigh.weight.copy_(((row * scale) @ a[f"weigh{number}_weight"][:, :, 0, 0])[None, :, None, None])
            weigh.bias.copy_((row * (bias - mean * scale)).sum() + a["weight_levels_bias"][number])
    return fusion


@pytest.mark.parametrize("level", range(3))
def test_resizing_weights_and_the_sum(level: int, official: Callable[[str], Arrays]) -> None:
    whole = official("asff")
    a, stages = whole.of(f"level{level}"), [whole[f"stage{number}"] for number in range(3)]
    fusion = ours(a, level)
    with torch.no_grad():
        for number, (resize, stage) in enumerate(zip(fusion.resize, stages, strict=True)):
            torch.testing.assert_close(resize(stage, SHAPES[level][1:]), a[f"resized{number}"], rtol=0, atol=1e-6)
        fused, weights = fusion(stages)
    torch.testing.assert_close(weights, a["weights"], rtol=0, atol=2.2e-15)
    torch.testing.assert_close(fused, a["fused"], rtol=0, atol=1.8e-14)
    assert 0.1 < (fused - a["leaky_fused"]).abs().max() < 4.6


@pytest.mark.parametrize("level", range(3))
def test_known_as_published_it_leaks(level: int, official: Callable[[str], Arrays]) -> None:
    whole = official("asff")
    a, stages = whole.of(f"level{level}"), [whole[f"stage{number}"] for number in range(3)]
    parts = [resized(a, level, number, stage, 0.1) for number, stage in enumerate(stages)]
    for number, part in enumerate(parts):
        if f"leaky_resized{number}" in a:
            torch.testing.assert_close(part, a[f"leaky_resized{number}"], rtol=0, atol=1e-6)
    each = torch.cat([normed(a, f"weigh{number}", part, 0.1) for number, part in enumerate(parts)], 1)
    weights = F.conv2d(each, a["weight_levels_weight"], a["weight_levels_bias"]).softmax(1)
    torch.testing.assert_close(weights, a["leaky_weights"], rtol=0, atol=1e-6)
    fused = sum(weight[:, None] * part for weight, part in zip(weights.unbind(1), parts, strict=True))
    torch.testing.assert_close(fused, a["leaky_fused"], rtol=0, atol=1e-6)


def test_batch_norms_are_of_the_default(official: Callable[[str], Arrays]) -> None:
    assert official("asff").number("norm_eps") == nn.BatchNorm2d(1).eps
