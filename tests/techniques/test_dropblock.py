"""DropBlock's squares: whole, as often as they should, and rescaled."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.dropblock.settings import DropblockSettings
from fgvc.techniques.dropblock.technique import Dropblock
from fgvc.techniques.plan import context_of
from fgvc.techniques.registry import build_technique

SIZE = (64, 64)


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs)


def build(model: nn.Module | None = None, **settings: object) -> tuple[StepModule, Dropblock]:
    technique = build_technique(DropblockSettings(**settings))
    return StepModule(model or net(), {"dropblock": technique}, size=SIZE), technique


def gated(f: Tensor, *, draw: int = 1, progress: float = 0.0, **settings: object) -> Tensor:
    step, technique = build(**settings)
    return technique._gate(0, f, context_of("dropblock", step.attachments, Draws(progress, {"dropblock": [draw]}), {}))


def in_whole_squares(dropped: np.ndarray, block: int) -> bool:
    """Whether every dropped cell (h,w) lies in a square of dropped cells."""
    covered = np.zeros_like(dropped)
    for i in range(dropped.shape[0] - block + 1):
        for j in range(dropped.shape[1] - block + 1):
            if dropped[i : i + block, j : j + block].all():
                covered[i : i + block, j : j + block] = True
    return bool((covered == dropped).all())


def dropped_share(side: tuple[int, int], block: int, rate: float) -> float:
    """Expected share of dropped cells: a cell stays if no corner of a square that would cover it was drawn."""
    h, w = side
    gamma = rate / block**2 * h * w / ((h - block + 1) * (w - block + 1))
    total = 0.0
    for i in range(h):
        for j in range(w):
            down = sum(i - block < corner <= i for corner in range(h - block + 1))
            across = sum(j - block < corner <= j for corner in range(w - block + 1))
            total += 1 - (1 - gamma) ** (down * across)
    return total / (h * w)


@pytest.mark.parametrize("block", [1, 3, 5])
def test_only_whole_squares_go_and_all_channels_with_them(block: int) -> None:
    out = gated(torch.ones(50, 4, 10, 12), rate=0.2, block=block).numpy()
    dropped = out[:, 0] == 0
    assert ((out == 0) == dropped[:, None]).all()
    assert 0 < dropped.mean() < 1
    assert all(in_whole_squares(mask, block) for mask in dropped)
    if block > 1:
        assert not all(in_whole_squares(mask, block + 1) for mask in dropped)


@pytest.mark.parametrize(("block", "side"), [(1, (8, 8)), (3, (14, 14)), (4, (12, 20)), (7, (14, 14))])
def test_the_dropped_share_is_as_expected(block: int, side: tuple[int, int]) -> None:
    rate, count = 0.05, 2000
    dropped = (gated(torch.ones(count, 1, *side), rate=rate, block=block) == 0).double().mean((1, 2, 3))
    share = dropped_share(side, block, rate)
    error = float(dropped.std()) / count**0.5
    assert abs(float(dropped.mean()) - share) < 4 * error
    assert share == pytest.approx(rate, rel=0.06), "about the rate where it is small"


def test_a_constant_map_keeps_its_sum() -> None:
    f = torch.full((6, 3, 9, 7), 2.0)
    out = gated(f, rate=0.3, block=3)
    assert (out == 0).any()
    torch.testing.assert_close(out.sum(), f.sum())
    assert len(out.unique()) == 2, "one factor for the whole batch"


def test_a_rate_of_0_is_the_identity_and_rates_follow_their_schedule() -> None:
    f = torch.rand(8, 3, 8, 8)
    assert torch.equal(gated(f, rate=0.0), f)
    ramp = ((0.0, 0.0), (1.0, 0.4))
    assert torch.equal(gated(f, rate=ramp), f)
    shares = [float((gated(f, rate=ramp, block=2, progress=p) == 0).float().mean()) for p in (0.25, 0.5, 1.0)]
    assert 0 < shares[0] < shares[1] < shares[2]
    assert torch.equal(gated(f, rate=ramp, block=2, progress=0.5), gated(f, rate=0.2, block=2))


@pytest.mark.parametrize(("side", "block"), [((4, 4), 2), ((6, 4), 2), ((7, 9), 3), ((1, 1), 1), ((1, 5), 1)])
def test_a_square_is_at_most_half_of_the_map(side: tuple[int, int], block: int) -> None:
    f = torch.ones(400, 2, *side)
    assert torch.equal(gated(f, rate=0.3, block=7), gated(f, rate=0.3, block=block))
    out = gated(f, rate=0.1, block=7)
    assert torch.isfinite(out).all()
    assert all(in_whole_squares(mask, block) for mask in (out[:, 0] == 0).numpy())
    share = float((out == 0).float().mean())
    assert share == pytest.approx(dropped_share(side, block, 0.1), abs=0.05)


def test_the_same_draw_gives_the_same_mask_and_another_another() -> None:
    f = torch.ones(4, 2, 8, 8)
    settings = {"rate": 0.3, "block": 2}
    assert torch.equal(gated(f, draw=7, **settings), gated(f, draw=7, **settings))
    assert not torch.equal(gated(f, draw=7, **settings), gated(f, draw=8, **settings))
    _, technique = build(stages=(-2, "features"))
    batch = SimpleNamespace(labels=torch.zeros(4))
    first, again, other = (technique.draw(np.random.default_rng(seed), batch) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 2, "every stage has a seed of its own"


def test_tokens_and_channels_last_lose_the_same_cells() -> None:
    f = torch.rand(3, 6, 4, 4) + 1
    expected = gated(f, rate=0.4, block=2)
    step, technique = build(net("test_vit", img_size=64), stages=(-2,), rate=0.4, block=2)
    context = context_of("dropblock", step.attachments, Draws(0.0, {"dropblock": [1]}), {})
    first = torch.rand(3, 1, 6)
    tokens = technique._gate(0, torch.cat([first, f.flatten(2).transpose(1, 2)], 1), context)
    assert torch.equal(tokens[:, :1], first)
    assert torch.equal(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), expected)


def test_the_step_trains_through_the_mask_and_evaluation_does_not() -> None:
    x = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(4) % 3
    batch = Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(4, 2, 3))
    step, _ = build(stages=(-2,), rate=0.3, block=2)
    step.attach_hooks()
    step.train()
    draws = step.draw(batch, 0.0, seed=0, step=0)
    losses, _ = step(batch, draws)
    mask = gated(torch.ones(4, 1, 4, 4), rate=0.3, block=2, draw=draws.of["dropblock"][0])
    assert (mask == 0).any()
    twin = net().train()
    twin.get_submodule(step.attachments.gates[0][1]).register_forward_hook(lambda _m, _x, f: f * mask)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(twin(x), y))
    step.eval()
    plain = net().eval()
    plain.load_state_dict(step.net.state_dict())
    with torch.no_grad():
        assert torch.equal(step.net(x), plain(x))
