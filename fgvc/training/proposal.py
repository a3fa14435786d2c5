"""A recipe for labelled images: backbone, size, epochs and batch by how many there are, how large, and what a step takes here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import try_to_load_from_cache
from PIL import Image

from fgvc.config.loading import merge, recipe_tree, validate
from fgvc.config.recipe import Recipe
from fgvc.config.shipped import DEFAULT, recipe_file
from fgvc.data.index import ImageIndex, spread
from fgvc.data.recipe import resolve_data
from fgvc.data.sources.read import read_source
from fgvc.io.times import about
from fgvc.models.weights import PACKAGED, is_packaged
from fgvc.runtime.engine import available_cpus
from fgvc.training.forecast import Forecast, forecast

BUDGET = 3600.0  # seconds that a proposed run may take here, from the command to the bundle
BACKBONES = (
    ("mobilenetv3_small_100.lamb_in1k", 0), (PACKAGED, 0), ("resnet50.a1_in1k", 1000), ("convnext_tiny.in12k_ft_in1k", 2000),
)  # fmt: skip
"""Nets of increasing cost, and the training images from which their capacity is of use."""
SIZES = (96, 128, 160, 192, 224)
NEARLY = 1.05  # of a size is as good as the size
SIZE_SAMPLE = 64  # pictures whose size is read
EPOCHS, FEWEST_EPOCHS = 12, 3  # those of any/plain, and what no time saves
SHOWN = 60_000  # images in all epochs together: a large set has fewer of them
TIME_CONSTANTS = 5  # of the moving average in a run


@dataclass(frozen=True, slots=True)
class Proposal:
    """Settings over those of any/plain, and why, a line each."""

    tree: dict[str, dict[str, Any]]
    reasons: tuple[str, ...]
    forecast: Forecast


def propose(images: Path, *, progress: Callable[[str], None] = lambda line: None) -> Proposal:
    """Propose settings for images: a folder, or a table. `progress`: is told what is measured. Raises FgvcError as reading them
    does, and where no pretrained weights are within reach."""
    root = {"data": {"root": str(images.absolute())}}
    quick = {"data.copies_together": False}  # near copies are looked for when a run begins
    index = read_source(_recipe(root | quick).data)
    learned = len(index.rows("train"))
    backbones = within_reach(learned)
    size, why_size = size_for(_shorter_sides(index))
    epochs = epochs_for(learned)
    settings: dict[str, Any] = {
        "image.size": size, "train.epochs": epochs, "train.batch_size": "auto", "train.precision": "auto",
        "train.workers": max(1, min(4, available_cpus() - 1)),
    }  # fmt: skip
    for name, weights in reversed(backbones):
        progress(f"a step of {name} at {size} pixels is timed")
        chosen = {"model.backbone": name, "model.weights": weights}
        costs = forecast(_recipe(root | quick | settings | chosen))
        if costs.seconds <= BUDGET:
            break
    shrunk, why_less = within_budget(costs, size=size, epochs=epochs)
    if why_less:
        settings |= shrunk
        progress("a step of that is timed")
        costs = forecast(_recipe(root | quick | settings | chosen))
    settled = costs.recipe.train
    settings |= {
        "train.batch_size": settled.batch_size, "train.precision": settled.precision,
        "train.grad_accum_steps": settled.grad_accum_steps, "ema.decay": decay_for(costs.steps),
    }  # fmt: skip
    tree: dict[str, dict[str, Any]] = {}
    merge(tree, root)
    merge(tree, settings | chosen)
    others = [other for other, _ in backbones if other != chosen["model.backbone"]]
    reasons = (
        index.recognised,
        f"model.backbone: {chosen['model.backbone']}, weights: {chosen['model.weights']}"
        + (f", of {', '.join(others)} by time" if others else ", whose weights are within reach")
        + "; name the net and the size that you deploy",
        f"image.size: {settings['image.size']}, {why_less or why_size}",
        f"train.epochs: {settings['train.epochs']}, for {learned} images to learn from",
        *(note for note in costs.notes if note.startswith("train.")),
        f"ema.decay: {settings['ema.decay']}, for {costs.steps} steps",
        f"{about(costs.seconds)} on this machine, from the start to the bundle: "
        + ", ".join(f"{part} {about(seconds)}" for part, seconds in costs.parts.items()),
        *_cautions(index),
    )
    return Proposal(tree, reasons, costs)


def within_reach(images: int) -> list[tuple[str, str]]:
    """Nets of BACKBONES for so many training images whose pretrained weights need no network, with `model.weights`, the cheapest
    first; that of PACKAGED from the hub where there are none."""
    reachable = [(name, weights) for name, least in BACKBONES if images >= least and (weights := _local_weights(name))]
    return reachable or [(PACKAGED, "hub")]


def _local_weights(name: str) -> str:
    if is_packaged(name):
        return "packaged"
    config = timm.get_pretrained_cfg(name)
    hub = None if config is None else config.hf_hub_id
    names = ("model.safetensors", "pytorch_model.bin")
    return "hub" if hub and any(isinstance(try_to_load_from_cache(hub, file), str) for file in names) else ""


def size_for(sides: list[int]) -> tuple[int, str]:
    """The largest of SIZES that the pictures' shorter sides fill, and why."""
    if not sides:
        return SIZES[-1], "the usual one: no picture's size could be read"
    median = round(statistics.median(sides))
    size = max((side for side in SIZES if side <= NEARLY * median), default=SIZES[0])
    return size, f"of pictures whose shorter side has {median} pixels (median of {len(sides)})"


