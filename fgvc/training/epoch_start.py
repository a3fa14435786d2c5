"""Services for techniques before an epoch: class maps of the training images by the present net, and the run's facts."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgvc import __version__
from fgvc.data.cache import stamps
from fgvc.data.loader import evaluation_loader
from fgvc.models.cam.offline import Rows, offline_maps
from fgvc.runs.environment import installed_version
from fgvc.techniques.api import EpochStart
from fgvc.techniques.settings import OfflineMethod
from fgvc.training.log import Events
from fgvc.training.session import Session

IMAGE_PACKAGES = ("torch", "albumentations", "numpy", "pillow")


def epoch_start(session: Session, out: Path, events: Events, *, stop: threading.Event) -> EpochStart:
    """Make the EpochStart of the coming epoch. Once `stop` is set, making maps ends with KeyboardInterrupt."""
    spec, progress = session.preprocess, session.progress
    whole = spec.model_copy(update={"resize": "squash", "crop_pct": 1.0})
    rgb = [round(255 * mean / spec.input_range) for mean in spec.mean]
    red, green, blue = rgb[::-1] if spec.channel_order == "bgr" else rgb

    def maps(
        rows: Rows, method: OfflineMethod, change: Callable[[Tensor, Rows], Tensor], size: int
    ) -> Iterator[tuple[Rows, np.ndarray, Tensor]]:
        def images() -> Iterator[tuple[Tensor, Tensor, Rows]]:
            # Of the rows that are left after an interruption it may be that none can be read.
            for batch in evaluation_loader(session.index, rows, spec=whole, batch_size=size, workers=0, some=False):
                batch_rows = batch.index.numpy()
                yield change(batch.images.to(session.process.device), batch_rows), batch.labels, batch_rows

        done = 0
        with events.progress(len(rows), 0, "masks"):
            for batch_rows, class_maps in offline_maps(session.step.net, images(), method):
                end = int(np.searchsorted(rows, batch_rows[-1])) + 1  # rows ascend; those left out could not be read
                yield rows[done:end], np.isin(rows[done:end], batch_rows), class_maps
                done = end
                events.done(done, len(rows))
                if stop.is_set():
                    raise KeyboardInterrupt("the masks so far are kept")
            if done < len(rows):
                yield rows[done:], np.zeros(len(rows) - done, dtype=np.bool_), torch.zeros(0, *spec.size)

    losses = [row["base"] for row in progress.history]
    return EpochStart(
        number=progress.epoch, epochs=session.recipe.train.epochs, fresh=progress.micro == 0, folder=out,
        images=len(session.index), rows=session.index.rows("train"), seed=session.recipe.train.seed,
        losses=session.process.gather(losses)[0],
        colour=(red, green, blue), maps=maps, first=session.process.first, say=events.say,
        replays=partial(_images_key, session),
    )  # fmt: skip


def _images_key(session: Session) -> str | None:
    """SHA-256 of all that decides this epoch's images: settings, files, rendering and packages; None where more decides them."""
    recipe = session.recipe
    # What a hook does to an image may depend on all of the training before; balanced epochs show an image several times.
    if session.step.hooks("on_sample") or recipe.train.sampling == "balanced":
        return None
    files = stamps(session.index, session.index.rows("train"))
    settings = recipe.model_dump(mode="json", include={"data", "deploy", "image", "augment", "cache"})
    facts = [
        __version__, settings, recipe.train.seed, session.step.attachments.render, session.train_size, files,
        session.preprocess.model_dump(mode="json"), {name: installed_version(name) for name in IMAGE_PACKAGES},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
