"""Optimizer, schedule and moving average: timm's, with the settings that docs/methods.md gives reasons for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fgvc.config.training import Ema, Optim, Swa
from fgvc.errors import FgvcError
from fgvc.training.l2_sp import pull


def make_optimizer(
    step: nn.Module,
    optim: Optim,
    *,
    added: Mapping[str, str] | None = None,
    head: Sequence[str] = (),
    starts: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """Build timm's optimizer over net and branches; no decay on tensors of rank < 2 nor where the model asks for none.

    `added`: name -> "added" or "replaced", of the parameters that techniques brought; `head`: prefixes of the classifier's;
    `starts`: name -> where `optim.l2_sp` draws a parameter to, see `fgvc.training.l2_sp`.
    Raises FgvcError for settings that the optimizer refuses.
    """
    try:
        optimizer = create_optimizer_v2(
            parameter_groups(step, optim, added=added, head=head, drawn=starts or ()),
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
        )
    except (TypeError, ValueError) as error:
        raise FgvcError(f"optim: {optim.name} refuses these settings: {error}") from error
    if starts:
        weights = dict(step.named_parameters())
        pull(optimizer, {weights[name]: start for name, start in starts.items()})
    return optimizer


def parameter_groups(
    step: nn.Module,
    optim: Optim,
    *,
    added: Mapping[str, str] | None = None,
    head: Sequence[str] = (),
    drawn: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Group parameters by weight decay (`optim.l2_sp` for those `drawn` to their start) and by `lr_scale`, a factor that timm's
    schedules apply. Frozen ones are left out.

    The factor is head_lr_scale, added_lr_scale, replaced_lr_scale or layer_decay^(depth of the deepest layer - its own), as
    timm's `group_matcher` counts layers. Raises FgvcError where a layer decay is asked of a net without a `group_matcher`.
    """
    net = getattr(step, "net", step)
    no_decay = getattr(net, "no_weight_decay", None)
    spared = {str(name) for name in no_decay()} if callable(no_decay) else set()
    layers: dict[str, int] = {}
    if optim.layer_decay != 1:
        matcher = getattr(net, "group_matcher", None)
        if not callable(matcher):
            raise FgvcError(
                f"optim.layer_decay: timm does not know the layers of a {type(net).__name__}; leave it at 1"
            )
        layers = group_parameters(net, matcher(coarse=False), reverse=True)
    deepest = max(layers.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in step.named_parameters():
        if not parameter.requires_grad:
            continue
        net_name = name.removeprefix("net.") if net is not step else name
        kind = (added or {}).get(name)
        if kind is not None:
            scale = optim.replaced_lr_scale if kind == "replaced" else optim.added_lr_scale
        elif net_name.startswith(tuple(head)):
            scale = optim.head_lr_scale
        else:
            scale = optim.layer_decay ** (deepest - layers.get(net_name, deepest))
        decay = optim.l2_sp if name in drawn else 0.0 if parameter.ndim < 2 or net_name in spared else optim.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(optimizer: Optimizer) -> float:
    """Learning rate before the factors of the groups."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Learning rates of the groups by their factor: "base" of 1, "x0.1" and the like."""
    scales = {float(group.get("lr_scale", 1.0)): float(group["lr"]) for group in optimizer.param_groups}
    return {"base" if scale == 1 else f"x{scale:g}": rate for scale, rate in scales.items()}


def make_schedule(optimizer: Optimizer, optim: Optim, *, steps_per_epoch: int, epochs: int) -> Scheduler:
    """Build a schedule that is a function of the step's number alone, so that a resumed run needs none of its state.

    The learning rate of step t (from 0) is lr (t+1) / (T_w+1) while t < T_w, then
    min + (lr - min) (1 + cos(pi (t - T_w) / (T - T_w))) / 2, or lr drop^(number of milestones <= t). timm evaluates its
    cosine at t, not t - T_w, without `warmup_prefix`, and drops one step before a milestone.
    """
    warm = round(optim.warmup_epochs * steps_per_epoch)
    first = optim.lr / (warm + 1)
    if optim.schedule == "step":
        drops = [round(epoch * steps_per_epoch) + 1 for epoch in optim.milestones]
        return MultiStepLRScheduler(
            optimizer,
            decay_t=drops,
            decay_rate=optim.drop,
            warmup_t=warm,
            warmup_lr_init=first,
            warmup_prefix=False,  # milestones count from the start
            t_in_epochs=False,
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=max(epochs * steps_per_epoch - warm, 2),
        lr_min=optim.min_lr if optim.schedule == "cosine" else optim.lr,
        warmup_t=warm,
        warmup_lr_init=first,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_ema(net: nn.Module, ema: Ema | None) -> ModelEmaV3 | None:
    """Build timm's average of parameters and float buffers; `update(net, step=n)` takes its warm-up from the step's number."""
    return None if ema is None else ModelEmaV3(net, decay=ema.decay, use_warmup=ema.warmup, foreach=True)


def make_swa(net: nn.Module, swa: Swa | None) -> AveragedModel | None:
    """Build torch's equal-weight average of parameters; its buffers are the net's of the last epoch."""
    return None if swa is None else AveragedModel(net)
