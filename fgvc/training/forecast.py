"""Cost of a run, measured on a few steps of noise (`fgvc train --dry-run`); nothing is trained, nothing written."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.models.backbone import memory_format
from fgvc.runs.build import build_net, class_counts
from fgvc.runs.distributed import process_group
from fgvc.techniques.api import Batch
from fgvc.training.images import training_index
from fgvc.training.optim import make_ema
from fgvc.training.sam import perturbed
from fgvc.training.session import build_optimizer, first_weights, teacher_loader

STEPS = 4  # spread over the run, since weights, rates and sizes may be scheduled


@dataclass(frozen=True, slots=True)
class Forecast:
    """Cost of one run of a recipe, without loading and validation."""

    images: dict[str, int]  # by split
    steps: int
    forwards: float  # images through the backbone in a step, over images in the batch
    parameters: int  # trained, branches included
    step_seconds: float  # mean over the run
    hours: float
    peak_bytes: int
    techniques: dict[str, str]  # kind -> forwards that it says it adds
    notes: tuple[str, ...]


def forecast(recipe: Recipe) -> Forecast:
    """Build the recipe's net and time a few steps on noise. Raises FgvcError for all that training would refuse."""
    index = training_index(recipe)
    rows = len(index.rows("train"))
    with process_group(recipe.train) as process:
        recipe = recipe.model_copy(update={"train": recipe.train.fitting(rows, process.world)})
        micro = recipe.train.batch_size // (process.world * recipe.train.grad_accum_steps)
        steps_per_epoch = rows // (micro * process.world) // recipe.train.grad_accum_steps
        if not steps_per_epoch:
            raise FgvcError(f"train.batch_size: {recipe.train.batch_size} is more than the {rows} training images")
        steps = min(steps_per_epoch * recipe.train.epochs, recipe.train.last_step)
        torch.manual_seed(recipe.train.seed)
        opener = teacher_loader(recipe, index, process.device, timed=True)
        built = build_net(recipe, len(index.classes), counts=class_counts(index), opener=opener)
        step = built.step.to(process.device)
        layout = memory_format(step.net)
        step.net.to(memory_format=layout)
        ema = make_ema(step.net, recipe.ema)
        step.set_average(ema.module if ema is not None else None)
        step.attach_hooks()
        step.train()
        optimizer, _ = build_optimizer(step, recipe, starts=first_weights(built, recipe))
        y = torch.arange(micro, device=process.device) % len(index.classes)
        passes = count_images(step.net, *step.attachments.average)
        seconds = []
        for number, progress in enumerate([0.0, *((at + 0.5) / STEPS for at in range(STEPS))]):
            size = recipe.image.train_size(progress)
            x = torch.randn(micro, 3, *size, device=process.device).contiguous(memory_format=layout)
            geometry = torch.eye(3)[:2].repeat(micro, 1, 1)
            boxes = torch.tensor([0.0, 0.0, size[1], size[0]]).repeat(micro, 1)
            batch = Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=geometry, boxes=boxes)
            started = time.perf_counter()
            draws = step.draw(batch, progress, seed=recipe.train.seed, step=number)
            with process.autocast():
                losses, views = step(batch, draws)
            losses["loss"].backward()
            if recipe.optim.sam is not None:
                with perturbed(step, recipe.optim.sam):
                    with process.autocast():
                        losses, _ = step(batch, draws, views)
                    losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) * recipe.train.grad_accum_steps)
        mean = statistics.mean(seconds[1:])  # the first one sets up kernels and the optimizer
        return Forecast(
            images={split: len(index.rows(split)) for split in ("train", "val", "test")},
            steps=steps,
            forwards=sum(rows for rows, _ in passes) / (micro * (STEPS + 1)),
            parameters=sum(p.numel() for p in step.parameters()),
            step_seconds=mean,
            hours=mean * steps / 3600,
            peak_bytes=peak_memory(process.device),
            techniques={kind: technique.forwards for kind, technique in step.techniques.items()},
            notes=(*built.weights.doubts, *step.attachments.notes),
        )


def count_images(*nets: nn.Module) -> list[tuple[int, bool]]:
    """Record every later forward through these backbones: the number of images, and whether a backward can follow."""
    passes: list[tuple[int, bool]] = []

    def counting(x: Tensor, inner: Callable[[Tensor], Tensor]) -> Tensor:
        passes.append((len(x), torch.is_grad_enabled()))
        return inner(x)

    for net in nets:
        inner = cast("Callable[[Tensor], Tensor]", net.forward_features)
        setattr(net, "forward_features", partial(counting, inner=inner))  # noqa: B010 - of this one net, not of its class
    return passes


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the accelerator's allocator, or of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
