"""Fits to the training images before the first step, by logistic regression: heads of frozen nets, scales and norms."""

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
from fgvc.data.index import ImageIndex, spread
from fgvc.data.loader import augmented_views, evaluation_loader
from fgvc.data.splits import group_codes, sampled
from fgvc.errors import FgvcError
from fgvc.evaluation.features import pooled
from fgvc.models.backbone import memory_format
from fgvc.models.probe import Probe, fit_probe, linear_head, put_head
from fgvc.reparam.unfold import NormedConv2d, ScaledConv2d, fit
from fgvc.training.batch import Normalise, to_batch
from fgvc.training.session import Session

UNFOLD_IMAGES = 512  # of which the statistics of convolutions are taken
VIEWS = 2  # augmented views of each image, beside the one that evaluation sees
MAX_IMAGES = 20_000  # to which a head is fitted


@dataclass(frozen=True, slots=True)
class HeadFit:
    """Record of a fitted head."""

    images: int
    views: int  # of each image
    strength: float  # scikit-learn's C
    held_out_loss: float | None  # nats

    def __str__(self) -> str:
        held_out = "" if self.held_out_loss is None else f", cross-entropy {self.held_out_loss:.3f} where held out"
        return f"logistic regression on {self.images} images, {self.views} views each{held_out}"


@dataclass(frozen=True, slots=True)
class UnfoldedFit:
    """Record of fitted scales and norms."""

    convolutions: int
    norms: int  # of these with a norm; the others have a scale alone
    known: int  # whose scale is gamma / sigma of the weights' own norms
    images: int  # by which the others are fitted
    smallest: float  # scale, of the channels' 5th percentile
    largest: float  # 95th

    def __str__(self) -> str:
        what = f"{self.norms} batch norms are put back behind their convolutions, and trained" if self.norms else (
            f"{self.convolutions} convolutions have a batch norm folded into them, and are trained with the scale that it left"
        )  # fmt: skip
        source = f"{self.known} from the norms of the weights, the others " * bool(self.known) + f"by {self.images} images"
        return f"{what}: scales {self.smallest:.3g} to {self.largest:.3g} (90 % of the channels), {source}"


def fit_unfolded(session: Session) -> UnfoldedFit | None:
    """Fit what stands for batch norms that a deployed file has folded, on rank 0; all ranks have it afterwards, and the moving
    average. The net's function stays. None where there is no such convolution. Raises FgvcError where no image can be read."""
    net, process = session.step.net, session.process
    convolutions = [module for module in net.modules() if isinstance(module, ScaledConv2d)]
    if not convolutions:
        return None
    rows = spread(session.index.rows("train"), UNFOLD_IMAGES)

    def images() -> Iterator[Tensor]:
        workers = session.recipe.train.workers
        for batch in evaluation_loader(session.index, rows, spec=session.preprocess, batch_size=64, workers=workers):
            yield batch.images.to(process.device, memory_format=memory_format(net))

    process.first(lambda: fit(net, images(), session.weights.scales))
    process.same_tensors([*net.parameters(), *net.buffers()])
    if session.ema is not None:
        session.ema.set(net)
    weights = dict(session.step.named_parameters())
    for name, start in session.starts.items():
        start.copy_(weights[name].detach())
    session.step.train()
    scales = np.quantile(torch.cat([conv.scale.flatten() for conv in convolutions]).cpu().numpy(), [0.05, 0.95])
    norms = sum(isinstance(module, NormedConv2d) for module in net.modules())
    return UnfoldedFit(len(convolutions), norms, len(session.weights.scales), len(rows), *scales.tolist())


def fit_teachers(session: Session) -> dict[str, HeadFit]:
    """Fit the head of each probed teacher by logistic regression to its features of the training images, at its own size, mean
    and std, on rank 0; all ranks have it afterwards. Returns the fits by the teachers' names.

    Raises FgvcError where no image can be read."""
    fits = {}
    for name, probed in session.probed.items():
        fits[name] = _fit_head(session, probed.net, probed.spec, where=name)
        probed.fit = asdict(fits[name])
    return fits


def _fit_head(session: Session, net: nn.Module, spec: Preprocess, *, where: str) -> HeadFit:
    """Fit the linear head of `net`, in eval mode and on the device, to the run's training images. `where`: in errors."""
    process = session.process
    fits: list[HeadFit] = []

    def fit() -> None:
        probe, head_fit, _ = fit_net_probe(session, net, spec, where=where)
        put_head(net, torch.from_numpy(probe.weight), torch.from_numpy(probe.bias))
        fits.append(head_fit)

    process.first(fit)
    process.same_tensors(linear_head(net).parameters())
    return HeadFit(**process.gather(asdict(fits[0]) if fits else {})[0])


def fit_net_probe(
    session: Session, net: nn.Module, spec: Preprocess, *, where: str
) -> tuple[Probe, HeadFit, ViewFeatures]:
    """Fit logistic regression to the features by `net`, in eval mode and on the device, of the training images (of more than
    MAX_IMAGES a sample with every class); returns these features, too. `where`: in errors. Raises FgvcError where no image can be
    read."""
    recipe, index = session.recipe, session.index
    rows = index.rows("train")
    rows = rows[sampled(index.labels[rows], MAX_IMAGES, least=1, seed=recipe.data.split_seed)]
    features = view_features(net, spec, index, rows, recipe=recipe, device=session.process.device)
    # Held out together: all views of an image, and all images of one of the set's groups, which are as alike.
    groups = features.rows if index.groups is None else group_codes(index.groups)[features.rows]
    try:
        probe = fit_probe(features.vectors, features.labels, classes=len(index.classes), groups=groups, seed=recipe.train.seed)
    except FgvcError as error:
        raise FgvcError(f"{where}: {error}") from error
    loss = None if np.isnan(probe.loss) else round(probe.loss, 4)
    return probe, HeadFit(len(np.unique(features.rows)), 1 + VIEWS, probe.strength, loss), features


@dataclass(frozen=True, slots=True)
class ViewFeatures:
    """Features of N views before a frozen net's classifier: first every image as evaluation sees it, then augmented views."""

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
    """Compute the features of `rows` by `net`, in eval mode and on the device; `spec` is this net's preprocessing, `views` the
    number of augmented views of each by the recipe. Raises FgvcError where no image can be read."""
    layout, workers, batch, seed = memory_format(net), recipe.train.workers, 64, recipe.train.seed
    normalise, augmenter = Normalise(spec, device, layout), Augmenter(recipe.augment, spec, seed=seed)

    def images() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for plain in evaluation_loader(index, rows, spec=spec, batch_size=batch, workers=workers, what="features"):
            yield plain.images.to(device, memory_format=layout), plain.labels, plain.index
        for raw in augmented_views(
            index, rows, augmenter=augmenter, views=views, batch_size=batch, seed=seed, workers=workers
        ):
            yield to_batch(raw, normalise).x, raw.labels, raw.index

    vectors, labels, view_rows = [], [], []
    with torch.inference_mode():
        for x, y, row in images():
            vectors.append(pooled(net, x).flatten(1).float().cpu().numpy())
            labels.append(y.cpu().numpy())
            view_rows.append(row.numpy())
    return ViewFeatures(np.concatenate(vectors), np.concatenate(labels), np.concatenate(view_rows))
