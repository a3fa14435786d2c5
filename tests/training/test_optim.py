"""Schedule, parameter groups and average against their formulas."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from fgvc.config.training import Ema, Optim
from fgvc.errors import FgvcError
from fgvc.models.backbone import head_prefixes
from fgvc.runs.step import StepModule
from fgvc.techniques.acb.settings import AcbSettings
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.registry import build_technique
from fgvc.training.optim import learning_rate, make_ema, make_optimizer, make_schedule


def rates(optim: Optim, steps_per_epoch: int, epochs: int) -> list[float]:
    net = nn.Linear(2, 2)
    optimizer = make_optimizer(net, optim)
    schedule = make_schedule(optimizer, optim, steps_per_epoch=steps_per_epoch, epochs=epochs)
    by_step = []
    for step in range(steps_per_epoch * epochs):
        schedule.step_update(step)
        by_step.append(optimizer.param_groups[0]["lr"])
    return by_step


def test_warm_up_and_cosine_are_their_formulas() -> None:
    warm, total, lr, low = 5, 20, 0.4, 0.01
    expected = [lr * (t + 1) / (warm + 1) for t in range(warm)]
    expected += [
        low + (lr - low) / 2 * (1 + math.cos(math.pi * (t - warm) / (total - warm))) for t in range(warm, total)
    ]
    assert rates(Optim(lr=lr, min_lr=low, warmup_epochs=1), 5, 4) == pytest.approx(expected, rel=1e-12)


def test_constant_stays_constant_after_the_warm_up() -> None:
    assert rates(Optim(lr=0.1, schedule="constant", warmup_epochs=0), 3, 2) == pytest.approx([0.1] * 6)


@pytest.mark.parametrize("warm", [0, 1])
def test_the_step_schedule_drops_at_its_milestones(warm: int) -> None:
    optim = Optim(lr=0.4, schedule="step", milestones=(2, 3.5), drop=0.1, warmup_epochs=warm)
    expected = [0.4 * 0.1 ** ((t >= 8) + (t >= 14)) for t in range(20)]
    expected[: 4 * warm] = [0.4 * (t + 1) / 5 for t in range(4 * warm)]
    assert rates(optim, 4, 5) == pytest.approx(expected, rel=1e-12)


def test_milestones_and_the_step_schedule_need_each_other() -> None:
    for wrong in ({"schedule": "step"}, {"milestones": (3,)}, {"schedule": "step", "milestones": (3, 2)}):
        with pytest.raises(ValidationError, match="milestones"):
            Optim(**wrong)


@pytest.mark.parametrize(("name", "factor"), [("sgd", 4), ("adamw", 2), ("lamb", 2), ("momentum", 4)])
def test_the_rate_grows_with_the_batch(name: str, factor: float) -> None:
    scaled = Optim(name=name, lr=0.1, min_lr=0.01, lr_for_batch=256).scaled(1024)
    assert (scaled.lr, scaled.min_lr) == pytest.approx((0.1 * factor, 0.01 * factor))
    assert Optim(lr=0.1).scaled(1024).lr == 0.1


def scales(step: nn.Module, optim: Optim, **options: object) -> dict[str, float]:
    """What each parameter's rate is of the schedule's, as the optimizer has it after a step of the schedule."""
    optimizer = make_optimizer(step, optim, **options)
    make_schedule(optimizer, optim, steps_per_epoch=3, epochs=2).step_update(4)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert learning_rate(optimizer) == pytest.approx(rates(Optim(lr=optim.lr), 3, 2)[4])
    return {name: rate[id(p)] / learning_rate(optimizer) for name, p in step.named_parameters()}


def test_head_and_what_techniques_add_have_rates_of_their_own() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    step = StepModule(net, {"acb": build_technique(AcbSettings()), "dcl": build_technique(DclSettings(grid=2))}, size=(32, 32))
    optim = Optim(head_lr_scale=10, added_lr_scale=5, replaced_lr_scale=0.2)
    factors = scales(step, optim, added=step.added, head=head_prefixes(net))
    plain = set(timm.create_model("test_resnet", num_classes=3).state_dict())
    for name, scale in factors.items():
        own = name.removeprefix("net.")
        pretrained = own.replace(".origin.", ".") in plain
        expected = 10 if own.startswith("fc.") else 1 if pretrained else 5 if name.startswith("branches.") else 0.2
        assert scale == pytest.approx(expected), name
    assert step.added["branches.dcl.location.weight"] == "added"
    assert "replaced" in step.added.values()


def test_deeper_layers_learn_faster() -> None:
    net = timm.create_model("test_vit", num_classes=3, img_size=32)
    factors = scales(net, Optim(layer_decay=0.5))
    depth = len(net.blocks)
    assert factors["head.weight"] == pytest.approx(1)
    for block in range(depth):
        assert factors[f"blocks.{block}.mlp.fc1.weight"] == pytest.approx(factors["blocks.0.mlp.fc1.weight"] * 2**block)
    assert factors["patch_embed.proj.weight"] == pytest.approx(factors["blocks.0.mlp.fc1.weight"] / 2)
    with pytest.raises(FgvcError, match="does not know the layers of a Linear"):
        make_optimizer(nn.Linear(1, 1), Optim(layer_decay=0.5))


def test_the_schedule_is_a_function_of_the_step_alone() -> None:
    optim = Optim(lr=0.3)
    net = nn.Linear(2, 2)
    optimizer = make_optimizer(net, optim)
    schedule = make_schedule(optimizer, optim, steps_per_epoch=4, epochs=3)
    schedule.step_update(9)
    assert optimizer.param_groups[0]["lr"] == rates(optim, 4, 3)[9]


def test_norms_and_biases_are_not_decayed() -> None:
    net = timm.create_model("test_resnet", num_classes=3)
    optimizer = make_optimizer(net, Optim(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert decay[id(parameter)] == (0.5 if parameter.ndim >= 2 else 0.0), name


def test_one_step_of_nesterov_sgd_is_its_formula() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 2.0)
    optimizer = make_optimizer(net, Optim(lr=0.1, momentum=0.9, weight_decay=0.5))
    net.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    gradient = 3.0 + 0.5 * 2.0
    assert net.weight.item() == pytest.approx(2.0 - 0.1 * (gradient + 0.9 * gradient))


def test_the_average_is_its_formula_and_copies_integers() -> None:
    net = nn.BatchNorm1d(1)
    ema = make_ema(net, Ema(decay=0.9, warmup=False))
    nn.init.constant_(net.weight, 5.0)
    net.running_mean.fill_(2.0)
    net.num_batches_tracked.fill_(7)
    ema.update(net, step=0)  # nothing is behind it: the first update copies
    nn.init.constant_(net.weight, 10.0)
    ema.update(net, step=50)
    assert ema.module.weight.item() == pytest.approx(0.9 * 5 + 0.1 * 10)
    assert ema.module.running_mean.item() == pytest.approx(2.0)
    assert ema.module.num_batches_tracked.item() == 7


def test_the_warm_up_of_the_average_depends_on_the_step_alone() -> None:
    net = nn.Linear(1, 1)
    ema = make_ema(net, Ema(decay=0.999))
    assert ema.get_decay(9) == pytest.approx(1 - (1 + 8) ** (-2 / 3))
    assert ema.get_decay(10**9) == 0.999


def test_settings_that_the_optimizer_refuses_are_named() -> None:
    with pytest.raises(FgvcError, match="optim: sgd refuses these settings: Nesterov"):
        make_optimizer(nn.Linear(1, 1), Optim(momentum=0.0))


@pytest.mark.parametrize("name", ["adamw", "lamb", "rmsprop"])
def test_other_optimizers_by_name_take_a_step(name: str) -> None:
    net = nn.Linear(2, 2)
    before = net.weight.clone()
    optimizer = make_optimizer(net, Optim(name=name))
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.weight, before)
