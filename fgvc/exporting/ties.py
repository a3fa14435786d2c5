"""Dead channels: equal or zero tensors, which the exporters merge or drop and so change the graph.

torch's older exporter stores equal tensors once and puts Identity nodes at the other places; the newer one shares them, too, and
drops a bias of zeros. So an untrained net, or one with dead channels, has another graph than the plain one for its weights alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

TINY = 1e-12  # what moves a value that is zero
DEAD = 1e-20  # a batch norm's scale below this folds kernels to zero, as far as float32 can tell
ULP = 2.0**-23


def degenerate(plain: nn.Module) -> dict[str, int]:
    """Keys of the state dict whose tensors may be merged or dropped, and the number of steps that makes each distinct.

    Looks at the tensors themselves and at what a batch norm becomes when it is folded into the convolution before it.
    """
    groups: dict[tuple[torch.Size, bytes], list[str]] = defaultdict(list)
    steps: dict[str, int] = {}
    for key, value in [*_floats(plain), *((f"{name}.bias", shift) for name, _, shift in _folded_norms(plain))]:
        if not value.any() and value.ndim <= 1:
            steps[key] = 1
        members = groups[value.shape, value.numpy().tobytes()]
        if key not in members:
            members.append(key)
    for name, scale, _ in _folded_norms(plain):
        if not scale.abs().max() > DEAD:
            steps[f"{name}.weight"] = 1
    for members in groups.values():
        for place, key in enumerate(members):
            if len(members) > 1 and place + steps.get(key, 0) > 0:
                steps[key] = max(place + 1, steps.get(key, 0))
    return steps


def nudged(plain: nn.Module, *, strength: int = 1) -> tuple[nn.Module, tuple[str, ...]]:
    """Copy of `plain` in which the first element of every degenerate tensor has moved, by a few units in its last
    place or, where it is zero, by some 1e-12; and the keys that moved. `strength` multiplies the move.

    It changes no logit by more than the rounding to float32 does; the numeric proof of what ships is made after it.
    """
    plain = copy.deepcopy(plain)
    moved: dict[str, None] = {}
    with torch.no_grad():
        for _ in range(4):  # one round may make a new pair equal, though hardly ever
            steps = degenerate(plain)
            if not steps:
                break
            state, reach = plain.state_dict(), _reach(plain)
            for key, count in steps.items():
                first = state[key].view(-1)[:1]
                size = max(abs(float(first)), reach.get(key, 0.0))
                first += count * strength * max(TINY, size * ULP)
                moved[key] = None
    return plain, tuple(moved)


def _floats(plain: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in plain.state_dict().items() if value.is_floating_point()]


def _folded_norms(plain: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """Name, scale (C,) and shift (C,) of every batch norm in eval mode, as float32 like the exporters' own folding."""
    norms = []
    norm: Any
    for name, norm in plain.named_modules():
        if getattr(norm, "running_var", None) is not None and getattr(norm, "weight", None) is not None:
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            norms.append((name, scale, (norm.bias - norm.running_mean * scale).detach()))
    return norms


def _reach(plain: nn.Module) -> dict[str, float]:
    """Size of the term that folding adds to each batch norm's bias: a smaller move would be rounded away."""
    state = plain.state_dict()
    return {f"{name}.bias": abs(float(state[f"{name}.bias"][0] - shift[0])) for name, _, shift in _folded_norms(plain)}
