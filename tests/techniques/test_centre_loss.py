"""The centre loss and its centres against loops in float64."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.centre_loss.settings import CentreLossSettings
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique

CLASSES, SIZE = 5, (64, 64)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # losses are taken in float32


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs).double()


def batch(labels: list[int], seed: int = 1) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(len(labels), 3, *SIZE, dtype=torch.float64, generator=rng), torch.tensor(labels)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(len(y), 2, 3))


def build(model: nn.Module, **settings: object) -> StepModule:
    return StepModule(model, {"centre_loss": build_technique(CentreLossSettings(**settings))}, size=SIZE).double().train()


def after(step: StepModule) -> Tensor:
    for kind, hook in step.hooks("after_step"):
        hook(step.contexts[kind])
    return step.branches["centre_loss"]["centres"].values


def features(model: nn.Module, data: Batch) -> Tensor:
    return model.forward_head(model.train().forward_features(data.x), pre_logits=True)


def moved(centres: list[list[float]], x: Tensor, labels: list[int], rate: float) -> list[list[float]]:
    """The centres after one batch: equation 4 of the paper, class by class, number by number."""
    new = [list(centre) for centre in centres]
    for j, centre in enumerate(centres):
        own = [b for b, y in enumerate(labels) if y == j]
        for d in range(len(centre)):
            change = sum(centre[d] - float(x[b, d]) for b in own) / (1 + len(own))
            new[j][d] = centre[d] - rate * change
    return new


@pytest.mark.parametrize(("name", "kwargs"), [("test_resnet", {}), ("test_vit", {"img_size": 64})])
def test_term_and_centres_are_their_formulas_step_by_step(name: str, kwargs: dict) -> None:
    step = build(net(name, **kwargs), rate=0.3, centre=0.7)
    twin = net(name, **kwargs)
    centres = step.branches["centre_loss"]["centres"].values.tolist()
    assert not any(map(any, centres))
    for seed, labels in enumerate([[0, 3, 3, 3], [3, 0, 1, 1], [2, 2, 2, 2]]):  # twice and more in one batch
        data = batch(labels, seed)
        losses, _ = step(data, Draws(0.0))
        x = features(twin, data).detach()
        term = sum(
            sum((float(v) - c) ** 2 for v, c in zip(x[b], centres[y], strict=True)) / 2 for b, y in enumerate(labels)
        )
        assert float(losses["centre_loss.centre"].detach()) == pytest.approx(term / len(labels), rel=1e-5)
        torch.testing.assert_close(losses["loss"], losses["base"] + 0.7 * losses["centre_loss.centre"])
        centres = moved(centres, x, labels, 0.3)
        torch.testing.assert_close(after(step), torch.tensor(centres, dtype=torch.float64), **CLOSE)


def test_by_hand_a_centre_never_overtakes_its_features() -> None:
    """One image at 1 with the rate 1: half of the way; four of them: four fifths."""
    step = build(net(), rate=1.0)
    centres = step.branches["centre_loss"]["centres"]
    width = centres.values.shape[1]
    x = torch.ones(5, width, dtype=torch.float64)
    centres.follow(x, torch.tensor([0, 1, 1, 1, 1]), rate=1.0)
    assert centres.values[:, 0].tolist() == pytest.approx([1 / 2, 4 / 5, 0, 0, 0])
    centres.follow(x, torch.full((5,), -1), rate=1.0)
    assert centres.values[:, 0].tolist() == pytest.approx([1 / 2, 4 / 5, 0, 0, 0])


def test_the_gradient_draws_features_and_not_the_centres() -> None:
    step = build(net())
    centres = step.branches["centre_loss"]["centres"].values
    losses, _ = step(batch([0, 1, 2, 3]), Draws(0.0))
    losses["centre_loss.centre"].backward()
    assert next(step.net.parameters()).grad.abs().max() > 0
    assert step.net.get_classifier().weight.grad is None
    assert not centres.requires_grad
    assert list(step.branches.parameters()) == []


def test_parts_of_a_step_move_the_centres_once_together() -> None:
    model = net("test_vit", img_size=64)  # no batch norm: parts say what they say together
    whole, parts = build(model, rate=0.5), build(model, rate=0.5)
    data = batch([1, 1, 2, 1])
    whole(data, Draws(0.0))
    for rows in (slice(0, 2), slice(2, 4)):
        y, x = data.labels[rows], data.x[rows]
        part = Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=data.geometry[rows])
        parts(part, Draws(0.0))
    torch.testing.assert_close(after(parts), after(whole), **CLOSE)


def test_mixed_images_have_no_centre_and_move_none() -> None:
    techniques = {"mixup": build_technique(MixupSettings()), "centre_loss": build_technique(CentreLossSettings())}
    step = StepModule(net(), techniques, size=SIZE).double().train()
    mix = (torch.full((4,), 0.6), torch.tensor([1, 2, 3, 0]))
    losses, _ = step(batch([0, 1, 2, 3]), Draws(0.0, {"mixup": mix}))
    assert set(losses) == {"base", "loss"}
    assert not after(step).any()
    losses, _ = step(batch([0, 1, 2, 3]), Draws(0.0, {"mixup": None}))
    assert "centre_loss.centre" in losses
    assert after(step)[:4].any(1).all()


def test_a_second_call_with_the_views_counts_the_batch_once() -> None:
    once, twice = build(net()), build(net())
    _, views = twice(batch([0, 1, 2, 3]), Draws(0.0))
    once(batch([0, 1, 2, 3]), Draws(0.0))
    twice(batch([0, 1, 2, 3]), Draws(0.0), views)
    assert torch.equal(after(once), after(twice))


def test_the_centres_are_in_the_checkpoint_and_a_weight_of_zero_stops_them() -> None:
    step = build(net(), centre=((0.0, 0.0), (0.5, 0.0), (1.0, 1.0)))
    assert set(step.branches.state_dict()) == {"centre_loss.centres.values"}
    losses, _ = step(batch([0, 1, 2, 3]), Draws(0.25))
    assert set(losses) == {"base", "loss"}
    assert not after(step).any()
    step(batch([0, 1, 2, 3]), Draws(0.75))
    assert after(step).any()
