"""Mixing techniques in a step: pixels, exact shares, one of them at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.techniques import settings_by_kind
from fgvc.models.backbone import plain_model
from fgvc.runs.step import StepModule, _pick_by_share
from fgvc.techniques.api import Batch, Draws, Technique
from fgvc.techniques.mosaic.settings import MosaicSettings
from fgvc.techniques.registry import build_technique
from fgvc.techniques.snapmix.settings import SnapmixSettings
from fgvc.techniques.snapmix.technique import semantic

SIZE = (24, 32)
MIXING = ("mixup", "cutmix", "snapmix", "saliencymix", "mosaic")


def batch(count: int = 6, seed: int = 0) -> Batch:
    x = torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 3
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(count, 2, 3))


class Spy(Technique):
    """A technique that keeps the batch that the others made."""

    source = forwards = leaves = "nothing"

    def on_batch(self, batch: Batch, ctx: object) -> Batch:
        self.batch = batch
        return batch


class Pooled(nn.Module):
    """relu(conv) with stride 8, global pooling, one linear layer; a batch norm in between."""

    num_classes, num_features = 3, 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def mixed(kind: str, data: Batch, seed: int = 0, **settings: object) -> tuple[Batch, object]:
    """The batch after one technique, and what it drew."""
    spy = Spy()
    step = StepModule(Pooled(), {kind: build_technique(settings_by_kind()[kind](**settings)), "spy": spy}, size=SIZE).train()
    draws = step.draw(data, 0.0, seed=seed, step=0)
    step(data, draws)
    return spy.batch, draws.of.get(kind)


def weights(data: Batch) -> Tensor:
    return torch.stack([w for _, w in data.target])


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("kind", MIXING)
def test_the_step_sees_other_images_and_the_clean_ones_stay(kind: str, per: str) -> None:
    data = batch()
    before = data.x.clone()
    changed, _ = mixed(kind, data, per=per)
    assert torch.equal(data.x, before), "in place of nothing"
    assert torch.equal(changed.x_clean, before)
    assert not torch.equal(changed.x, before)
    assert changed.x.shape == before.shape
    assert changed.x.isfinite().all()
    assert torch.equal(changed.labels, data.labels)
    assert (weights(changed) >= 0).all()
    if kind != "snapmix":
        torch.testing.assert_close(weights(changed).sum(0), torch.ones(6))
    alike = (weights(changed) - weights(changed)[:, :1]).abs().max() < 1e-6
    assert bool(alike) == (per == "batch" and kind not in ("snapmix", "saliencymix")), "theirs differ by image"


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("kind", ["cutmix", "saliencymix"])
def test_a_box_is_the_partners_and_labels_are_its_exact_area(kind: str, per: str) -> None:
    for seed in range(5):
        data = batch(seed=seed)
        changed, (_, order) = mixed(kind, data, seed=seed, per=per)
        theirs = (changed.x == data.x[order]).all(1) & (changed.x != data.x).any(1)
        own = (changed.x == data.x).all(1)
        assert (theirs | own).all(), "every pixel is whole, of the one or of the other"
        for b in range(6):
            if int(order[b]) == b:
                continue
            rows, columns = theirs[b].any(1).nonzero().flatten(), theirs[b].any(0).nonzero().flatten()
            assert int(theirs[b].sum()) == len(rows) * len(columns), "a box"
            assert float(changed.target[1][1][b]) == pytest.approx(int(theirs[b].sum()) / (SIZE[0] * SIZE[1]), abs=1e-6)
        assert torch.equal(changed.target[1][0], data.labels[order])


def test_cutmix_keeps_about_two_thirds_of_an_image_after_clipping() -> None:
    """Shares of 0.5 on average as drawn, 0.68 of the own image after the edges have cut the boxes."""
    data, technique = batch(), build_technique(settings_by_kind()["cutmix"]())
    shares = []
    for seed in range(4000):
        box, _ = technique.draw(np.random.default_rng(seed), data)
        left, top, right, bottom = box[0].tolist()
        shares.append(1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1]))
    assert np.mean(shares) == pytest.approx(0.68, abs=0.02)


def test_saliencymix_takes_the_spot_of_each_partner() -> None:
    data = batch(4)
    data.x = data.x_clean = torch.zeros(4, 3, *SIZE)
    spots = [(2, 2), (20, 28), (10, 14), (2, 28)]
    for b, (i, j) in enumerate(spots):
        data.x[b, :, i - 2 : i + 2, j - 2 : j + 2] = b + 1
    technique = build_technique(settings_by_kind()["saliencymix"]())
    step = StepModule(Pooled(), {"saliencymix": technique, "spy": (spy := Spy())}, size=SIZE)
    order = torch.tensor([1, 2, 3, 0])
    step.train()(data, Draws(0.0, {"saliencymix": (torch.tensor([[8, 8]]), order)}))
    for b in range(4):
        i, j = spots[order[b]]
        assert (spy.batch.x[b, :, i - 2 : i + 2, j - 2 : j + 2] == order[b] + 1).all()


def test_snapmix_is_its_formula() -> None:
    data = batch()
    net = Pooled()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.running_var.uniform_(0.5, 2)
    net.eval()
    f = net.forward_features(data.x).detach().double()
    maps = torch.einsum("bchw,bc->bhw", f, net.fc.weight.detach().double()[data.labels])
    large = F.interpolate(maps[:, None], SIZE, mode="bilinear", align_corners=False)[:, 0]
    step = StepModule(net, {"snapmix": build_technique(SnapmixSettings()), "spy": (spy := Spy())}, size=SIZE).train()
    before = net.norm.running_mean.clone()
    to, of, order = torch.tensor([[3, 2, 20, 14]]), torch.tensor([[1, 8, 9, 24]]), torch.tensor([3, 0, 5, 1, 2, 4])
    draws = Draws(0.0, {"snapmix": (to, of, order)})
    step(data, draws)
    own, theirs = weights(spy.batch)
    for b in range(6):
        a, other = (m - m.min() for m in (large[b], large[order[b]]))
        a, other = a / a.sum(), other / other.sum()
        assert float(own[b]) == pytest.approx(1 - float(a[2:14, 3:20].sum()), abs=1e-5)
        assert float(theirs[b]) == pytest.approx(float(other[8:24, 1:9].sum()), abs=1e-5)
    assert not torch.allclose(own + theirs, torch.ones(6), atol=1e-3), "they need not add up to one"
    once = 0.9 * before + 0.1 * net.conv(spy.batch.x).mean((0, 2, 3))
    torch.testing.assert_close(net.norm.running_mean, once.detach()), "the eval pass leaves the statistics alone"


def test_a_map_that_says_nothing_counts_by_area() -> None:
    maps = torch.stack([torch.ones(3, 3), torch.full((3, 3), float("nan")), torch.eye(3)])
    shares = semantic(maps, (6, 9))
    torch.testing.assert_close(shares[:2], torch.full((2, 6, 9), 1 / 54))
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(3))
    assert shares[2].max() > 1 / 54


@pytest.mark.parametrize("style", ["cells", "canvas"])
def test_mosaic_has_four_labels_and_ends_before_the_run_does(style: str) -> None:
    changed, draws = mixed("mosaic", batch(), style=style)
    assert len(changed.target) == 4
    for (y, _), order in zip(changed.target[1:], draws["orders"], strict=True):
        assert torch.equal(y, batch().labels[order])
    technique = build_technique(MosaicSettings(until=0.75, probability=[[0, 1], [0.5, 0.5]]))
    assert [technique.mixes(progress) for progress in (0, 0.5, 0.74, 0.75, 1)] == [1, 0.5, 0.5, 0, 0]


def test_one_of_those_that_mix_is_drawn_by_its_share() -> None:
    assert [_pick_by_share({"a": 0.25, "b": 0.5}, u) for u in (0, 0.249, 0.25, 0.749, 0.75, 0.999)] == [
        "a",
        "a",
        "b",
        "b",
        None,
        None,
    ]
    assert [_pick_by_share({"a": 1, "b": 3}, u) for u in (0, 0.249, 0.251, 0.999)] == ["a", "a", "b", "b"]
    assert _pick_by_share({}, 0.0) is None
    assert _pick_by_share({"a": 0.0}, 0.0) is None
    shares = zip(MIXING, (0.1, 0.2, 0.3, 0.2, 0.1), strict=True)
    techniques = {kind: build_technique(settings_by_kind()[kind](probability=p)) for kind, p in shares}
    step, data, counts = StepModule(Pooled(), techniques, size=SIZE), batch(), Counter()
    for number in range(1500):
        first, second = (step.draw(data, 0.0, seed=1, step=number, micro_batch=p, rank=p) for p in (0, 1))
        assert len(first.of) <= 1
        assert first.of.keys() == second.of.keys(), "all parts and ranks mix alike"
        counts[next(iter(first.of), None)] += 1
    expected = {"mixup": 150, "cutmix": 300, "snapmix": 450, "saliencymix": 300, "mosaic": 150, None: 150}
    chi2 = sum((counts[kind] - n) ** 2 / n for kind, n in expected.items())
    assert chi2 < 20.5, "0.1 % bound of 5 degrees of freedom"


def test_an_eval_pass_is_made_once_and_only_in_steps_that_ask_for_it() -> None:
    net = plain_model("test_resnet", 3)
    step = StepModule(net, {"snapmix": build_technique(SnapmixSettings())}, size=(64, 64)).train()
    passed, inner = [], net.forward_features
    net.forward_features = lambda x: passed.append(net.training) or inner(x)
    data = batch()
    data.x = data.x_clean = torch.randn(6, 3, 64, 64)
    step(data, Draws(0.0))
    assert passed == [True]
    passed.clear()
    step(data, step.draw(data, 0.0, seed=0, step=0))
    assert passed == [False, True]


@pytest.mark.parametrize("split", [(0.001, 0.001), (0.999, 0.9999)])
def test_every_part_of_a_mosaic_has_a_pixel(split: tuple[float, float]) -> None:
    changed, _ = mixed("mosaic", batch(), split=split)
    assert (weights(changed) > 0).all()
    torch.testing.assert_close(weights(changed).sum(0), torch.ones(6))
