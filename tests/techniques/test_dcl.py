"""DCL's heads and views against their formulas, written here with loops and in float64."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.dcl.jigsaw import cut
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique

SIZE, CLASSES, GRID = (32, 32), 5, 4


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs).double()


def batch(size: int = 4) -> Batch:
    x = torch.randn(size, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(size) % CLASSES
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def run_step(settings: dict, progress: float = 0.0, **others: object) -> tuple[StepModule, dict, list, Draws]:
    techniques = {kind: build_technique(config) for kind, config in others.items()}
    techniques["dcl"] = build_technique(DclSettings(grid=GRID, **settings))
    step = StepModule(net(), techniques, size=SIZE).double()
    step.train()
    rng = np.random.default_rng(3)
    draws = Draws(progress, {kind: draw(rng, batch()) for kind, draw in step.hooks("draw")})
    losses, views = step(batch(), draws)
    return step, losses, views, draws


def test_the_jigsaw_is_of_the_clean_image_even_when_the_image_is_mixed() -> None:
    _, _, views, draws = run_step({}, mixup=MixupSettings(alpha=1.0))
    assert [view.name for view in views] == ["main", "dcl.destroyed"]
    assert not torch.equal(views[0].x, batch().x)
    assert torch.equal(views[1].x, cut(batch().x, draws.of["dcl"]))
    assert views[1].target[0][0].tolist() == batch().labels.tolist()


@pytest.mark.parametrize("head", ["2-way", "2K-way"])
@pytest.mark.parametrize("bn", ["shared", "own"])
def test_losses_are_their_formulas(head: str, bn: str) -> None:
    step, losses, views, draws = run_step({"head": head, "bn": bn, "classify": 0.5, "destroyed": 0.7, "location": 0.3})
    twin = net().train()
    if bn == "shared":
        both = twin.forward_features(torch.cat([views[0].x, views[1].x])).split(4)
    else:
        both = [twin.forward_features(view.x) for view in views]
    y, branch = batch().labels, step.branches["dcl"]
    ce = [F.cross_entropy(twin.forward_head(f), y) for f in both]
    base = (ce[0] + 0.5 * ce[1]) / 1.5
    destroyed, error, chance, right = 0.0, 0.0, 0.0, 0
    for copy, features in enumerate(both):
        for b in range(4):
            z = branch["destroyed"](features[b].mean((1, 2)))
            answer = copy if head == "2-way" else int(y[b]) + copy * CLASSES
            destroyed += -torch.log_softmax(z, 0)[answer] / 8
            guess = int(z.argmax())
            right += (guess == copy) if head == "2-way" else (guess // CLASSES == copy)
            cells = F.adaptive_avg_pool2d(features[b], GRID)
            for i in range(GRID):
                for j in range(GRID):
                    kernel, bias = branch["location"].weight[:, :, 0, 0], branch["location"].bias
                    position = kernel @ cells[:, i, j] + bias
                    source = int(draws.of["dcl"][b, i * GRID + j]) if copy else i * GRID + j
                    place = torch.tensor([(source // GRID + 0.5) / GRID, (source % GRID + 0.5) / GRID])
                    here = torch.tensor([(i + 0.5) / GRID, (j + 0.5) / GRID])
                    error += (position - place).abs().sum() / (8 * GRID * GRID * 2)
                    chance += float((place - here).abs().sum()) / (8 * GRID * GRID * 2)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(losses["base"].double(), base, **close)
    torch.testing.assert_close(losses["dcl.destroyed"].double(), destroyed, **close)
    torch.testing.assert_close(losses["dcl.location"].double(), error, **close)
    torch.testing.assert_close(losses["loss"].double(), base + 0.7 * destroyed + 0.3 * error, **close)
    assert float(losses["dcl.location_chance"]) == pytest.approx(chance, rel=1e-5)
    assert float(losses["dcl.destroyed_accuracy"]) == pytest.approx(right / 8)


def test_classes_of_a_mixed_image_share_the_2k_ways() -> None:
    step, losses, views, _ = run_step({"head": "2K-way", "bn": "own"}, mixup=MixupSettings(alpha=1.0))
    (y, w), (other, v) = views[0].target
    features = net().train().forward_features(views[0].x)
    z = torch.log_softmax(step.branches["dcl"]["destroyed"](features.mean((2, 3))), 1)
    rows = torch.arange(4)
    original = -(w * z[rows, y] + v * z[rows, other]).mean()
    torch.manual_seed(0)
    clean = net().train().forward_features(views[1].x)
    d = torch.log_softmax(step.branches["dcl"]["destroyed"](clean.mean((2, 3))), 1)
    destroyed = -d[rows, batch().labels + CLASSES].mean()
    torch.testing.assert_close(losses["dcl.destroyed"].double(), (original + destroyed) / 2, rtol=1e-5, atol=1e-6)


def test_the_heads_see_through_the_jigsaw_and_the_net_alone_classifies() -> None:
    step = StepModule(net(), {"dcl": build_technique(DclSettings(grid=2, bn="own"))}, size=(64, 64)).float().train()
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    large = Batch(**{name: getattr(batch(), name) for name in Batch.__slots__} | {"x": x, "x_clean": x})
    draws = Draws(0.0, {kind: draw(np.random.default_rng(3), large) for kind, draw in step.hooks("draw")})
    optimizer = torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        losses, _ = step(large, draws)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert float(losses["dcl.destroyed_accuracy"]) == 1.0
    assert float(losses["dcl.location"].detach()) < 0.15, "a constant answer errs by 0.25"
    assert sorted(step.net.state_dict()) == sorted(net().state_dict())


def test_weights_follow_their_schedule_and_no_view_is_built_for_nothing() -> None:
    later = [[0.5, 0], [1, 1]]
    _, losses, views, _ = run_step({"classify": later, "destroyed": later, "location": later})
    assert [view.name for view in views] == ["main"]
    assert set(losses) == {"base", "loss"}
    _, losses, views, _ = run_step({"classify": later, "destroyed": 0, "location": later}, progress=0.75)
    assert views[1].weight == 0.5
    assert "dcl.destroyed" not in losses
    torch.testing.assert_close(losses["loss"], losses["base"] + 0.5 * losses["dcl.location"])
    _, _, views, _ = run_step({"classify": 0})
    assert (views[1].classifies, views[1].weight) == (False, 1.0)


def test_a_grid_that_does_not_fit_is_refused_by_name_and_a_coarse_map_is_told() -> None:
    with pytest.raises(FgvcError, match=r"techniques\.dcl\.grid: 32 patches a side do not fit into 24 pixels"):
        StepModule(net(), {"dcl": build_technique(DclSettings(grid=32))}, size=(24, 40))
    step = StepModule(net(), {"dcl": build_technique(DclSettings(grid=7))}, size=SIZE)
    assert any("coarser than the grid of 7 x 7" in note for note in step.attachments.notes)
