"""Optimizer, schedule and moving average: timm's, with the settings that docs/methods.md gives reasons for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from fgvc.config.section import Section
from fgvc.training.l2_sp import pull
from fgvc.training.sam import Sam
from fgvc.types import FgvcError

SIZED = ("lamb", "lars", "larc", "adamp", "sgdp")  # in the names of optimizers that look at a weight's size


class Optim(Section):
    """How the weights move."""

    name: str = Field("sgd", description="timm's name of the optimizer: sgd (Nesterov), momentum, adamw, ... Where neither name "
        "nor lr is given and weights are pretrained: adamw, lr 3e-4, weight_decay 0.01")
    lr: float = Field(0.03, gt=0, description="peak learning rate")
    lr_for_batch: int | None = Field(
        None,
        ge=1,
        description="the batch size that lr was chosen for: train.batch_size / this scales it (its root for Adam and "
        "the like); null: lr as it is",
    )
    head_lr_scale: float = Field(1.0, gt=0, description="learning rate of the classifier, in units of lr")
    added_lr_scale: float = Field(1.0, gt=0, description="of the heads that techniques add, in units of lr")
    grafted_lr_scale: float = Field(
        0.1,
        gt=0,
        description="of what techniques graft beside pretrained kernels, in units of lr: at 1 the first steps can undo them",
    )
    layer_decay: float = Field(1.0, gt=0, le=1, description="a layer's rate is this times that of the layer above it")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of the optimizers that have one, such as sgd; Adam's betas are timm's"
    )
    weight_decay: float = Field(1e-4, ge=0, description="on weights of rank >= 2 only: never on norms and biases")
    l2_sp: float = Field(
        0.0,
        ge=0,
        description="in the place of weight_decay on what came from model.weights, norms and biases too: towards that, not to 0 "
        "(L2-SP); 0: off",
    )
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="after the warm-up, per step")
    milestones: tuple[float, ...] = Field((), description="of the step schedule: epochs after which the rate drops")
    drop: float = Field(0.1, gt=0, lt=1, description="of the step schedule: factor of one drop")
    warmup_epochs: float = Field(1.0, ge=0, description="linear up to lr")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    clip_norm: float | None = Field(
        None, gt=0, description="cap on the norm of all gradients together. Default with pretrained weights: 1"
    )
    sam: Sam | None = Field(None, description="sharpness-aware minimisation; null: off. It doubles a step's time")

    @model_validator(mode="after")
    def _distance(self) -> Optim:
        if self.l2_sp and any(part in self.name for part in SIZED):
            raise ValueError(
                f"l2_sp: {self.name} takes steps that depend on how large a weight is; use sgd, momentum, adamw or another"
            )
        return self

    @model_validator(mode="after")
    def _steps(self) -> Optim:
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("milestones go with schedule: step, for example optim.milestones=[30,60]")
        if list(self.milestones) != sorted(set(self.milestones)) or min(self.milestones, default=1) <= 0:
            raise ValueError("milestones: give epochs above 0 in increasing order")
        return self

    def scaled(self, batch_size: int) -> Optim:
        """With the rates meant for `batch_size` images a step: linear (Goyal et al. 2017, arXiv:1706.02677), the square
        root for optimizers that normalise the gradient."""
        if self.lr_for_batch is None:
            return self
        factor = batch_size / self.lr_for_batch
        if any(part in self.name for part in ("ada", "lamb")):  # timm's rule
            factor **= 0.5
        return self.model_copy(update={"lr": self.lr * factor, "min_lr": self.min_lr * factor, "lr_for_batch": None})


class Ema(Section):
    """Moving average of the weights; what it averages is what ships when `select` is ema."""

    decay: float = Field(
        0.999, gt=0, lt=1, description="time constant 1 / (1 - decay) steps; keep it well under the run's length"
    )
    warmup: bool = Field(
        True, description="decay grows as 1 - (1 + step)^(-2/3) up to `decay`, so the start is forgotten"
    )


class Swa(Section):
    """Stochastic weight averaging (Izmailov et al., UAI 2018, arXiv:1803.05407): the mean of the weights at the last epochs'
    ends. It gains where these still move: with schedule: constant, or a min_lr above 0."""

    start: float = Field(0.75, ge=0, lt=1, description="share of the run after which every epoch's end is averaged")
    images: int = Field(
        1024,
        ge=2,
        description="training images, as evaluation sees them, from which the average's batch norms take their statistics anew "
        "whenever an epoch has joined",
    )


def make_optimizer(
    step: nn.Module,
    optim: Optim,
    *,
    added: Mapping[str, str] | None = None,
    head: Sequence[str] = (),
    starts: Mapping[str, Tensor] | None = None,
) -> Optimizer:
    """timm's optimizer over net and branches; no decay on tensors of rank < 2 nor where the model asks for none.

    `added`: name -> "added" or "grafted", of the parameters that techniques brought; `head`: prefixes of the classifier's;
    `starts`: name -> where `optim.l2_sp` draws a parameter to, see `fgvc.training.l2_sp`.
    Raises FgvcError for a name that timm does not know, and for settings that the optimizer refuses.
    """
    if optim.name not in list_optimizers():
        raise FgvcError(f"optim.name: timm has no optimizer {optim.name!r}; it has {', '.join(list_optimizers())}")
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
    """Parameters by weight decay (`optim.l2_sp` for those `drawn` to their start) and by `lr_scale`, a factor that timm's
    schedules apply. Frozen ones are left out.

    The factor is head_lr_scale, added_lr_scale, grafted_lr_scale or layer_decay^(depth of the deepest layer - its own), as timm's
    `group_matcher` counts layers.
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
        own = name.removeprefix("net.") if net is not step else name
        kind = (added or {}).get(name)
        if kind is not None:
            scale = optim.grafted_lr_scale if kind == "grafted" else optim.added_lr_scale
        elif own.startswith(tuple(head)):
            scale = optim.head_lr_scale
        else:
            scale = optim.layer_decay ** (deepest - layers.get(own, deepest))
        decay = optim.l2_sp if name in drawn else 0.0 if parameter.ndim < 2 or own in spared else optim.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate(optimizer: Optimizer) -> float:
    """The rate before any group's own factor."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group.get("lr_scale", 1.0))


def make_schedule(optimizer: Optimizer, optim: Optim, *, steps_per_epoch: int, epochs: int) -> Scheduler:
    """A schedule that is a function of the step's number alone, so that a resumed run needs none of its state.

    The learning rate of step t (from 0) is lr (t+1) / (T_w+1) while t < T_w, then
    min + (lr - min) (1 + cos(pi (t - T_w) / (T - T_w))) / 2, or lr drop^(number of milestones <= t). timm evaluates its
    cosine at t, not t - T_w, unless told `warmup_prefix`, and drops one step before a milestone.
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
    """timm's average of parameters and float buffers; `update(net, step=n)` takes its warm-up from the step's number."""
    return None if ema is None else ModelEmaV3(net, decay=ema.decay, use_warmup=ema.warmup, foreach=True)


def make_swa(net: nn.Module, swa: Swa | None) -> AveragedModel | None:
    """torch's equal-weight average of parameters; buffers are the net's own of the last epoch."""
    return None if swa is None else AveragedModel(net)
