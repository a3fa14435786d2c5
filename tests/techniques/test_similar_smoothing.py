"""Smoothing by similarity against the smoothed cross-entropy itself, and its means against loops, in float64."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.models.loss import Criterion
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique
from fgvc.techniques.similar_smoothing.settings import SimilarSmoothingSettings
from fgvc.techniques.similar_smoothing.technique import Means

CLASSES, SIZE = 5, (64, 64)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # losses are taken in float32


def net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=CLASSES).double()


def batch(labels: list[int], seed: int = 1) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(len(labels), 3, *SIZE, dtype=torch.float64, generator=rng), torch.tensor(labels)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(len(y), 2, 3))


def build(more: dict | None = None, smoothing: float = 0.0, **settings: object) -> StepModule:
    techniques = (more or {}) | {"similar_smoothing": build_technique(SimilarSmoothingSettings(**settings))}
    criterion = Criterion(label_smoothing=smoothing)
    return StepModule(net(), techniques, size=SIZE, criterion=criterion).double().train()


def means_of(step: StepModule) -> Means:
    return step.branches["similar_smoothing"]["means"]


def after(step: StepModule) -> Means:
    for kind, hook in step.hooks("after_step"):
        hook(step.contexts[kind])
    return means_of(step)


def shares(means: Tensor, initialised: list[bool], y: int, temperature: float) -> list[float]:
    """S[y]: even for classes not initialised, and for all where y is not; the rest by similarity."""
    others = [k for k in range(len(initialised)) if k != y]
    smoothing = [0.0 if k == y else 1 / len(others) for k in range(len(initialised))]
    similar = [k for k in others if initialised[k] and initialised[y]]
    cosine = {k: float(F.cosine_similarity(means[y], means[k], dim=0)) for k in similar}
    whole = sum(math.exp(value / temperature) for value in cosine.values())
    for k in similar:
        smoothing[k] = len(similar) / len(others) * math.exp(cosine[k] / temperature) / whole
    return smoothing


@pytest.mark.parametrize("initialised", [[True] * 5, [True, True, False, True, False], [False] * 5, [True] + [False] * 4])
def test_shares_are_their_formula_and_sum_to_one(initialised: list[bool]) -> None:
    means = Means(CLASSES, 7)
    means.values.copy_(torch.randn(CLASSES, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor(initialised)[:, None])
    means.initialised.copy_(torch.tensor(initialised))
    shares_ = means.similar(torch.arange(CLASSES), 0.3)
    expected = [shares(means.values.double(), initialised, y, 0.3) for y in range(CLASSES)]
    torch.testing.assert_close(shares_.double(), torch.tensor(expected, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(shares_.sum(1), torch.ones(CLASSES))
    assert not shares_.diagonal().any()


def test_by_hand_two_like_classes_share_and_a_high_temperature_makes_it_even() -> None:
    means = Means(4, 2)
    means.values.copy_(torch.tensor([[1.0, 0], [2, 0], [0, 5], [0, 0]]))
    means.initialised.copy_(torch.tensor([True, True, True, False]))
    cold, warm = means.similar(torch.tensor([0, 3]), 1e-2), means.similar(torch.tensor([0]), 1e6)
    torch.testing.assert_close(cold, torch.tensor([[0, 2 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 0]]))
    torch.testing.assert_close(warm, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3]]), **CLOSE)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_cross_entropy_of_the_smoothed_target(smoothing: float) -> None:
    e = 0.3
    step, twin = build(smoothing=smoothing, similar=e, temperature=0.5), net().train()
    for seed, labels in enumerate([[0, 3, 3, 1], [1, 0, 3, 2], [4, 2, 0, 0]]):
        data = batch(labels, seed)
        means, initialised = means_of(step).values.clone(), means_of(step).initialised.tolist()
        losses, _ = step(data, Draws(0.0))
        z = twin(data.x).detach()
        log_p = z.log_softmax(1)
        total = 0.0
        for b, y in enumerate(labels):
            s = shares(means, initialised, y, 0.5)
            t = [(1 - e - smoothing) * (k == y) + smoothing / CLASSES + e * s[k] for k in range(CLASSES)]
            assert sum(t) == pytest.approx(1)
            total -= sum(t[k] * float(log_p[b, k]) for k in range(CLASSES))
        assert float(losses["loss"].detach()) == pytest.approx(total / len(labels), rel=1e-5)
        after(step)


def test_means_follow_the_features_and_the_first_is_taken_as_it_is() -> None:
    step, twin, rate = build(rate=0.25), net().train(), 0.25
    expected: dict[int, Tensor] = {}
    for seed, labels in enumerate([[0, 3, 3, 1], [1, 0, 3, 3]]):
        data = batch(labels, seed)
        step(data, Draws(0.0))
        x = twin.forward_head(twin.forward_features(data.x), pre_logits=True).detach()
        for y in set(labels):
            fresh = sum(x[b] for b in range(4) if labels[b] == y) / labels.count(y)
            expected[y] = (1 - rate) * expected[y] + rate * fresh if y in expected else fresh
        means = after(step)
        assert means.initialised.tolist() == [y in expected for y in range(CLASSES)]
        for y, mean in expected.items():
            torch.testing.assert_close(means.values[y], mean, **CLOSE)
    means.follow(torch.ones(2, len(means.values[0])).double(), torch.tensor([-1, -1]), rate=rate)
    assert means.initialised.sum() == len(expected)


def test_mixed_labels_are_smoothed_each_and_move_no_mean() -> None:
    step = build({"mixup": build_technique(MixupSettings())}, similar=0.4)
    share, order = torch.tensor([0.7, 0.2, 0.5, 1.0]), torch.tensor([1, 2, 3, 0])
    losses, views = step(batch([0, 1, 2, 3]), Draws(0.0, {"mixup": (share, order)}))
    log_p = net().train()(views[0].x).detach().log_softmax(1)
    y, total = [0, 1, 2, 3], 0.0
    for b in range(4):
        for label, w in ((y[b], float(share[b])), (y[order[b]], 1 - float(share[b]))):
            t = [0.6 * (k == label) + 0.4 * (k != label) / 4 for k in range(CLASSES)]  # nothing initialised yet: even
            total -= w * sum(t[k] * float(log_p[b, k]) for k in range(CLASSES)) / 4
    assert float(losses["loss"].detach()) == pytest.approx(total, rel=1e-5)
    assert not after(step).initialised.any()


def test_every_view_that_classifies_is_smoothed_by_its_weight() -> None:
    step = build({"dcl": build_technique(DclSettings(grid=2, bn="own"))}, similar=0.4)
    data = batch([0, 1, 2, 3])
    losses, views = step(data, step.draw(data, 0.0, seed=1, step=2))
    classified = [view for view in views if view.classifies]
    assert len(classified) == 2
    even = 0.0
    for view in classified:  # each view has its own batch statistics
        z = net().train()(view.x).detach()
        even += view.weight * float(F.cross_entropy(z, data.labels, label_smoothing=0.4 * CLASSES / (CLASSES - 1)))
    parts = losses["base"] + 0.4 * losses["similar_smoothing.similar"]
    assert float(parts.detach()) == pytest.approx(even / sum(view.weight for view in classified), rel=1e-5)


def test_a_second_call_with_the_views_counts_the_batch_once() -> None:
    once, twice = build(), build()
    _, views = twice(batch([0, 1, 2, 3]), Draws(0.0))
    once(batch([0, 1, 2, 3]), Draws(0.0))
    twice(batch([0, 1, 2, 3]), Draws(0.0), views)
    assert torch.equal(after(once).values, after(twice).values)


def test_its_state_is_in_the_checkpoint_and_it_says_what_stays_beside_it() -> None:
    step = build()
    assert set(step.branches.state_dict()) == {"similar_smoothing.means.values", "similar_smoothing.means.initialised"}
    assert "loss.label_smoothing" in step.attachments.notes[0]
    step = build(similar=0.0)
    losses, _ = step(batch([0, 1, 2, 3]), Draws(0.0))
    assert set(losses) == {"base", "loss"}
    assert not after(step).initialised.any()
