"""What a run starts from: the head that is fitted to the frozen net before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.evaluate.features import pooled
from fgvc.image.augment import Augmenter
from fgvc.model.probe import fit_probe, linear_head, put_head
from fgvc.train.batch import to_batch
from fgvc.train.session import Session, spread

VIEWS = 2  # augmented ones of each image, beside the one that evaluation sees
MAX_IMAGES = 20_000


@dataclass(frozen=True, slots=True)
class HeadFit:
    """What is recorded of it."""

    images: int
    views: int  # of each image
    strength: float  # scikit-learn's C
    held_out_loss: float | None  # nats


def fit_head(session: Session) -> HeadFit:
    """Fit the plain head by logistic regression to the features of the training images (up to MAX_IMAGES, spread evenly) on
    rank 0; all ranks and the moving average have it afterwards.

    Raises FgvcError where the head is not linear, or no image can be read.
    """
    net, process = session.step.net, session.runtime
    head = linear_head(net)
    fits: list[HeadFit] = []

    def fit() -> None:
        vectors, labels, rows = _features(session)
        probe = fit_probe(
            vectors, labels, classes=len(session.index.classes), groups=rows, seed=session.recipe.train.seed
        )
        put_head(net, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
        loss = None if np.isnan(probe.loss) else round(probe.loss, 4)
        fits.append(HeadFit(len(np.unique(rows)), 1 + VIEWS, probe.strength, loss))

    process.first(fit)
    process.same_tensors(head.parameters())
    if session.ema is not None:
        session.ema.set(net)
    return HeadFit(**process.gather(asdict(fits[0]) if fits else {})[0])


def _features(session: Session) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """What the classifier reads of each view (N,D), its label (N,) and row (N,)."""
    rows = spread(session.index.rows("train"), MAX_IMAGES)
    net = session.step.net
    vectors, labels, seen = [], [], []
    net.eval()
    try:
        with torch.inference_mode():
            for x, y, row in _views(session, rows):
                vectors.append(pooled(net, x).flatten(1).float().cpu().numpy())
                labels.append(y.cpu().numpy())
                seen.append(row.numpy())
    finally:
        session.step.train()
    return np.concatenate(vectors), np.concatenate(labels), np.concatenate(seen)


def _views(session: Session, rows: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B,3,H,W) on the device, labels (B,) and rows (B,): first as evaluation sees them, then as training does."""
    recipe, device, layout = session.recipe, session.runtime.device, session.normalise.memory_format
    workers, spec, batch = recipe.train.workers, session.preprocess, 64
    for plain in evaluation_loader(session.index, rows, spec=spec, batch_size=batch, workers=workers):
        yield plain.images.to(device, memory_format=layout), plain.labels, plain.index
    augmenter = Augmenter(recipe.augment, spec, seed=recipe.train.seed)
    for raw in augmented_views(
        session.index, rows, augmenter=augmenter, views=VIEWS, batch_size=batch, seed=recipe.train.seed, workers=workers
    ):
        yield to_batch(raw, session.normalise).x, raw.labels, raw.index
