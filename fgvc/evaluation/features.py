"""Features of a frozen backbone: the vectors that its classifier would read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fgvc.config.images import Preprocess
from fgvc.config.recipe import Recipe
from fgvc.data.index import ImageIndex
from fgvc.data.loader import evaluation_loader
from fgvc.data.quality.colour import Normalisation, normalisation_of
from fgvc.errors import FgvcError
from fgvc.models.backbone import memory_format
from fgvc.models.classifier import as_classifier
from fgvc.models.net import shipped_net
from fgvc.models.weights import load_weights, preprocess_for, stated_keys, unlikely
from fgvc.runs.distributed import process_group

BATCH = 64
Embed = Callable[[Tensor], NDArray[np.float32]]
"""Function from images (B,3,H,W) on the host to their features (B,D)."""


def input_normalisation(recipe: Recipe) -> Normalisation | None:
    """Mean and std that normalise the network's input, as R, G, B with white as 1. None where the weights are not there, which
    is no fault of the data. Nothing is fetched."""
    model = recipe.model
    if model.weights == "hub":  # timm knows what they expect
        model = model.model_copy(update={"weights": "none"})
    try:
        net = shipped_net(model, None, recipe.image.size)
        weights = load_weights(net, model, stated=stated_keys(recipe.deploy))
    except FgvcError:
        return None
    spec = preprocess_for(recipe.deploy, recipe.image.size, weights)
    normalisation = normalisation_of(spec)
    expected = np.allclose((normalisation.mean, normalisation.std), (weights.mean, weights.std), rtol=1e-3, atol=1e-4)
    return replace(normalisation, from_weights=expected, doubts=unlikely(spec, weights))


@dataclass(frozen=True, slots=True)
class Features:
    """Features of N images, and the time that they took."""

    rows: NDArray[np.int64]  # (N,) of the index: those that could be read
    vectors: NDArray[np.float32]  # (N,D)
    seconds: float  # of the net alone, for one image in batches of BATCH: the median
    unreadable: tuple[str, ...]  # path and reason of those left out


@dataclass(frozen=True, slots=True)
class Frozen:
    """A backbone with its first weights, and the preprocessing of its input."""

    net: nn.Module
    spec: Preprocess


def load_frozen(recipe: Recipe, classes: int) -> Frozen:
    """Load the recipe's backbone. Raises FgvcError where its weights are random or not there, or it has no pooled features."""
    if recipe.model.weights == "none":
        raise FgvcError(
            "model.weights: features of random weights say nothing of labels; name weights, or leave this out"
        )
    net = shipped_net(recipe.model, classes, recipe.image.size).eval()
    spec = preprocess_for(recipe.deploy, recipe.image.size, load_weights(net, recipe.model))
    with torch.inference_mode():
        if pooled(net, torch.zeros(1, 3, *spec.size)).ndim != 2:
            raise FgvcError(f"model: {recipe.model.name} has no pooled features before its last layer")
    return Frozen(net, spec)


def compute_features(
    recipe: Recipe,
    backbone: Frozen,
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Compute pooled features of `rows` before the last layer, as evaluation sees images. Unreadable images are left out."""
    with process_group(recipe.train) as process:
        embed = make_embedder(backbone.net, process.device)
        workers = recipe.train.workers
        return embed_rows(embed, index, rows, spec=backbone.spec, workers=workers, progress=progress)


def make_embedder(net: nn.Module, device: torch.device) -> Embed:
    """Make the function that computes a timm net's pooled features on a device, in eval mode. A map of one cell is a vector."""
    layout = memory_format(net)
    net = net.eval().to(device).to(memory_format=layout)

    @torch.inference_mode()
    def embed(x: Tensor) -> NDArray[np.float32]:
        v = pooled(net, x.to(device, memory_format=layout)).float()
        return (v.flatten(1) if v.shape[2:].numel() == 1 else v).cpu().numpy()

    return embed


def embed_rows(
    embed: Embed,
    index: ImageIndex,
    rows: NDArray[np.int64],
    *,
    spec: Preprocess,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Embed `rows` as evaluation with `spec` sees them. Unreadable images are left out."""
    rows_read, vectors, seconds, done = [], [], [], 0
    bad: list[str] = []
    for batch in evaluation_loader(index, rows, spec=spec, batch_size=BATCH, workers=workers):
        started = time.perf_counter()
        vectors.append(embed(batch.images))
        seconds.append((time.perf_counter() - started) / len(batch.labels))
        rows_read.append(batch.index.numpy())
        bad += [str(error) for error in batch.bad]
        done += len(batch.labels) + len(batch.bad)
        if progress:
            progress(done, len(rows))
    return Features(np.concatenate(rows_read), np.concatenate(vectors), statistics.median(seconds), tuple(bad))


def pooled(net: nn.Module, x: Tensor) -> Tensor:
    """Compute the input of a timm net's last layer for images (B,3,H,W): (B,D) where it pools first."""
    v: Tensor = as_classifier(net).forward_head(as_classifier(net).forward_features(x), pre_logits=True)
    return v
