"""Optimizer, schedule and moving average: timm's, with the choices that methods 13 and 14 call right."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from fgvc.config import Section
from fgvc.types import FgvcError


class Optim(Section):
    """How the weights move."""

    name: str = Field("sgd", description="timm's name of the optimizer: sgd (Nesterov), momentum, adamw, ...")
    lr: float = Field(0.03, gt=0, description="peak learning rate")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the optimizers that have one, such as sgd; Adam's betas are timm's"
    )
    weight_decay: float = Field(1e-4, ge=0, description="on weights of rank >= 2 only: never on norms and biases")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up, per step")
    warmup_epochs: float = Field(1.0, ge=0, description="linear up to lr")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    clip_norm: float | None = Field(None, gt=0, description="cap on the norm of all gradients together")


class Ema(Section):
    """Moving average of the weights; what it averages is what ships when `select` is ema."""

    decay: float = Field(
        0.999, gt=0, lt=1, description="time constant 1 / (1 - decay) steps; keep it well under the run's length"
    )
    warmup: bool = Field(
        True, description="decay grows as 1 - (1 + step)^(-2/3) up to `decay`, so the start is forgotten"
    )


def make_optimizer(step: nn.Module, optim: Optim) -> Optimizer:
    """timm's optimizer over net and branches; no decay on tensors of rank < 2 nor where the model asks for none.

    Raises FgvcError for a name that timm does not know, and for settings that the optimizer refuses.
    """
    if optim.name not in list_optimizers():
        raise FgvcError(f"optim.name: timm has no optimizer {optim.name!r}; it has {', '.join(list_optimizers())}")
    try:
        return create_optimizer_v2(
            step,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            filter_bias_and_bn=True,
        )
    except (TypeError, ValueError) as error:
        raise FgvcError(f"optim: {optim.name} refuses these settings: {error}") from error


def make_schedule(optimizer: Optimizer, optim: Optim, *, steps_per_epoch: int, epochs: int) -> Scheduler:
    """A schedule that is a function of the step's number alone, so that a resumed run needs none of its state.

    The learning rate of step t (from 0) is lr (t+1) / (T_w+1) while t < T_w, then
    min + (lr - min) (1 + cos(pi (t - T_w) / (T - T_w))) / 2. timm evaluates its cosine at t, not t - T_w, unless told
    `warmup_prefix` (methods 13).
    """
    warm = round(optim.warmup_epochs * steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(epochs * steps_per_epoch - warm, 2),
        lr_min=optim.min_lr if optim.schedule == "cosine" else optim.lr,
        warmup_t=warm,
        warmup_lr_init=optim.lr / (warm + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_ema(net: nn.Module, ema: Ema | None) -> ModelEmaV3 | None:
    """timm's average of parameters and float buffers; `update(net, step=n)` takes its warm-up from the step's number."""
    return None if ema is None else ModelEmaV3(net, decay=ema.decay, use_warmup=ema.warmup, foreach=True)
