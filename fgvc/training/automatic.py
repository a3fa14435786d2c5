"""Choice of what a recipe leaves `auto`, `train.batch_size` and `train.precision`, by a measurement before the run begins."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fgvc.config.recipe import Recipe
from fgvc.config.training import Train
from fgvc.data.index import ImageIndex
from fgvc.runs.distributed import ProcessGroup
from fgvc.training.noise import NoiseStep, open_noise_step

BATCH, SMALLEST = 32, 8  # images of a step: that of the recipes' rates, and where a set is too small for it
STEPS = 10  # of an epoch at least
TIMED = 3  # steps of each precision, after one that sets up kernels
TIMED_IMAGES = 8  # in such a step
FASTER = 0.95  # of fp32's time: a smaller gain is none
COPIES = 5  # of the weights: their gradients, Adam's two moments, an average
HEADROOM = 1.5  # over what a forward keeps: gradients of it, and what operators need meanwhile
SHARE = 0.7  # of the free memory that a step may take


@dataclass(frozen=True, slots=True)
class Settled:
    """A recipe without `auto`, with a sentence on each measurement."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def settle(recipe: Recipe, index: ImageIndex, process: ProcessGroup, *, measure: bool = True) -> Settled:
    """Settle batch size and precision on rank 0, for all ranks, by a few steps on noise at the run's own size. `measure=False`:
    the batch by the number of images alone, and fp32. Raises FgvcError for all that training would refuse."""
    if recipe.train.settled:
        return Settled(recipe)
    images = len(index.rows("train"))
    train, notes = recipe.train, list[str]()
    if train.batch_size == "auto":
        train = train.model_copy(update={"batch_size": batch_for(images, process.world)})
        notes.append(f"train.batch_size: {train.batch_size}, of {images} training images")
    if not measure:
        precision = "fp32" if train.precision == "auto" else train.precision
        return Settled(_with(recipe, train.model_copy(update={"precision": precision})), tuple(notes))

    def decide() -> None:
        decided.append(_measured(recipe, train, notes, index, process))

    decided: list[tuple[Train, list[str]]] = []
    process.first(decide)
    train, notes = process.gather(decided[0] if decided else None)[0]
    return Settled(_with(recipe, train), tuple(notes))


def batch_for(images: int, world: int = 1) -> int:
    """Images per step for a training set: BATCH, or less where an epoch would have fewer than STEPS steps, in equal shares of
    `world` processes."""
    batch = BATCH
    while batch > SMALLEST and images // batch < STEPS:
        batch //= 2
    return max(-(-batch // world), 2) * world


def _measured(
    recipe: Recipe, train: Train, notes: list[str], index: ImageIndex, process: ProcessGroup
) -> tuple[Train, list[str]]:
    step = open_noise_step(_with(recipe, train.model_copy(update={"precision": "fp32"})), index, process)
    if train.precision == "auto":
        seconds = precision_seconds(step)
        train = train.model_copy(update={"precision": faster(seconds)})
        unit = " of CPU time" * (process.device.type == "cpu")
        notes = [*notes, f"train.precision: {train.precision}, {described(seconds)}{unit}"]
    if recipe.train.batch_size == "auto":
        count = micro_batches_for(step, train, process.world)
        if count > train.grad_accum_steps:
            train = train.model_copy(update={"grad_accum_steps": count})
            notes = [*notes, f"train.grad_accum_steps: {count}, for want of memory: so many micro-batches a step"]
    return train, notes


def precision_seconds(step: NoiseStep) -> dict[str, float]:
    """Least seconds of a step of TIMED_IMAGES images (on an accelerator of the whole batch) by precision, measured in turn. On a
    CPU in its own time, which other programs that are busy don't lengthen."""
    device = step.process.device.type
    train = step.recipe.train
    images = TIMED_IMAGES if device == "cpu" else train.images // (step.process.world * train.grad_accum_steps)
    clock = time.process_time if device == "cpu" else time.perf_counter

    def run(name: str) -> float:
        autocast = torch.autocast(device, torch.bfloat16) if name == "bf16" else None
        began = clock()
        step.run(images, autocast=autocast)
        return clock() - began

    try:
        first = {name: run(name) for name in ("fp32", "bf16")}
    except RuntimeError:  # a device, or an operator of the net, that has no bf16
        return {"fp32": run("fp32")}
    if first["bf16"] > 4 * run("fp32"):  # some CPUs compute it bit by bit
        return first
    rounds = [{name: run(name) for name in first} for _ in range(TIMED)]
    return {name: min(times[name] for times in rounds) for name in first}


def faster(seconds: dict[str, float]) -> str:
    """The precision to train with, by the seconds of a step: bf16 where it is below FASTER times fp32."""
    return "bf16" if seconds.get("bf16", float("inf")) < FASTER * seconds["fp32"] else "fp32"


def described(seconds: dict[str, float]) -> str:
    """Describe the measured seconds in words."""
    if "bf16" not in seconds:
        return "as bf16 can't be computed here"
    times = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
    return f"the faster of both by a step of a few images here: {times}"


def micro_batches_for(step: NoiseStep, train: Train, world: int) -> int:
    """Return the least number of equal micro-batches of a rank's share of a step whose memory is there."""
    share = train.images // world
    per_image = HEADROOM * step.saved_bytes(2) / 2
    fixed = COPIES * sum(p.numel() * p.element_size() for p in step.step.parameters())
    room = SHARE * free_bytes(step.process.device) - fixed
    possible = [count for count in range(train.grad_accum_steps, share // 2 + 1) if share % count == 0]
    fitting = [count for count in possible if share // count * per_image <= room]
    return fitting[0] if fitting else possible[-1] if possible else train.grad_accum_steps


def free_bytes(device: torch.device) -> int:
    """Memory that is free for this process: of the accelerator, or of the machine within the limits of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in rows:
            free = [1024 * int(rows["MemAvailable"].split()[0])]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # another kind of control group, or none
        pass
    return max(0, min(free))


def _with(recipe: Recipe, train: Train) -> Recipe:
    return recipe.model_copy(update={"train": train})


def settled_process(process: ProcessGroup, train: Train) -> ProcessGroup:
    """The process with the precision of settings that are settled."""
    assert train.precision != "auto"
    return replace(process, precision=train.precision)
