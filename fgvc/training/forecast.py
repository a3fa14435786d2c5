"""Cost of a run, measured on a few steps of noise and a few images (`fgvc train --dry-run`); nothing is trained or written."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.data.index import ImageIndex, spread
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.errors import FgvcError
from fgvc.exporting.proofs import MAX_IMAGES as PROOF_IMAGES
from fgvc.io.display import Display
from fgvc.models.classifier import as_classifier
from fgvc.runs.distributed import process_group
from fgvc.training.automatic import settle, settled_process
from fgvc.training.images import training_index
from fgvc.training.noise import NoiseStep, open_noise_step
from fgvc.training.start import MAX_IMAGES, VIEWS

STEPS = 4  # spread over the run, since weights, rates and sizes may be scheduled
IMAGES = 16  # that are read, and answered, to see how long one takes
STARTING = 8.0  # seconds until torch and timm are imported
EXPORTING = 25.0  # seconds of an export without its images: the exporter, twice in a new process
PROVING = 6.0  # forwards of each image in its proofs: folded and not, in float64 and float32, by onnxruntime


@dataclass(frozen=True, slots=True, repr=False)
class Forecast(Display):
    """Cost of one run of a recipe."""

    recipe: Recipe  # with what was `auto` as it was measured
    images: dict[str, int]  # by split
    steps: int
    forwards: float  # images through the backbone in a step, over images in the batch
    parameters: int  # trained, branches included
    step_seconds: float  # mean over the run
    hours: float  # of all steps, without loading and validation
    parts: dict[str, float]  # start-up, training with its loading, validation, export -> seconds
    peak_bytes: int
    techniques: dict[str, str]  # kind -> forwards that it says it adds
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the whole, from the command to the bundle."""
        return sum(self.parts.values())

    @property
    def facts(self) -> Mapping[str, object]:
        step = {"forwards a step": f"{self.forwards:g}", "a step takes": f"{1000 * self.step_seconds:.0f} ms"}
        whole = {"all": f"about {self.seconds / 60:.1f} min", "peak memory": f"{self.peak_bytes / 2**30:.2f} GiB"}
        return {"steps": self.steps, **step, **whole}


def forecast(recipe: Recipe) -> Forecast:
    """Build the recipe's net and time a few steps on noise. Raises FgvcError for all that training would refuse."""
    started = time.perf_counter()
    index = training_index(recipe)
    rows = len(index.rows("train"))
    with process_group(recipe.train) as group:
        settled = settle(recipe, index, group)
        train = settled.recipe.train.fitting(rows, group.world)
        recipe, process = settled.recipe.model_copy(update={"train": train}), settled_process(group, train)
        micro = train.images // (process.world * train.grad_accum_steps)
        steps_per_epoch = rows // (micro * process.world) // train.grad_accum_steps
        if not steps_per_epoch:
            raise FgvcError(f"train.batch_size: {train.batch_size} is more than the {rows} training images")
        steps = min(steps_per_epoch * train.epochs, train.last_step)
        noise = open_noise_step(recipe, index, process)
        passes = count_images(noise.step.net, *noise.step.attachments.average)
        building = time.perf_counter() - started
        at = [0.0, *((step + 0.5) / STEPS for step in range(STEPS))]
        seconds = [train.grad_accum_steps * noise.run(micro, progress) for progress in at]
        mean, forwards = statistics.mean(seconds[1:]), sum(images for images, _ in passes)  # the first one sets up kernels
        peak = peak_memory(process.device)
        return Forecast(
            recipe=settled.recipe,
            images={split: len(index.rows(split)) for split in ("train", "val", "test")},
            steps=steps,
            forwards=forwards / (micro * (STEPS + 1)),
            parameters=sum(p.numel() for p in noise.step.parameters()),
            step_seconds=mean,
            hours=mean * steps / 3600,
            parts=_parts(noise, index, steps=steps, step=mean, building=building),
            peak_bytes=peak,
            techniques={kind: technique.forwards for kind, technique in noise.step.techniques.items()},
            notes=(*settled.notes, *noise.built.weights.doubts, *noise.step.attachments.notes),
        )


def _parts(noise: NoiseStep, index: ImageIndex, *, steps: int, step: float, building: float) -> dict[str, float]:
    """Seconds of a run's parts, from the seconds in which an image is read, augmented and evaluated. Loading processes work
    beside the steps."""
    recipe, train = noise.recipe, noise.recipe.train
    read, augmented = _reading_seconds(noise, index)
    answer, beside = _answer_seconds(noise), max(train.workers, 1)

    def seconds(load: float, compute: float) -> float:
        return load + compute if train.workers == 0 else max(load / beside, compute)

    learned, held_out = len(index.rows("train")), len(index.rows("val"))
    epochs = steps / max(1, learned // train.images)
    fitted = min(learned, MAX_IMAGES) * (seconds(read, answer) + VIEWS * seconds(augmented, answer))
    linear = recipe.model.weights != "none"
    validations = held_out * (1 + epochs / train.validate_every)
    proved = min(PROOF_IMAGES, held_out or learned)
    return {
        "start-up": STARTING + building + fitted * linear,
        "training": steps * seconds(train.images / noise.process.world * augmented, step),
        "validation": validations * seconds(read, answer),
        "export": EXPORTING + held_out * seconds(read, answer) + proved * PROVING * answer,
    }


def _reading_seconds(noise: NoiseStep, index: ImageIndex) -> tuple[float, float]:
    """Seconds in which one process reads an image as evaluation sees it, and as training does."""
    rows, spec, seed = spread(index.rows("train"), IMAGES), noise.built.preprocess, noise.recipe.train.seed
    started = time.perf_counter()
    for _ in evaluation_loader(index, rows, spec=spec, batch_size=IMAGES, workers=0, some=True):
        pass
    plain = time.perf_counter()
    augmenter = Augmenter(noise.recipe.augment, spec, seed=seed)
    for _ in augmented_views(index, rows, augmenter=augmenter, views=1, batch_size=IMAGES, seed=seed, workers=0):
        pass
    return (plain - started) / len(rows), (time.perf_counter() - plain) / len(rows)


def _answer_seconds(noise: NoiseStep) -> float:
    """Seconds of a forward of one image in a batch, in eval mode."""
    net, size = as_classifier(noise.step.net), noise.recipe.image.size
    x = torch.randn(IMAGES, 3, *size, device=noise.process.device).contiguous(memory_format=noise.layout)
    noise.step.eval()
    times = []
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            net.forward_head(net.forward_features(x)).sum().item()
            times.append(time.perf_counter() - started)
    noise.step.train()
    return min(times) / IMAGES


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