def epochs_for(images: int) -> int:
    """Epochs for so many training images."""
    return min(EPOCHS, max(FEWEST_EPOCHS, round(SHOWN / max(images, 1))))


def decay_for(steps: int) -> float:
    """Decay of the moving average whose time constant, 10 to 1000 steps, a run of so many is TIME_CONSTANTS times as long as."""
    return round(1 - 1 / min(1000, max(10, steps / TIME_CONSTANTS)), 3)


def within_budget(costs: Forecast, *, size: int, epochs: int) -> tuple[dict[str, int], str]:
    """A smaller size, and fewer epochs where that is not enough, for a run within BUDGET, and why; empty where it is."""
    if costs.seconds <= BUDGET:
        return {}, ""
    fixed = costs.parts["start-up"] + costs.parts["export"]
    each = (costs.seconds - fixed) / epochs / size**2  # of an epoch and a pixel
    room = max(BUDGET - fixed, BUDGET / 2)
    smaller = [side for side in SIZES if side <= size and each * epochs * side**2 <= room]
    taken = smaller[-1] if smaller else min(SIZES[2], size)
    fewer = epochs if smaller else max(FEWEST_EPOCHS, min(epochs, int(room / (each * taken**2))))
    why = f"since {epochs} epochs at {size} would take {about(costs.seconds)} here"
    return {"image.size": taken, "train.epochs": fewer}, why


def _recipe(settings: dict[str, Any]) -> Recipe:
    tree = recipe_tree(Recipe, recipe_file(DEFAULT)).tree
    merge(tree, settings)
    return resolve_data(validate(Recipe, tree, where="fgvc init --data"))


def _shorter_sides(index: ImageIndex) -> list[int]:
    """Shorter sides of some pictures, by their headers; of none where they are no files."""
    if index.contents is not None:
        return []
    sides = []
    for row in spread(np.arange(len(index)), SIZE_SAMPLE):
        try:
            with Image.open(index.path(int(row))) as picture:
                sides.append(min(picture.size))
        except (OSError, ValueError, Image.DecompressionBombError):  # `fgvc data check` names it
            continue
    return sides


def _cautions(index: ImageIndex) -> Iterator[str]:
    counts = np.bincount(index.labels[index.rows("train")], minlength=len(index.classes))
    if counts.min() < 5:
        yield f"few: {int((counts < 5).sum())} of {len(counts)} classes have fewer than 5 images to learn from"
    if counts.max() >= 10 * max(counts.min(), 1):
        yield f"unbalanced: {counts.min()} to {counts.max()} images a class; see train.sampling and loss.class_weights"
    if not len(index.rows("val")):
        yield "no validation: the last epoch ships"
