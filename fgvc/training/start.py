"""What a run starts from: heads that are fitted to frozen nets before the first step, its own and those of its teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.data.index import ImageIndex
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.errors import FgvcError
from fgvc.evaluation.features import pooled
from fgvc.models.backbone import memory_format
from fgvc.models.probe import Probe, fit_probe, linear_head, put_head
from fgvc.training.batch import Normalise, to_batch
from fgvc.training.session import Session, spread

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


def fit_teachers(session: Session) -> dict[str, HeadFit]:
    """Fit the head of each teacher that is to have one by logistic regression to its features of the training images, seen at its
    own size, with its own mean and std, on rank 0; all ranks have it afterwards. What was fitted, by the teacher's name.

    Raises FgvcError where no image can be read."""
    found = {}
    for name, probed in session.probed.items():
        found[name] = _fitted(session, probed.net, probed.spec, where=name)
        probed.fit = asdict(found[name])
    return found


def _fitted(session: Session, net: nn.Module, spec: Preprocess, *, where: str) -> HeadFit:
    """`net`, in eval mode and on the device, gets its linear head fitted to what the run learns from. `where`: in errors."""
    process = session.runtime
    fits: list[HeadFit] = []

    def fit() -> None:
        probe, said, _ = fitted_probe(session, net, spec, where=where)
        put_head(net, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
        fits.append(said)

    process.first(fit)
    process.same_tensors(linear_head(net).parameters())
    return HeadFit(**process.gather(asdict(fits[0]) if fits else {})[0])


def fitted_probe(
    session: Session, net: nn.Module, spec: Preprocess, *, where: str
) -> tuple[Probe, HeadFit, ViewFeatures]:
    """Logistic regression on what `net`, in eval mode and on the device, makes of the training images (up to MAX_IMAGES, spread
    evenly), and the features that it learned from. `where`: in errors. Raises FgvcError where no image can be read."""
    recipe, index = session.recipe, session.index
    rows = spread(index.rows("train"), MAX_IMAGES)
    seen = view_features(net, spec, index, rows, recipe=recipe, device=session.runtime.device)
    try:
        probe = fit_probe(
            seen.vectors, seen.labels, classes=len(index.classes), groups=seen.rows, seed=recipe.train.seed
        )
    except FgvcError as error:
        raise FgvcError(f"{where}: {error}") from error
    loss = None if np.isnan(probe.loss) else round(probe.loss, 4)
    return probe, HeadFit(len(np.unique(seen.rows)), 1 + VIEWS, probe.strength, loss), seen


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
    layout, workers, batch, seed = memory_format(net), recipe.train.workers, 64, recipe.train.seed
    normalise, augmenter = Normalise(spec, device, layout), Augmenter(recipe.augment, spec, seed=seed)

    def images() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for plain in evaluation_loader(index, rows, spec=spec, batch_size=batch, workers=workers):
            yield plain.images.to(device, memory_format=layout), plain.labels, plain.index
        for raw in augmented_views(
            index, rows, augmenter=augmenter, views=views, batch_size=batch, seed=seed, workers=workers
        ):
            yield to_batch(raw, normalise).x, raw.labels, raw.index

    vectors, labels, seen = [], [], []
    with torch.inference_mode():
        for x, y, row in images():
            vectors.append(pooled(net, x).flatten(1).float().cpu().numpy())
            labels.append(y.cpu().numpy())
            seen.append(row.numpy())
    return ViewFeatures(np.concatenate(vectors), np.concatenate(labels), np.concatenate(seen))
