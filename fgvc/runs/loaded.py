"""An opened run: its recipe, the weights that one of its selections names, and the images that it recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fgvc.config.data import Split
from fgvc.config.images import Ending, Preprocess
from fgvc.config.recipe import Recipe, Selected
from fgvc.data.index import ImageIndex
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.io.display import Display
from fgvc.io.files import Content
from fgvc.models.backbone import memory_format
from fgvc.runs.build import build_net
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import (
    read_run,
    recorded_classes,
    recorded_file,
    recorded_preprocess,
)
from fgvc.runs.images import RunImages, recorded_images
from fgvc.runs.measured import read_measured, store_measured
from fgvc.runs.step import StepModule
from fgvc.runs.weights import TrainedWeights, selected_weights
from fgvc.runtime.engine import OnnxSession


@dataclass(frozen=True, slots=True)
class Answers:
    """A classifier's logits for N images, in the order of their rows."""

    rows: NDArray[np.int64]  # (N,) of the index
    labels: NDArray[np.int64]  # (N,)
    logits: NDArray[np.float32]  # (N,K)
    unreadable: tuple[str, ...]  # path and reason of those left out
    ending: Ending | None = None  # of the file: with a sigmoid, each class's probability is its own


@dataclass(frozen=True, repr=False)  # without slots: the images are read when they are first asked for, and kept
class LoadedRun(Display):
    """An opened run: its recipe, and one selection of its weights in a net in eval mode, re-parameterised blocks in it and the
    added branches beside it, without hooks. Its images are those that it recorded when it began."""

    folder: Path
    recipe: Recipe
    classes: tuple[str, ...]
    preprocess: Preprocess
    select: Selected
    step: StepModule
    identity: str | None  # of the checkpoint that its weights are from: see `fgvc.runs.checkpoint.identity`
    root: Path | None = None  # where its set lies now; None: where the recipe says

    @cached_property
    def images(self) -> RunImages:
        """Images that the run recorded. Raises FgvcError where they can't be read, or their classes have changed."""
        images = recorded_images(self.folder, self.recipe, self.root)
        if images.index.classes != self.classes:
            raise FgvcError(f"{self.folder}: the classes in {images.index.root} are not those that the run was trained on")
        return images

    @property
    def index(self) -> ImageIndex:
        return self.images.index

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Rows of the index in one split, maybe none. Raises FgvcError where a file of it is gone, or not the one that the run
        began with."""
        return self.images.rows(split)

    def rows_of(self, split: Split | None = None) -> tuple[Split, NDArray[np.int64]]:
        """A split and its rows; by default validation, or test where there is none. Raises FgvcError where it is empty, or as
        `rows` does."""
        given: Split = split or ("val" if len(self.index.rows("val")) else "test")
        if not len(rows := self.rows(given)):
            raise FgvcError(f"{self.folder}: its data has no {given} split")
        return given, rows

    @property
    def suffix(self) -> list[str]:
        """Suffix of file names for other weights than those that the recipe selects; empty for these."""
        return [self.select] * (self.select != self.recipe.selected)

    @contextmanager
    def on_device(self, device: str | None = None) -> Iterator[tuple[torch.device, torch.memory_format]]:
        """Move the net to the device that it was trained on, or to `device`, in its memory format. It stays there afterwards;
        only the process group ends with the context."""
        train = self.recipe.train if device is None else self.recipe.train.model_copy(update={"device": device})
        with process_group(train) as process:
            layout = memory_format(self.step.net)
            self.step.to(process.device).net.to(memory_format=layout)
            yield process.device, layout

    def answers(self, rows: NDArray[np.int64], *, index: ImageIndex | None = None, device: str | None = None) -> Answers:
        """Compute the net's logits for images preprocessed as in serving, in fp32. Unreadable ones are left out. `index`: of
        other images."""
        index = self.index if index is None else index
        with self.on_device(device) as (place, layout), torch.inference_mode():

            def logits(images: torch.Tensor) -> NDArray[np.float32]:
                output: NDArray[np.float32] = self.step.net(images.to(place, memory_format=layout)).float().cpu().numpy()
                return output

            workers, ending = self.recipe.train.workers, self.preprocess.ending
            return _compute_answers(logits, index, rows, spec=self.preprocess, workers=workers, ending=ending)

    @property
    def facts(self) -> Mapping[str, object]:
        return {"": self.folder, "weights": self.select}

    def measured(self, file: str) -> dict[str, Any]:
        """Read what was measured of this run's weights: see `fgvc.runs.measured.read_measured`."""
        return read_measured(self.folder, file, (self.select, self.identity))

    def store(
        self, files: Mapping[str, Content], rows: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None
    ) -> bool:
        """Store results in the run's folder: see `fgvc.runs.measured.store_measured`."""
        return store_measured(self.folder, files, rows=rows, identity=self.identity)

    def selecting(self, select: Selected) -> LoadedRun:
        """Copy the run with other weights, in a net of its own. Raises FgvcError where it has none."""
        weights = selected_weights(self.folder, self.recipe, select)
        step = _load_step(self.folder, self.recipe, len(self.classes), weights, branches=False)
        copy = replace(self, select=select, step=step, identity=weights.state.identity)
        if "images" in vars(self):
            vars(copy)["images"] = self.images
        return copy


