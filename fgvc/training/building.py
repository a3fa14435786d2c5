"""Building of the parts of a run that need only its recipe, images and net: teachers, first weights, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.config.training import Optim
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.models.backbone import head_prefixes
from fgvc.runs.build import BuiltNet
from fgvc.runs.checkpoint import State
from fgvc.runs.step import StepModule
from fgvc.training.optim import make_optimizer
from fgvc.training.teachers import TeacherLoader


def teacher_loader(
    recipe: Recipe,
    index: ImageIndex,
    device: torch.device,
    *,
    preprocess: Preprocess | None = None,
    out: Path | None = None,
    timed: bool = False,
) -> TeacherLoader:
    """Make the loader of a run's teachers. `preprocess`, `out`: of a run which goes on; `timed`: see TeacherUse."""
    return TeacherLoader(
        classes=index.classes,
        index=index,
        device=device,
        averaged=recipe.ema is not None,
        preprocess=preprocess,
        out=out,
        timed=timed,
    )


def first_weights(built: BuiltNet, recipe: Recipe, start_state: State | None = None) -> dict[str, Tensor]:
    """Return the values that `optim.l2_sp` draws parameters to, by name: the pretrained weights that the net has now, or had in
    the state that its run began with. Raises FgvcError where that state is of another recipe."""
    if not recipe.optim.l2_sp:
        return {}
    weights = {name: weight for name, weight in built.step.named_parameters() if weight.requires_grad}
    if start_state is None:
        return {name: weights[name].detach().clone() for name in built.pretrained if name in weights}
    drawn = [name for name in start_state.rest.get("pretrained", ()) if name in weights]
    if any(start_state.net[name.removeprefix("net.")].shape != weights[name].shape for name in drawn) or not drawn:
        raise FgvcError("optim.l2_sp: ckpt/start is of a run of other settings; put that of this run there")
    return {name: torch.empty_like(weights[name]).copy_(start_state.net[name.removeprefix("net.")]) for name in drawn}


def build_optimizer(
    step: StepModule, recipe: Recipe, *, starts: Mapping[str, Tensor] | None = None
) -> tuple[Optimizer, Optim]:
    """Build the optimizer, and return the settings with the rates that it uses. `starts`: see `first_weights`."""
    optim = recipe.optim.scaled(recipe.train.images)
    return make_optimizer(step, optim, added=step.added, head=head_prefixes(step.net), starts=starts), optim
