"""ASFF against loops over cells in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fgvc.techniques.multiscale_head.asff import Asff, Resize

WIDTH = 3


def random_map(shape: tuple[int, int, int], batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> nn.Module:
    """The module with random weights: away from their starts, or BN's would not show."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=rng) / 2)
    return module


def pooled(f: list, side: tuple[int, int]) -> tuple[list, tuple[int, int]]:
    """3x3 max-pool, stride 2, padding 1, of one channel."""
    h, w = side
    out = (h + 1) // 2, (w + 1) // 2
    near = range(-1, 2)
    return [
        [
            max(f[2 * i + a][2 * j + b] for a in near for b in near if 0 <= 2 * i + a < h and 0 <= 2 * j + b < w)
            for j in range(out[1])
        ]
        for i in range(out[0])
    ], out


def resized(f: Tensor, module: Resize, halvings: int, size: tuple[int, int]) -> list:
    """[b][channel][i][j] by the formula: pools, conv, BN over the batch, ReLU, the cell below each target cell's middle."""
    images = []
    for channels in f.tolist():
        image = channels
        side = (len(image[0]), len(image[0][0]))
        for _ in range(halvings - 1):
            halved = [pooled(channel, side) for channel in image]
            image, side = [channel for channel, _ in halved], halved[0][1]
        kernel, stride = (3, 2) if halvings else (1, 1)
        pad, weight = kernel // 2, module.conv.weight.tolist()
        out = ((side[0] - 1) // stride + 1, (side[1] - 1) // stride + 1)
        convolved = [[[0.0] * out[1] for _ in range(out[0])] for _ in weight]
        for o, kernels in enumerate(weight):
            for i in range(out[0]):
                for j in range(out[1]):
                    for c, taps in enumerate(kernels):
                        for a in range(kernel):
                            for b in range(kernel):
                                y, x = i * stride + a - pad, j * stride + b - pad
                                if 0 <= y < side[0] and 0 <= x < side[1]:
                                    convolved[o][i][j] += taps[a][b] * image[c][y][x]
        images.append(convolved)
    for o in range(WIDTH):
        cells = [cell for image in images for row in image[o] for cell in row]
        mean = sum(cells) / len(cells)
        scale = math.sqrt(sum((cell - mean) ** 2 for cell in cells) / len(cells) + module.norm.eps)
        gamma, beta = module.norm.weight.tolist()[o], module.norm.bias.tolist()[o]
        for image in images:
            image[o] = [[max(0.0, (cell - mean) / scale * gamma + beta) for cell in row] for row in image[o]]
    h, w = len(images[0][0]), len(images[0][0][0])
    at = [
        [int((i + 0.5) * h / size[0]) for i in range(size[0])],
        [int((j + 0.5) * w / size[1]) for j in range(size[1])],
    ]
    return [[[[channel[i][j] for j in at[1]] for i in at[0]] for channel in image] for image in images]


RULES = {  # the stage's sides, the target's, and how often it is halved, worked out by hand
    "as large": ((4, 4), (4, 4), 0),
    "coarser": ((2, 2), (4, 4), 0),
    "coarser, odd": ((3, 4), (5, 7), 0),
    "finer by 2": ((8, 8), (4, 4), 1),
    "finer by 2, odd": ((7, 13), (4, 7), 1),
    "finer by 2, rounded down": ((7, 7), (3, 3), 1),
    "finer by 4": ((16, 12), (4, 3), 2),
    "finer by 4, odd": ((15, 13), (4, 4), 2),
    "finer by 8": ((16, 24), (2, 3), 3),
    "a little finer": ((5, 5), (4, 4), 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_of_resizing_is_its_loop(rule: str) -> None:
    own, size, halvings = RULES[rule]
    module = randomised(Resize((2, *own), (5, *size), WIDTH))
    assert module.halvings == halvings
    assert module.conv.kernel_size == ((3, 3) if halvings else (1, 1))
    f = random_map((2, *own))
    output = module(f, size)
    assert output.shape == (2, WIDTH, *size)
    torch.testing.assert_close(output, torch.tensor(resized(f, module, halvings, size), dtype=torch.float64))


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shapes", [[(2, 8, 8), (4, 4, 4), (5, 2, 2)], [(2, 9, 13), (4, 5, 7), (5, 3, 4)]])
def test_the_fusion_is_its_loop(shapes: list, level: int) -> None:
    module = randomised(Asff(shapes, level=level, width=WIDTH))
    maps = [random_map(shape, seed=number) for number, shape in enumerate(shapes)]
    fused, weights = module(maps)
    h, w = shapes[level][1:]
    assert weights.shape == (2, 3, h, w)
    parts = [resized(f, r, r.halvings, (h, w)) for f, r in zip(maps, module.resize, strict=True)]
    for b in range(2):
        for i in range(h):
            for j in range(w):
                cells = [[part[b][c][i][j] for c in range(WIDTH)] for part in parts]
                scores = [
                    sum(k * v for k, v in zip(weigh.weight.flatten().tolist(), cell, strict=True)) + weigh.bias.item()
                    for weigh, cell in zip(module.weigh, cells, strict=True)
                ]
                total = sum(map(math.exp, scores))
                shares = [math.exp(score) / total for score in scores]
                assert weights[b, :, i, j].tolist() == pytest.approx(shares)
                assert float(weights[b, :, i, j].sum().detach()) == pytest.approx(1)
                expected = [
                    sum(share * cell[c] for share, cell in zip(shares, cells, strict=True)) for c in range(WIDTH)
                ]
                assert fused[b, :, i, j].tolist() == pytest.approx(expected)


def test_every_stage_gets_a_gradient() -> None:
    shapes = [(2, 9, 13), (4, 5, 7), (5, 3, 4)]
    module = randomised(Asff(shapes, level=1, width=WIDTH))
    maps = [random_map(shape).requires_grad_() for shape in shapes]
    fused, _ = module(maps)
    (fused * random_map((WIDTH, 5, 7), seed=5)).sum().backward()
    assert all(f.grad.abs().max() > 0 for f in maps)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_images_of_another_size_than_planned_are_fused_all_the_same() -> None:
    module = randomised(Asff([(2, 8, 8), (4, 4, 4), (5, 2, 2)], level=1, width=WIDTH))
    fused, weights = module([random_map((2, 11, 6)), random_map((4, 6, 3)), random_map((5, 3, 2))])
    assert fused.shape == (2, WIDTH, 6, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 6, 3, dtype=torch.float64))
