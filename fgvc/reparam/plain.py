"""Stripping of a trained network to the plain timm model that ships."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.models.finite import not_finite
from fgvc.reparam.replace import folded_state

# Every per-module dictionary in which torch stores hooks.
HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def strip(
    net: nn.Module,
    *,
    backbone: str,
    num_classes: int,
    kwargs: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A new plain model in eval mode with the weights of `net`, its re-parameterised blocks folded. `net` stays as it is.

    The plain model is defined by name, K and kwargs alone; the trained object itself is never exported. Raises as `strip_to`.
    """
    return strip_to(plain_model(backbone, num_classes, kwargs), net, dtype=dtype)


def strip_to(plain: nn.Module, net: nn.Module, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`plain`, the net that ships as it is defined, in eval mode with the weights of the trained `net`, blocks folded.

    Raises FgvcError for remains of training: a branch, a hook, a parametrization, a value that is not finite.
    """
    refuse_live_hooks(net, plain)
    state = folded_state(net)
    _refuse_other_state(state, plain.state_dict())
    plain.to(dtype)
    with torch.no_grad():
        plain.load_state_dict(state, strict=True)
    return plain.eval()


def refuse_live_hooks(net: nn.Module, plain: nn.Module) -> None:
    """Raise FgvcError if a module of `net` has a hook or a parametrization that the plain model lacks."""
    fresh = dict(plain.named_modules())
    leaks = []
    for name, module in net.named_modules():
        where = f"{name or 'the network itself'} ({type(module).__name__})"
        if parametrize.is_parametrized(module) and not parametrize.is_parametrized(fresh.get(name, nn.Module())):
            leaks.append(f"{where}: a parametrization of {', '.join(module.parametrizations)}")
        for attribute, kind in HOOKS.items():
            hooks = getattr(module, attribute).values()
            expected = len(getattr(fresh[name], attribute)) if name in fresh else 0
            if len(hooks) > expected:
                leaks.append(f"{where}: {kind} {', '.join(_name(hook) for hook in hooks)}")
    if leaks:
        raise FgvcError(
            "the trained network is not plain; it has what no plain model has:\n  "
            + "\n  ".join(leaks)
            + "\nremove its handle before export; a technique's gates and hooks must not outlive training"
        )


def _refuse_other_state(state: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
    leaked = [f"{key} {tuple(state[key].shape)}: in no plain model" for key in state if key not in plain]
    missing = [f"{key} {tuple(plain[key].shape)}: missing" for key in plain if key not in state]
    other = [
        f"{key}: {_kind(state[key])} where the plain model has {_kind(plain[key])}"
        for key in plain
        if key in state and _kind(state[key]) != _kind(plain[key])
    ]
    wild = [f"{key}: holds values that are not finite" for key in not_finite(state)]
    if problems := [*leaked, *missing, *other, *wild]:
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise FgvcError(
            "the trained network does not fold back into the plain model:\n  " + "\n  ".join(problems[:10]) + more
            + "\na technique adds modules by plan.add, and replaces convolutions by plan.replace" * bool(leaked)
        )


def _kind(value: Tensor) -> str:
    """Shape and dtype of a tensor, all floating dtypes counting as one, since the folded state is float64 by design."""
    return f"{'float' if value.is_floating_point() else value.dtype} {tuple(value.shape)}"


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))
