"""A run opened to be looked at: its recipe, the weights that one of its selections names, and the images that it recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fgvc.config.data import Split
from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe, Selected
from fgvc.data.index import ImageIndex
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.models.backbone import memory_format
from fgvc.runs.build import build_net
from fgvc.runs.distributed import runtime
from fgvc.runs.folder import read_run, recorded_classes, recorded_preprocess, selected_weights
from fgvc.runs.images import RunImages, recorded_images
from fgvc.runs.step import StepModule
from fgvc.runtime.engine import Session


@dataclass(frozen=True, slots=True)
class Answers:
    """What a classifier said of N images of one part, in the order of their rows."""

    rows: NDArray[np.int64]  # (N,) of the index
    labels: NDArray[np.int64]  # (N,)
    logits: NDArray[np.float32]  # (N,K)
    unreadable: tuple[str, ...]  # path and reason of those left out


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """One run's net in eval mode, re-parameterised blocks in it and the added branches beside it, without hooks. All of it lies
    in the run's folder."""

    run: Path
    recipe: Recipe
    classes: tuple[str, ...]
    preprocess: Preprocess
    select: Selected
    step: StepModule
    identity: str | None  # of the checkpoint that its weights are from: see `fgvc.runs.checkpoint.identity`

    @property
    def apart(self) -> list[str]:
        """What the names of files say of other weights than those that the recipe selects; nothing of these."""
        return [self.select] * (self.select != self.recipe.selected)

    @contextmanager
    def placed(self, device: str | None = None) -> Iterator[tuple[torch.device, torch.memory_format]]:
        """The net on the device that it was trained on, or another, in the layout that suits it, for as long as this lasts."""
        here = self.recipe.train if device is None else self.recipe.train.model_copy(update={"device": device})
        with runtime(here) as process:
            layout = memory_format(self.step.net)
            self.step.to(process.device).net.to(memory_format=layout)
            yield process.device, layout


@dataclass(frozen=True, slots=True)
class Subject(LoadedRun):
    """A run beside its data."""

    images: RunImages

    @property
    def index(self) -> ImageIndex:
        return self.images.index

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Of one part, maybe none. Raises FgvcError where a file of it is gone, or not the one that the run began with."""
        return self.images.rows(split)

    def rows_of(self, split: Split | None = None) -> tuple[Split, NDArray[np.int64]]:
        """A part and its rows; by default validation, or test where there is none. Raises FgvcError where it is empty, or as
        `rows` does."""
        chosen: Split = split or ("val" if len(self.index.rows("val")) else "test")
        if not len(rows := self.rows(chosen)):
            raise FgvcError(f"{self.run}: its data has no {chosen} part")
        return chosen, rows

    def answers(
        self, rows: NDArray[np.int64], *, index: ImageIndex | None = None, device: str | None = None
    ) -> Answers:
        """The net's logits for images seen as in serving, in fp32. Unreadable ones are left out. `index`: of other images."""
        seen, labels, logits, bad = [], [], [], []
        loader = evaluation_loader(
            self.index if index is None else index,
            rows,
            spec=self.preprocess,
            batch_size=64,
            workers=self.recipe.train.workers,
        )
        with self.placed(device) as (where, layout), torch.inference_mode():
            for batch in loader:
                z = self.step.net(batch.images.to(where, memory_format=layout))
                logits.append(z.float().cpu().numpy())
                labels.append(batch.labels.numpy())
                seen.append(batch.index.numpy())
                bad += [str(error) for error in batch.bad]
        return Answers(np.concatenate(seen), np.concatenate(labels), np.concatenate(logits), tuple(bad))


def onnx_answers(
    session: Session, index: ImageIndex, rows: NDArray[np.int64], *, spec: Preprocess, workers: int
) -> Answers:
    """An ONNX classifier's logits for images seen through `spec`. Unreadable ones are left out."""
    seen, labels, logits, bad = [], [], [], []
    for batch in evaluation_loader(index, rows, spec=spec, batch_size=64, workers=workers):
        logits.append(session.logits(batch.images.numpy()))
        labels.append(batch.labels.numpy())
        seen.append(batch.index.numpy())
        bad += [str(error) for error in batch.bad]
    return Answers(np.concatenate(seen), np.concatenate(labels), np.concatenate(logits), tuple(bad))


def subject(
    run: Path,
    select: Selected | None = None,
    *,
    branches: bool = False,
    root: Path | None = None,
    max_pixels: int | None = None,
) -> Subject:
    """Open a run and the images that it recorded; see `load_run`. `root`: where its set lies now; `max_pixels`: of a picture, in
    place of the recipe's limit. Raises FgvcError, too, where the data's classes are no longer those that were trained."""
    found = load_run(run, select, branches=branches)
    if max_pixels is not None:
        data = found.recipe.data.model_copy(update={"max_megapixels": max_pixels / 1e6})
        found = replace(found, recipe=found.recipe.model_copy(update={"data": data}))
    return beside_data(found, root)


def beside_data(found: LoadedRun, root: Path | None = None) -> Subject:
    """An opened run, and its images; see `subject`."""
    images = recorded_images(found.run, found.recipe, root)
    if images.index.classes != found.classes:
        raise FgvcError(f"{found.run}: the classes in {images.index.root} are not those that the run was trained on")
    return Subject(**{field.name: getattr(found, field.name) for field in fields(found)}, images=images)


def load_run(run: Path, select: Selected | None = None, *, branches: bool = False) -> LoadedRun:
    """Open a run by its folder alone. `branches`: with the weights of the added branches, too; else those are as they were made.

    Raises FgvcError where the folder is no run, or it has no such weights.
    """
    recipe = read_run(run)
    classes, preprocess = recorded_classes(run), recorded_preprocess(run)
    chosen = select or recipe.selected
    found = selected_weights(run, recipe, chosen)
    step = build_net(recipe, len(classes), pretrained=False).step
    try:
        step.net.load_state_dict(found.weights)
        if branches:  # but for those that teachers alone would call for
            own = {key: value for key, value in found.branches.items() if key.partition(".")[0] in step.branches}
            step.branches.load_state_dict(own)
    except RuntimeError as error:
        raise FgvcError(f"{run}: its checkpoint does not fit its recipe: {error}") from error
    return LoadedRun(run, recipe, classes, preprocess, chosen, step.eval(), found.identity)