def onnx_answers(
    session: OnnxSession, index: ImageIndex, rows: NDArray[np.int64], *, spec: Preprocess, workers: int
) -> Answers:
    """Compute an ONNX classifier's logits for images preprocessed by `spec`. Unreadable ones are left out."""
    return _compute_answers(
        lambda images: session.logits(images.numpy()), index, rows, spec=spec, workers=workers, ending=session.file.ending
    )


def _compute_answers(
    logits_of: Callable[[torch.Tensor], NDArray[np.float32]],
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    spec: Preprocess,
    workers: int,
    ending: Ending | None,
) -> Answers:
    read, labels, logits, unreadable = [], [], [], []
    for batch in evaluation_loader(index, rows, spec=spec, batch_size=64, workers=workers, what="answers"):
        logits.append(logits_of(batch.images))
        labels.append(batch.labels.numpy())
        read.append(batch.index.numpy())
        unreadable += [str(error) for error in batch.bad]
    return Answers(np.concatenate(read), np.concatenate(labels), np.concatenate(logits), tuple(unreadable), ending)


def load_run(
    folder: Path,
    select: Selected | Literal["end"] | None = None,
    *,
    branches: bool = False,
    root: Path | None = None,
    max_pixels: int | None = None,
) -> LoadedRun:
    """Open a run with the weights that `select` names (default: those that it ships; end: those that its training ended with),
    by its folder alone; its images are read when they are asked for.

    `branches`: with the weights of the added branches, too; else those are as they were made. `root`: where its set lies now;
    `max_pixels`: of a picture, in place of the recipe's limit. Raises FgvcError where the folder is no run, or it has no such
    weights.
    """
    recipe = read_run(folder)
    classes, preprocess = recorded_classes(folder), recorded_preprocess(folder)
    select = recipe.end if select == "end" else select or recipe.selected
    recorded_file(folder, recipe)
    weights = selected_weights(folder, recipe, select)
    step = _load_step(folder, recipe, len(classes), weights, branches=branches)
    if max_pixels is not None:
        data = recipe.data.model_copy(update={"max_megapixels": max_pixels / 1e6})
        recipe = recipe.model_copy(update={"data": data})
    return LoadedRun(folder, recipe, classes, preprocess, select, step, weights.state.identity, root)


def _load_step(folder: Path, recipe: Recipe, classes: int, trained: TrainedWeights, *, branches: bool) -> StepModule:
    """Build the net of a recipe with trained weights, in eval mode."""
    step = build_net(recipe, classes, pretrained=False).step
    try:
        step.net.load_state_dict(trained.weights)
        if branches:  # without those that only teachers need
            present = {key: value for key, value in trained.state.branches.items() if key.partition(".")[0] in step.branches}
            step.branches.load_state_dict(present)
    except RuntimeError as error:
        raise FgvcError(f"{folder}: its checkpoint does not fit its recipe: {error}") from error
    return step.eval()
