"""Schedule, parameter groups and average against their formulas."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from fgvc.train.optim import Ema, Optim, make_ema, make_optimizer, make_schedule
from fgvc.types import FgvcError


def rates(optim: Optim, steps_per_epoch: int, epochs: int) -> list[float]:
    net = nn.Linear(2, 2)
    optimizer = make_optimizer(net, optim)
    schedule = make_schedule(optimizer, optim, steps_per_epoch=steps_per_epoch, epochs=epochs)
    found = []
    for step in range(steps_per_epoch * epochs):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_and_cosine_are_their_formulas() -> None:
    warm, total, lr, low = 5, 20, 0.4, 0.01
    expected = [lr * (t + 1) / (warm + 1) for t in range(warm)]
    expected += [
        low + (lr - low) / 2 * (1 + math.cos(math.pi * (t - warm) / (total - warm))) for t in range(warm, total)
    ]
    assert rates(Optim(lr=lr, min_lr=low, warmup_epochs=1), 5, 4) == pytest.approx(expected, rel=1e-12)


def test_constant_stays_constant_after_the_warm_up() -> None:
    assert rates(Optim(lr=0.1, schedule="constant", warmup_epochs=0), 3, 2) == pytest.approx([0.1] * 6)


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


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(FgvcError, match=r"optim\.name: timm has no optimizer 'sdg'"):
        make_optimizer(nn.Linear(1, 1), Optim(name="sdg"))


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
