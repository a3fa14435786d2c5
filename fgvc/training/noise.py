"""Timing of a recipe's optimizer steps on images of noise, before anything is trained: seconds and memory."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from fgvc.config.recipe import Recipe
from fgvc.data.index import ImageIndex
from fgvc.models.backbone import memory_format
from fgvc.runs.build import BuiltNet, build_net, class_counts
from fgvc.runs.distributed import ProcessGroup
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch
from fgvc.training.building import build_optimizer, first_weights, teacher_loader
from fgvc.training.optim import make_ema
from fgvc.training.sam import perturbed


@dataclass(slots=True)
class NoiseStep:
    """The net of a recipe with its optimizer, in training on noise; see `open_noise_step`."""

    recipe: Recipe
    process: ProcessGroup
    built: BuiltNet
    step: StepModule
    optimizer: Optimizer
    layout: torch.memory_format
    classes: int
    average: nn.Module | None
    number: int = field(default=0)  # of the next step

    def run(self, images: int, progress: float = 0.0, *, autocast: AbstractContextManager[Any] | None = None) -> float:
        """Seconds of one forward, backward and update of `images` images at `progress` in [0,1] of the run; with SAM of both its
        passes. `autocast`: in place of the recipe's."""
        batch = self._batch(images, progress)
        started = time.perf_counter()
        losses, views, draws = self._forward(batch, progress, autocast)
        losses["loss"].backward()
        if self.recipe.optim.sam is not None:
            with perturbed(self.step, self.recipe.optim.sam):
                with autocast or self.process.autocast():
                    losses, _ = self.step(batch, draws, views)
                losses["loss"].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.process.device.type != "cpu":
            torch.accelerator.synchronize()
        self.number += 1
        return time.perf_counter() - started

    def saved_bytes(self, images: int, progress: float = 0.0) -> int:
        """Bytes that a forward keeps for its backward, each storage once, the net's own tensors apart."""
        own = {value.untyped_storage().data_ptr() for value in (*self.step.parameters(), *self.step.buffers())}
        storages: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            with suppress(RuntimeError, NotImplementedError):  # one without a storage
                storage = value.untyped_storage()
                if storage.data_ptr() not in own:
                    storages[storage.data_ptr()] = storage.nbytes()
            return value

        with saved_tensors_hooks(keep, lambda value: value):
            self._forward(self._batch(images, progress), progress, None)
        self.number += 1
        return sum(storages.values())

    def _forward(self, batch: Batch, progress: float, autocast: AbstractContextManager[Any] | None) -> Any:
        draws = self.step.draw(batch, progress, seed=self.recipe.train.seed, step=self.number)
        with autocast or self.process.autocast():
            losses, views = self.step(batch, draws)
        return losses, views, draws

    def _batch(self, images: int, progress: float) -> Batch:
        device, (height, width) = self.process.device, self.recipe.image.train_size(progress)
        x = torch.randn(images, 3, height, width, device=device).contiguous(memory_format=self.layout)
        y = torch.arange(images, device=device) % self.classes
        geometry = torch.eye(3)[:2].repeat(images, 1, 1)
        boxes = torch.tensor([0.0, 0.0, width, height]).repeat(images, 1)
        return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=geometry, boxes=boxes)


def open_noise_step(recipe: Recipe, index: ImageIndex, process: ProcessGroup) -> NoiseStep:
    """Build what a recipe trains, with its first weights. Raises FgvcError for all that training would refuse."""
    torch.manual_seed(recipe.train.seed)
    opener = teacher_loader(recipe, index, process.device, timed=True)
    built = build_net(recipe, len(index.classes), counts=class_counts(index), opener=opener)
    step = built.step.to(process.device)
    layout = memory_format(step.net)
    step.net.to(memory_format=layout)
    ema = make_ema(step.net, recipe.ema)
    average = None if ema is None else ema.module
    step.set_average(average)
    step.attach_hooks()
    step.train()
    optimizer, _ = build_optimizer(step, recipe, starts=first_weights(built, recipe))
    return NoiseStep(recipe, process, built, step, optimizer, layout, len(index.classes), average)
