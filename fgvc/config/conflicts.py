"""Settings of a recipe that can't go together, each in words that name a way out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fgvc.config.knots import knot_positions
from fgvc.config.models import is_checkpoint
from fgvc.config.section import Section
from fgvc.config.technique import Mixing
from fgvc.config.techniques import enabled_techniques

if TYPE_CHECKING:
    from fgvc.config.recipe import Recipe

END = 1 - 1e-9  # of a run: its last step lies before 1


def conflicts(recipe: Recipe) -> Iterator[str]:
    """All conflicts of a recipe."""
    for check in (_averages, _validation, _steps, _norms, _first_weights, _techniques):
        yield from check(recipe)
    yield from whole_label_conflicts(recipe.techniques)


def _averages(recipe: Recipe) -> Iterator[str]:
    """Conflicts of what averages the weights."""
    if recipe.select == "ema" and recipe.ema is None:
        yield "select: ema needs an `ema:` section, for example ema.decay=0.999"
    if recipe.select == "swa" and recipe.swa is None:
        yield "select: swa needs a `swa:` section, for example swa.start=0.75"
    if recipe.ema is not None and recipe.swa is not None:
        yield "ema and swa: a run has one average of its weights; set one of them to null"
    if recipe.swa is not None and recipe.model.freeze:
        yield "swa would change the frozen batch norms of the average: set model.freeze to 0, or use ema"


def _validation(recipe: Recipe) -> Iterator[str]:
    """Conflicts of what goes by validation, where there may be none."""
    if recipe.train.refit and not recipe.data.hold_out:
        yield (
            "train.refit: trains again on validation images too, and data.hold_out: false leaves none; give one of the two"
        )
    if not recipe.data.hold_out and (recipe.select == "best" or recipe.train.patience is not None):
        setting = "select: best" if recipe.select == "best" else "train.patience"
        yield f"{setting}: goes by validation, and data.hold_out: false leaves none; give one of the two"
    if recipe.train.patience is not None and recipe.train.precise_bn:
        yield (
            "train.patience and train.precise_bn: the statistics are taken anew at the end, which is not known before with "
            "patience; set one of the two to null or 0"
        )


def _steps(recipe: Recipe) -> Iterator[str]:
    """Conflicts of a step: its batch, its images, its loss."""
    if recipe.train.batch_size != "auto" and recipe.train.batch_size % recipe.train.grad_accum_steps:
        yield (
            f"train.batch_size: {recipe.train.batch_size} images can't be divided into train.grad_accum_steps "
            f"{recipe.train.grad_accum_steps} equal micro-batches"
        )
    if recipe.optim.sam is not None and recipe.train.precision == "fp16":
        yield (
            "optim.sam: fp16 scales the loss step by step, and SAM takes two gradients in one; set train.precision "
            "to bf16 or fp32"
        )
    if recipe.loss.class_weights == "balanced" and recipe.train.sampling == "balanced":
        yield (
            "loss.class_weights and train.sampling: both balanced would favour rare classes twice over; set one of them "
            "to none or uniform"
        )
    if max(recipe.image.largest_train_size) > 4096:
        yield f"image.train_scale: training images of {recipe.image.largest_train_size} pixels; at most 4096"


def _norms(recipe: Recipe) -> Iterator[str]:
    """Conflicts of what batch norms normalise by."""
    if recipe.train.precise_bn == 1:
        yield "train.precise_bn: one image has no statistics; give some hundreds, or 0"
    if recipe.train.precise_bn and recipe.model.freeze:
        yield "train.precise_bn would change the frozen batch norms: set it or model.freeze to 0"
    if recipe.model.batch_norm == "frozen" and recipe.train.precise_bn:
        yield (
            "train.precise_bn would replace the statistics that model.batch_norm: frozen keeps; set it to 0, or "
            "model.batch_norm to batch"
        )


def _first_weights(recipe: Recipe) -> Iterator[str]:
    """Conflicts of the net and its first weights."""
    if recipe.model.onnx is not None and recipe.image.train_scale != 1:
        yield "image.train_scale: the net of model.onnx takes images of image.size alone; leave it at 1"
    if recipe.model.onnx is not None and recipe.data.first_classes is not None:
        yield "data.first_classes: the net of model.onnx has as many classes as its file; leave it out"
    # By the path alone: the recipe of a finished run can be read after the run that it began with is gone.
    trained = recipe.model.weights == "deployed" or is_checkpoint(Path(recipe.model.weights))
    if recipe.train.max_steps == 0 and recipe.model.head != "probe" and not (recipe.model.head == "timm" and trained):
        yield "train.max_steps: 0 ships the start, whose head is not fitted; set model.head to probe"
    if recipe.model.weights == "none" and recipe.model.head == "probe":
        yield "model.head: probe fits a head to pretrained features; set it to zero or timm with weights: none"
    if recipe.model.weights == "none" and recipe.optim.l2_sp:
        yield "optim.l2_sp: random weights are no place to stay near; set it to 0 with weights: none"
    if recipe.model.weights == "none" and recipe.model.batch_norm == "frozen":
        yield ("model.batch_norm: random weights have no statistics to keep; set it to batch with weights: none")


def _techniques(recipe: Recipe) -> Iterator[str]:
    """Conflicts of a technique with the other settings."""
    for kind, config in enabled_techniques(recipe.techniques).items():
        if recipe.ema is None and config.requires.average:
            yield (
                f"techniques.{kind}: needs the moving average of the weights, and there is no `ema:` section (SWA has "
                "none until its first epoch); give, for example, ema.decay=0.99"
            )
        if config.requires.boxes and recipe.data.kind not in ("auto", "cub"):
            yield (
                f"techniques.{kind}: learns from the object's box in each image, and data.kind: {recipe.data.kind} has no "
                f"boxes; give data in the CUB layout with bounding_boxes.txt, or set techniques.{kind}=null"
            )
        if config.requires.side > min(recipe.image.size):
            yield (
                f"techniques.{kind}: needs images of {config.requires.side} pixels a side or more, and image.size is "
                f"{list(recipe.image.size)}"
            )
        if config.requires.geometry and recipe.augment.hides_geometry:
            yield (
                f"techniques.{kind}: needs to know where in its image each crop lies, and augment.policy: "
                f"{recipe.augment.policy} shears, shifts and rotates without telling; set augment.policy_geometry to false, "
                "which keeps its colours alone, or augment.policy to 3-augment"
            )
        if config.requires.cross_entropy and (
            recipe.loss.kind != "cross_entropy" or recipe.loss.class_weights != "none"
        ):
            yield (
                f"techniques.{kind}: is made for the plain cross-entropy; set loss.kind to cross_entropy and "
                "loss.class_weights to none"
            )
        if (rounds := config.requires.epochs) > recipe.train.epochs:
            yield (
                f"techniques.{kind}.rounds: {rounds} rounds need as many epochs; train.epochs is {recipe.train.epochs}"
            )


def whole_label_conflicts(techniques: Section) -> list[str]:
    """Messages on techniques that need images of one label while others mix all labels in some step."""
    configs = enabled_techniques(techniques)
    mixers = {kind: config for kind, config in configs.items() if isinstance(config, Mixing)}
    times = {min(time, END) for config in mixers.values() for time in (0.0, *knot_positions(config.probability), END)}
    if not mixers or any(sum(config.share(time) for config in mixers.values()) < 1 for time in times):
        return []
    return [
        f"techniques.{kind}: learns from images of one label, and {' and '.join(mixers)} mixed in every step leave none; "
        f"give, for example, techniques.{next(iter(mixers))}.probability=0.5"
        for kind, config in configs.items()
        if config.requires.whole_labels
    ]
