"""What a technique is given and gives: batches, views of them, and what the network said of these.

Shapes: x (B,3,H,W) images, f (B,C,h,w) feature maps, z (B,K) logits, y (B,) labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fgvc.errors import FgvcError
from fgvc.models.target import Target


@dataclass(slots=True)
class Batch:
    """One step's images on the device, after normalisation. `x` may be mixed; `x_clean` never is."""

    x: Tensor  # (B,3,H,W) float32
    target: Target
    x_clean: Tensor  # (B,3,H,W) float32
    labels: Tensor  # (B,) int64: the clean labels
    index: Tensor  # (B,) int64: rows of the ImageIndex
    geometry: Tensor  # (B,2,3) float32: crop pixel -> original pixel
    render: Tensor | None = None  # (B,3,h,w) float32: x_clean as it was rendered, maybe larger (Plan.render)
    boxes: Tensor | None = None  # (B,4) float32: x, y, width, height in original pixels, upright; NaN where there is none

    @property
    def finest(self) -> Tensor:
        """x_clean at the highest resolution that there is."""
        return self.x_clean if self.render is None else self.render


@dataclass(slots=True)
class View:
    """A copy of the batch that the network sees beside the main one."""

    name: str
    x: Tensor  # (V,3,H,W)
    target: Target
    weight: float = 1.0  # of its cross-entropy in the base loss; 0: the view is not built
    classifies: bool = True
    bn: Literal["shared", "own"] = "shared"  # shared: one forward with the clean images; own: its batch statistics
    gated: bool = True  # whether gates act on it


def _no_maps(features: Tensor, target: Target, method: Any, size: Sequence[int]) -> Tensor:
    raise FgvcError("an output that was made by hand has no class maps")


@dataclass(slots=True)
class Output:
    """What a network said about one view."""

    view: View
    features: Tensor  # (V,C,h,w) or the backbone's own layout: output of forward_features
    logits: Tensor  # (V,K)
    taps: Mapping[str, Tensor] = field(default_factory=dict)  # the taps that techniques asked for, this view's rows
    mapper: Callable[[Tensor, Target, Any, Sequence[int]], Tensor] = _no_maps  # that network's fgvc.models.class_maps.Mapper
    _maps: dict[str, Tensor] = field(default_factory=dict)

    def map(self, method: str) -> Tensor:
        """(V,h,w) float32, detached: the map of each sample's class (of most weight). Made once, whoever asks."""
        if method not in self._maps:
            self._maps[method] = self.mapper(self.features, self.view.target, method, self.view.x.shape[2:])
        return self._maps[method]


Maps = Callable[
    [np.ndarray, Any, "Callable[[Tensor, np.ndarray], Tensor]", int],
    "Iterator[tuple[np.ndarray, np.ndarray, Tensor]]",
]
"""Rows of the index, a method of pytorch-grad-cam, what to do to images (B,3,H,W) of rows (B,) first, images at a time ->
rows (B,), which of them could be read (B,) bool, and the maps (R,H,W) in [0,1] of those: of the whole image and its label,
by the net as it is."""


@dataclass(frozen=True, slots=True)
class EpochStart:
    """What a technique may know and do before an epoch, the first one of a resumed session included."""

    number: int  # of the epoch, from 0
    epochs: int
    fresh: bool  # False in mid-epoch: training went on from here before
    seed: int  # of the run
    folder: Path  # the run's
    images: int  # rows of the index
    rows: np.ndarray  # (N,) int64: the training images
    losses: Sequence[float]  # base loss of every epoch so far, the same on all ranks
    colour: tuple[int, int, int]  # the mean colour that the normalisation assumes
    maps: Maps
    first: Callable[[Callable[[], None]], None]  # do something on rank 0, while the others wait
    say: Callable[[str], None]
    # The same for runs whose loaders give the same images in this epoch; None: nobody can say.
    replays: Callable[[], str | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Draws:
    """All that is random or scheduled in one step, fixed before the forward so that nothing in it depends on the order
    of calls (recomputation under activation checkpointing and SAM's second pass read the same numbers)."""

    progress: float  # share of the whole schedule that is done, in [0, 1)
    of: Mapping[str, Any] = field(default_factory=dict)  # by technique: whatever its `draw` returned
