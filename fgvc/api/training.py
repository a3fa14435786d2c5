"""Verbs that make runs: training, its forecast, interpolation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fgvc.api.recipes import as_recipe, default_folder
from fgvc.api.run import Run
from fgvc.config.recipe import Recipe
from fgvc.io.files import StrPath, as_path
from fgvc.runs.loaded import load_run
from fgvc.training import forecast as forecasting
from fgvc.training import interpolate as interpolation
from fgvc.training import trainer
from fgvc.training.forecast import Forecast
from fgvc.training.interpolate import Interpolation


def interpolate(
    run: StrPath, out: StrPath, *, share: float | None = None, root: StrPath | None = None, device: str | None = None
) -> Interpolation:
    """Write a net between a run's start and its end, see `fgvc.training.interpolate.interpolate`; `root`: as in `evaluate`."""
    return interpolation.interpolate(load_run(Path(run), "end", root=as_path(root)), Path(out), share=share, device=device)




def train(
    recipe: Recipe | StrPath,
    out: StrPath | None = None,
    *,
    resume: StrPath = "auto",
    overwrite: bool = False,
    recorded: bool = False,
    **settings: Any,
) -> Run:
    """Train a run, or go on with one, and open it.

    `recipe`: a recipe, its file or id (`fgvc recipes` lists them), or a folder of classes, which is trained by `any/plain`.
    `settings`: over the recipe, sections as mappings, `train={"epochs": 3}`, or dotted, `**{"train.epochs": 3}`. `out`: the run's
    folder, by default `runs/` and the recipe's name. The others, and what is raised, as of `fgvc.training.trainer.train`.
    """
    made = as_recipe(recipe, settings)
    folder = default_folder(recipe, made) if out is None else Path(out)
    return Run(trainer.train(made, folder, resume=str(resume), overwrite=overwrite, recorded=recorded))


def forecast(recipe: Recipe | StrPath, **settings: Any) -> Forecast:
    """Measure what a run of a recipe costs, see `fgvc.training.forecast.forecast`; `recipe` and `settings` as in `train`."""
    return forecasting.forecast(as_recipe(recipe, settings))
