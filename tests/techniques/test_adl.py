"""ADL's gate against a loop over cells, in every layout, and when it stays away."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.adl.settings import AdlSettings
from fgvc.techniques.adl.technique import Adl
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.plan import Context, context_of
from fgvc.techniques.registry import build_technique

CLASSES, SIZE = 3, (64, 64)
SWIN = {"window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
NETS = {
    "NCHW": ("test_resnet", {}),
    "NHWC": ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}),
    "tokens": ("test_vit", {"img_size": 64}),
}


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def batch(size: int = 4) -> Batch:
    x = torch.randn(size, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(size) % CLASSES
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def build(model: nn.Module | None = None, **settings: object) -> tuple[StepModule, Adl]:
    technique = build_technique(AdlSettings(**settings))
    return StepModule(model or net(), {"adl": technique}, size=SIZE), technique


def context(step: StepModule, draw: Tensor, progress: float = 0.0) -> Context:
    return context_of("adl", step.attachments, Draws(progress, {"adl": draw}), {})


def expected(cells: Tensor, drops: list[bool], gamma: float = 0.9) -> Tensor:
    """(B,h,w) weights of the cells (B,h,w,C), by the formula and in float64."""
    weights = torch.zeros(cells.shape[:3], dtype=torch.float64)
    for b in range(cells.shape[0]):
        mean = [[sum(cell.tolist()) / len(cell) for cell in row] for row in cells[b].double()]
        highest = max(map(max, mean))
        for i, row in enumerate(mean):
            for j, a in enumerate(row):
                weights[b, i, j] = float(a < gamma * highest) if drops[b] else 1 / (1 + math.exp(-a))
    return weights


@pytest.mark.parametrize("layout", NETS)
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_the_gate_is_its_formula(layout: str, per: str) -> None:
    name, kwargs = NETS[layout]
    step, technique = build(net(name, **kwargs), stages=(-2,), drop_rate=0.5, per=per, threshold=0.8)
    rng = torch.Generator().manual_seed(2)
    cells = torch.rand(3, 2, 4, 6, generator=rng)
    if layout == "tokens":  # a class token comes before the 16 patches of 64 x 64 pixels
        cells = torch.rand(3, 4, 4, 6, generator=rng)
        first = torch.rand(3, 1, 6, generator=rng)
    f = {"NCHW": cells.movedim(3, 1), "NHWC": cells}.get(layout)
    f = torch.cat([first, cells.flatten(1, 2)], dim=1) if f is None else f
    step.net.num_features = 6
    draw = torch.tensor([[0.4]] if per == "batch" else [[0.4, 0.9, 0.49]])
    weights = expected(cells, [True] * 3 if per == "batch" else [True, False, True], 0.8)[..., None]
    out = technique._gate(0, f, context(step, draw))
    if layout == "tokens":
        assert torch.equal(out[:, :1], first)
        out = out[:, 1:].unflatten(1, (4, 4))
    elif layout == "NCHW":
        out = out.movedim(1, 3)
    torch.testing.assert_close(out.double(), cells * weights, rtol=1e-5, atol=1e-6)
    assert 0 < float((weights == 0).float().mean()) < 1


@pytest.mark.parametrize(("rate", "drops"), [(0.0, False), (1.0, True)])
def test_a_rate_of_0_weights_and_of_1_drops(rate: float, drops: bool) -> None:
    step, technique = build(drop_rate=rate)
    f = torch.rand(4, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        draw = technique.draw(np.random.default_rng(seed), batch())
        out = technique._gate(0, f, context(step, draw))
        weights = expected(f.movedim(1, 3), [drops] * 4)
        torch.testing.assert_close(out.double(), f * weights[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 2.0, -1.0], ids=["zero", "flat", "negative"])
def test_where_no_part_is_attended_to_nothing_is_dropped(value: float) -> None:
    step, technique = build(drop_rate=1.0)
    f = torch.full((2, 4, 3, 3), value)
    f[1] = torch.rand(4, 3, 3)  # one sample says nothing of the other
    out = technique._gate(0, f, context(step, torch.zeros(1, 1)))
    assert torch.equal(out[0], f[0])
    assert (out[1] == 0).any()
    signed = torch.tensor([[[[-1.0, -2], [-3, -4]]]])
    assert torch.equal(technique._gate(0, signed, context(step, torch.zeros(1, 1))), signed)


def test_by_hand_what_is_dropped() -> None:
    step, technique = build(drop_rate=1.0, threshold=0.5)
    f = torch.tensor([[[[4.0, 2.0, 1.9], [0.0, -3.0, 3.0]]]])
    out = technique._gate(0, f, context(step, torch.zeros(1, 1)))
    assert out.tolist() == [[[[0.0, 0.0, pytest.approx(1.9)], [0.0, -3.0, 0.0]]]]


def test_the_attention_itself_has_a_gradient_and_the_mask_none() -> None:
    step, technique = build(drop_rate=0.5, per="sample")
    f = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    technique._gate(0, f, context(step, torch.tensor([[0.9, 0.1]]))).sum().backward()
    weighted, dropped = f.detach().double()
    a = weighted.mean(0).requires_grad_()
    (3 * a * a.sigmoid()).sum().backward()  # sum_c f_c sigmoid(a)
    torch.testing.assert_close(f.grad[0].double(), (a.grad / 3).expand(3, -1, -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(f.grad[1].double(), expected(dropped.movedim(0, 2)[None], [True]).expand(3, -1, -1))


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_views_of_one_forward_share_the_draws(per: str) -> None:
    step, technique = build(drop_rate=0.5, per=per)
    draw = technique.draw(np.random.default_rng(1), batch())
    assert draw.shape == (1, 1 if per == "batch" else 4)
    f = torch.rand(4, 5, 3, 3)
    both = technique._gate(0, torch.cat([f, f]), context(step, draw))
    assert torch.equal(both[:4], both[4:])


def test_draws_are_uniform_and_every_stage_has_its_own() -> None:
    technique = build_technique(AdlSettings(stages=(1, "features"), per="sample"))
    draw = technique.draw(np.random.default_rng(0), SimpleNamespace(labels=torch.zeros(4000)))
    assert draw.shape == (2, 4000)
    for row in draw:
        spread = np.abs(np.sort(row.numpy()) - np.arange(4000) / 4000).max()
        assert spread < 1.95 / math.sqrt(4000)
    assert abs(float(np.corrcoef(draw.numpy())[0, 1])) < 0.06


def test_rate_and_threshold_follow_their_schedules() -> None:
    knots = ((0.0, 0.0), (1.0, 1.0))
    step, technique = build(drop_rate=knots, threshold=((0.0, 0.5), (1.0, 1.0)))
    f = torch.rand(1, 5, 4, 4, generator=torch.Generator().manual_seed(3))
    for progress, drops, gamma in ((0.0, False, 0.5), (0.5, False, 0.75), (0.7, True, 0.85), (1.0, True, 1.0)):
        out = technique._gate(0, f, context(step, torch.tensor([[0.6]]), progress))
        weights = expected(f.movedim(1, 3), [drops], gamma)
        torch.testing.assert_close(out.double(), f * weights[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", ["features", -2])
def test_the_step_trains_through_the_gate_and_evaluation_does_not(stage: int | str) -> None:
    step, technique = build(stages=(stage,), drop_rate=1.0)
    name = step.attachments.gates[0][1]
    step.attach_hooks()
    losses, _ = step.train()(batch(), Draws(0.0, {"adl": torch.zeros(1, 1)}))
    twin = net().train()
    change = lambda f: f * expected(f.detach().movedim(1, 3), [True] * 4)[:, None].float()  # noqa: E731
    if stage != "features":
        twin.get_submodule(name).register_forward_hook(lambda _m, _x, f: change(f))
    f = twin.forward_features(batch().x)
    z = twin.forward_head(change(f) if stage == "features" else f)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(z, batch().labels))
    step.eval()
    plain = net().eval()
    plain.load_state_dict(step.net.state_dict())
    with torch.no_grad():
        assert torch.equal(step.net(batch().x), plain(batch().x))
        losses, _ = step(batch(), Draws(0.0, {"adl": torch.zeros(1, 1)}))
        assert torch.equal(losses["loss"], F.cross_entropy(plain(batch().x), batch().labels))
    assert technique.config.stages == (stage,)


def test_features_that_can_be_negative_are_a_warning() -> None:
    assert not build(stages=("features", -2))[0].attachments.notes, "they follow a ReLU"
    for name, kwargs, stages in (
        ("test_convnext", {}, ("features",)),
        ("test_efficientnet", {}, (-1,)),
        ("test_vit", {"img_size": 64, "global_pool": "avg"}, ("features",)),
    ):
        (note,) = build(net(name, **kwargs), stages=stages)[0].attachments.notes
        assert note.startswith("adl: WARNING: ")
        assert "can be negative" in note


def test_a_head_that_reads_the_class_token_alone_refuses_features_but_not_blocks() -> None:
    with pytest.raises(FgvcError, match=r"techniques\.adl: .*class token alone"):
        build(net("test_vit", img_size=64))
    step, _ = build(net("test_vit", img_size=64), stages=(-2,))
    assert [name for _, name, _ in step.attachments.gates] == ["blocks.4"]
    with pytest.raises(FgvcError, match=r"techniques\.adl: stage 9: this backbone has 5 stages"):
        build(stages=(9,))


def test_the_last_block_of_a_class_token_vit_is_refused() -> None:
    with pytest.raises(FgvcError, match=r"techniques\.adl"):
        build(net("test_vit", img_size=64), stages=(-1,))
