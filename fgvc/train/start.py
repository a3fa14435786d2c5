"""What a run starts from: heads that are fitted to frozen nets before the first step, its own and those of its teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.config import Preprocess
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.evaluate.features import pooled
from fgvc.image.augment import Augmenter
from fgvc.model.backbone import memory_format
from fgvc.model.probe import fit_probe, linear_head, put_head
from fgvc.recipe import Recipe
from fgvc.train.batch import Normalise, to_batch
from fgvc.train.session import Session, spread
from fgvc.types import FgvcError, ImageIndex

VIEWS = 2  # augmented ones of each image, beside the one that evaluation sees
MAX_IMAGES = 20_000


@dataclass(frozen=True, slots=True)
class HeadFit:
    """What is recorded of it."""

    images: int
    views: int  # of each image
    strength: float  # scikit-learn's C
    held_out_loss: float | None  # nats

    def __str__(self) -> str:
        held_out = "" if self.held_out_loss is None else f", cross-entropy {self.held_out_loss:.3f} where held out"
        return f"logistic regression on {self.images} images, {self.views} views each{held_out}"


def fit_head(session: Session) -> HeadFit:
    """Fit the plain head by logistic regression to the features of the training images (up to MAX_IMAGES, spread evenly) on
    rank 0; all ranks and the moving average have it afterwards.

    Raises FgvcError where the head is not linear, or no image can be read.
    """
    net = session.step.net
    net.eval()
    try:
        fit = _fitted(session, net, session.preprocess, where="model.head")
    finally:
        session.step.train()
    if session.ema is not None:
        session.ema.set(net)
    return fit


def fit_teachers(session: Session) -> dict[str, HeadFit]:
    """The same, by name, for each teacher whose head is to be fitted, from views at its own size, with its own mean and std."""
    found = {}
    for name, probed in session.probed.items():
        found[name] = _fitted(session, probed.net, probed.spec, where=name)
        probed.fit = asdict(found[name])
    return found


def _fitted(session: Session, net: nn.Module, spec: Preprocess, *, where: str) -> HeadFit:
    """`net`, in eval mode and on the device, gets its linear head fitted to what the run learns from. `where`: in errors."""
    process, recipe = session.runtime, session.recipe
    fits: list[HeadFit] = []

    def fit() -> None:
        rows = spread(session.index.rows("train"), MAX_IMAGES)
        seen = view_features(net, spec, session.index, rows, recipe=recipe, device=process.device)
        classes = len(session.index.classes)
        try:
            probe = fit_probe(seen.vectors, seen.labels, classes=classes, groups=seen.rows, seed=recipe.train.seed)
        except FgvcError as error:
            raise FgvcError(f"{where}: {error}") from error
        put_head(net, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
        loss = None if np.isnan(probe.loss) else round(probe.loss, 4)
        fits.append(HeadFit(len(np.unique(seen.rows)), 1 + VIEWS, probe.strength, loss))

    process.first(fit)
    process.same_tensors(linear_head(net).parameters())
    return HeadFit(**process.gather(asdict(fits[0]) if fits else {})[0])


@dataclass(frozen=True, slots=True)
class ViewFeatures:
    """What a frozen net's classifier reads of N views: first of every image as evaluation sees it, then of augmented ones."""

    vectors: NDArray[np.float32]  # (N,D)
    labels: NDArray[np.int64]  # (N,)
    rows: NDArray[np.int64]  # (N,) of the index


def view_features(
    net: nn.Module,
    spec: Preprocess,
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    recipe: Recipe,
    device: torch.device,
    views: int = VIEWS,
) -> ViewFeatures:
    """Of `rows`, through `net` in eval mode and on the device; `spec` is the preprocessing that this net wants, `views` how many
    times each is augmented as the recipe says. Raises FgvcError where no image can be read."""
    vectors, labels, seen = [], [], []
    with torch.inference_mode():
        for x, y, row in _views(net, spec, index, rows, recipe, device, views):
            vectors.append(pooled(net, x).flatten(1).float().cpu().numpy())
            labels.append(y.cpu().numpy())
            seen.append(row.numpy())
    return ViewFeatures(np.concatenate(vectors), np.concatenate(labels), np.concatenate(seen))


def _views(
    net: nn.Module,
    spec: Preprocess,
    index: ImageIndex,
    rows: NDArray[np.int64],
    recipe: Recipe,
    device: torch.device,
    views: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (B,3,H,W) on the device, labels (B,) and rows (B,)."""
    layout, workers, batch, seed = memory_format(net), recipe.train.workers, 64, recipe.train.seed
    for plain in evaluation_loader(index, rows, spec=spec, batch_size=batch, workers=workers):
        yield plain.images.to(device, memory_format=layout), plain.labels, plain.index
    normalise, augmenter = Normalise(spec, device, layout), Augmenter(recipe.augment, spec, seed=seed)
    for raw in augmented_views(
        index, rows, augmenter=augmenter, views=views, batch_size=batch, seed=seed, workers=workers
    ):
        yield to_batch(raw, normalise).x, raw.labels, raw.index
