"""The images that a run learns from: their index, checked for the techniques, and the loader of one rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.data.augment import Augmenter
from fgvc.data.cache import WHOLE, DecodeCache
from fgvc.data.deployed import refuse_unstated
from fgvc.data.index import ImageIndex
from fgvc.data.loader import TrainLoader, train_loader
from fgvc.data.quality.stored import refuse_shares
from fgvc.data.unseen import SETTINGS, all_seen
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.evaluation.judging import evidence
from fgvc.evaluation.side import Side
from fgvc.runs.build import refuse_names
from fgvc.runs.distributed import ProcessGroup
from fgvc.runs.images import first_index, read_index
from fgvc.runs.step import StepModule
from fgvc.runtime.engine import OnnxSession

Notify = Callable[[str], None]


def training_index(recipe: Recipe, index: ImageIndex | None = None) -> ImageIndex:
    """Read the images of a recipe for training, or check `index`, that of a run that goes on. Raises FgvcError where a technique
    needs annotations that these data do not have."""
    refuse_names(recipe)
    index = _first_index(recipe) if index is None else index
    for kind, config in enabled_techniques(recipe.techniques).items():
        if not config.requires.boxes:
            continue
        if index.boxes is None:
            raise FgvcError(
                f"techniques.{kind}: learns from the object's box in each image, and the data in {recipe.data.root} have no "
                f"boxes; give data in the CUB layout with bounding_boxes.txt, or set techniques.{kind}=null"
            )
        refuse_shares(index)
    return index


def _first_index(recipe: Recipe) -> ImageIndex:
    """The images that a run begins with; where a deployed file may have seen all of them, the refusal says how well it names
    them."""
    try:
        return first_index(recipe)
    except NoUnseenImagesError as error:
        index, model = read_index(recipe, copies=False), recipe.model
        if index.given_splits or model.onnx is None:
            raise
        refuse_unstated(recipe)
        keys = {key: value for key, value in recipe.deploy if key in Preprocess.model_fields and value is not None}
        session = OnnxSession(model.onnx.expanduser(), output=model.output)
        spec = Preprocess(size=recipe.image.size, **keys)
        side = Side(path=model.onnx, kind="onnx", classes=index.classes, preprocess=spec, session=session)
        raise NoUnseenImagesError(all_seen(index.root, SETTINGS, evidence(side, index))) from error


def training_loader(
    recipe: Recipe,
    process: ProcessGroup,
    index: ImageIndex,
    step: StepModule,
    preprocess: Preprocess,
    notify: Notify | None,
) -> TrainLoader:
    """Make the loader of this rank's training images, rendered at the largest size that an epoch or a technique needs. Raises
    FgvcError where the batch or the size can't be."""
    rows = index.rows("train")
    micro = recipe.train.images // (process.world * recipe.train.grad_accum_steps)
    if micro < 2 and any(isinstance(module, _BatchNorm) for module in step.modules()):
        raise FgvcError(
            f"train.batch_size: {recipe.train.batch_size} over {process.world} processes x train.grad_accum_steps "
            f"{recipe.train.grad_accum_steps} leaves {micro} image a forward, and a batch norm needs two"
        )
    side = max(recipe.image.largest_train_size, recipe.image.scaled(step.attachments.render))
    if max(side) > 4096:
        raise FgvcError(f"images would have to be rendered at {side} pixels for a technique or a teacher; at most 4096")
    rendered = preprocess.model_copy(update={"size": side})
    loader = train_loader(
        index,
        rows,
        augmenter=Augmenter(recipe.augment, rendered, seed=recipe.train.seed),
        batch_size=micro,
        seed=recipe.train.seed,
        workers=recipe.train.workers,
        cache=_cache(recipe, index, rows, process, notify, rendered),
        rank=process.rank,
        world=process.world,
        on_sample=[hook for _, hook in step.hooks("on_sample")],
        max_unreadable=recipe.data.max_unreadable,
        balanced=recipe.train.sampling == "balanced",
    )
    if loader.batches_per_epoch < recipe.train.grad_accum_steps:
        loader.close()
        raise FgvcError(f"train.batch_size: {recipe.train.batch_size} is more than the {len(rows)} training images")
    return loader


def _cache(
    recipe: Recipe,
    index: ImageIndex,
    rows: np.ndarray,
    process: ProcessGroup,
    notify: Notify | None,
    rendered: Preprocess,
) -> DecodeCache | None:
    """Open the decode cache where the recipe has one, built by rank 0 while the others wait. Without antialiasing it has whole
    images: shrunk ones, whose pixels are means, would not look as the deployed stack makes them."""
    if recipe.cache == "none":
        return None
    side, folder = recipe.augment.shrink_to(rendered.size) if rendered.antialias else WHOLE, recipe.cache_dir
    process.first(lambda: DecodeCache.open(index, rows, side=side, folder=folder, progress=notify).close())
    return DecodeCache.open(index, rows, side=side, folder=folder)
