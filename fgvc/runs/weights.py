"""Trained weights of a run: those that a selection names, with the checkpoint that they are from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fgvc.config.recipe import Recipe, Selected
from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.models.finite import not_finite
from fgvc.runs import checkpoint
from fgvc.runs.folder import recorded_preprocess


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """Trained weights of a net, and the checkpoint that they are from."""

    weights: Mapping[str, Tensor]
    state: checkpoint.State


def selected_weights(out: Path, recipe: Recipe, select: Selected) -> TrainedWeights:
    """Read the weights of a run that `select` names. Raises FgvcError where it has none, or they are not finite."""
    if select == "ema" and recipe.ema is None:
        raise FgvcError(f"{out}: has no moving average; train with ema.decay=0.999, or choose --select last")
    if select == "swa" and recipe.swa is None:
        raise FgvcError(f"{out}: has no SWA; train with swa.start=0.75, or choose --select last")
    state = checkpoint.load(out / "ckpt", checkpoint.slot(select))
    if (reason := preprocess_fault(out, state)) is not None:
        print(f"WARNING: {reason}", file=sys.stderr)
    if select == "swa" and state.ema is None:
        raise FgvcError(f"{out}: SWA holds no epoch yet; train on to the end, or choose --select last")
    if select == "floor" and state.floor is None:
        raise FgvcError(f"{out}: has no floor: random first weights, a head that is not linear, or a run of an earlier fgvc")
    averaged = select in ("ema", "swa") or (select == "best" and recipe.selected != "last" and state.ema is not None)
    weights = {**((state.ema if averaged else state.net) or {}), **((state.floor or {}) if select == "floor" else {})}
    trained = TrainedWeights(weights, state)
    if bad := not_finite(trained.weights):
        raise FgvcError(
            f"{out}: its weights ({select}) hold values that are NaN or infinite, so its answers mean nothing: {some(bad)}. "
            "Choose others with --select, or train anew with a lower optim.lr"
        )
    return trained


def has_floor(out: Path) -> bool:
    """Whether a logistic regression on the frozen net was fitted when the run began: `select: floor` then names it."""
    return (out / "ckpt" / "start" / "floor.safetensors").is_file()


def preprocess_fault(out: Path, state: checkpoint.State) -> str | None:
    """Reason why preprocess.json can't be what the run began with, by its checkpoint, which has digests; None: it is the same."""
    recorded = state.rest.get("preprocess")
    if recorded is None or recorded_preprocess(out).model_dump_json() == recorded:
        return None
    return f"{out / 'preprocess.json'}: not what the run began with, which was {recorded}; write that back"
