"""The interface of a technique: its base class, and the batches, views and outputs that its hooks take and return.

Shapes: x (B,3,H,W) images, f (B,C,h,w) feature maps, z (B,K) logits, y (B,) labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fgvc.config.knots import Scheduled
from fgvc.errors import FgvcError
from fgvc.io.names import nearest
from fgvc.models.target import Target

if TYPE_CHECKING:
    from fgvc.techniques.plan import Context, Plan


@dataclass(slots=True)
class Batch:
    """The images of one micro-batch on the device, after normalisation. `x` may be mixed; `x_clean` never is."""

    x: Tensor  # (B,3,H,W) float32
    target: Target
    x_clean: Tensor  # (B,3,H,W) float32
    labels: Tensor  # (B,) int64: the clean labels
    index: Tensor  # (B,) int64: rows of the ImageIndex
    geometry: Tensor  # (B,2,3) float32: crop pixel -> original pixel
    render: Tensor | None = None  # (B,3,h,w) float32: x_clean as it was rendered, maybe larger (Plan.render)
    boxes: Tensor | None = None  # (B,4) float32: left, top, right, bottom in the upright original; NaN where there is none

    @property
    def finest(self) -> Tensor:
        """x_clean at the highest resolution that there is."""
        return self.x_clean if self.render is None else self.render


@dataclass(slots=True)
class View:
    """The batch, or a variant of it, that goes through the network."""

    name: str
    x: Tensor  # (V,3,H,W)
    target: Target
    weight: float = 1.0  # of its cross-entropy in the base loss; 0: it is dropped before its forward
    classifies: bool = True
    bn: Literal["shared", "own"] = "shared"  # shared: one forward with the clean images; own: its batch statistics
    gated: bool = True  # whether gates act on it
    stage: Literal["before", "after"] = "before"  # before: made from the batch; after: from the network's outputs


def _no_maps(features: Tensor, target: Target, method: Any, size: Sequence[int]) -> Tensor:
    raise FgvcError("an output that was built without a mapper has no class maps")


@dataclass(slots=True)
class Output:
    """Outputs of a network for one view."""

    view: View
    features: Tensor  # (V,C,h,w) or the backbone's own layout: output of forward_features
    logits: Tensor  # (V,K)
    hooked: Mapping[str, Tensor] = field(default_factory=dict)  # outputs of the hooked modules, this view's rows
    mapper: Callable[[Tensor, Target, Any, Sequence[int]], Tensor] = _no_maps  # that network's fgvc.models.class_maps.ClassMapper
    _maps: dict[str, Tensor] = field(default_factory=dict)

    def map(self, method: str) -> Tensor:
        """Class map (V,h,w) float32, detached, of each sample's class (of most weight). Computed once a method."""
        if method not in self._maps:
            self._maps[method] = self.mapper(self.features, self.view.target, method, self.view.x.shape[2:])
        return self._maps[method]


Maps = Callable[
    [np.ndarray, Any, "Callable[[Tensor, np.ndarray], Tensor]", int],
    "Iterator[tuple[np.ndarray, np.ndarray, Tensor]]",
]
"""Class maps of training images, by the net as it is, of the whole image and its label.

Takes rows of the index, a method of pytorch-grad-cam, a change to images (B,3,H,W) of rows (B,) before their forward, and the
images a forward. Yields rows (B,), which of them could be read (B,) bool, and the maps (R,H,W) in [0,1] of those.
"""


@dataclass(frozen=True, slots=True)
class EpochStart:
    """State of a run before an epoch, and services for a technique to prepare by; before the first of a resumed session too."""

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
    first: Callable[[Callable[[], None]], None]  # call something on rank 0, while the others wait
    say: Callable[[str], None]  # one line in the run's log
    # A key that is the same for runs whose loaders give the same images in this epoch; None: that can't be told.
    replays: Callable[[], str | None] = lambda: None


@dataclass(frozen=True, slots=True)
class Draws:
    """All random and scheduled values of one step, fixed before the forward so that nothing depends on the order of calls:
    recomputation under activation checkpointing and SAM's second pass read the same numbers."""

    progress: float  # share of the training that is done, in [0, 1); 1 in an evaluation
    of: Mapping[str, Any] = field(default_factory=dict)  # by technique: the value of its `draw`
    state: dict[str, dict[str, Any]] = field(default_factory=dict)  # by technique: see `Context.state`


class Technique:
    """Base class of a technique: an addition to training that leaves the deployed graph as it is.

    A subclass describes itself by the attributes below, and overrides the hooks that it needs. The order of a step is `on_batch`,
    `views`, the forward, `views_after`, `losses`, the update, `after_step`. A public method that is no hook is an error when the
    class is made: it would be a misspelt hook, which is never called. docs/techniques.md walks through one.
    """

    source: ClassVar[str] = ""  # the paper
    forwards: ClassVar[str] = "0"  # what it adds to a step, in forwards of the backbone
    leaves: ClassVar[str] = "nothing"  # what it leaves in the deployed graph's weights
    measures: tuple[str, ...] = ()  # terms of `losses` that are reported and not minimised
    weights: Mapping[str, Scheduled] = {}  # term of `losses` -> its weight
    remembers_images: bool = False  # whether its state from epoch to epoch is by row of the image index

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, value in vars(cls).items():
            if callable(value) and not name.startswith("_") and not hasattr(Technique, name):
                near = nearest(name, HOOKS)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(HOOKS)}."
                raise TypeError(f"{cls.__name__}.{name}: no hook of a technique; {hint} Its own methods begin with _")

    def setup(self, plan: Plan) -> None:
        """Attach to the net, once, when it is built: hooks, gates, added and replaced modules, notes for the user.

        Raises FgvcError, naming the technique, where this backbone or input can't have it.
        """

    def before_epoch(self, start: EpochStart) -> None:
        """Prepare an epoch; called before each, the first of a resumed session included."""

    def on_sample(self, image: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
        """Change the whole image (H,W,3) of a row of the index before it is cropped; called in the loader's workers."""
        return image

    def mixes(self, progress: float) -> float:
        """Share of the steps at `progress` in [0,1) in which it mixes images and their labels.

        It draws in those steps only (`Context.draw` is None in the others), and no other technique that mixes does.
        """
        return 0.0

    def draw(self, rng: np.random.Generator, batch: Batch) -> Any:
        """Draw all that is random in a step, from a stream of its own; later `Context.draw`."""
        return None

    def on_batch(self, batch: Batch, ctx: Context) -> Batch:
        """Change the batch of the main view: `x` and `target`."""
        return batch

    def views(self, batch: Batch, ctx: Context) -> list[View]:
        """Add views made from the batch."""
        return []

    def views_after(self, batch: Batch, outputs: Mapping[str, Output], ctx: Context) -> list[View]:
        """Add views made from the network's outputs; with batch statistics of their own (bn="own")."""
        return []

    def losses(self, outputs: Mapping[str, Output], ctx: Context) -> dict[str, Tensor]:
        """Compute terms by name, each a scalar: those of `weights` are minimised, those of `measures` reported."""
        return {}

    def after_step(self, ctx: Context) -> None:
        """Update statistics that follow the features, or maps for the next epoch; called after the optimizer's step."""

    def refine(self, output: Output, ctx: Context) -> Tensor:
        """Crop the images (B,3,H,W) to what it attends to, for an evaluation in two passes."""
        return output.view.x

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


MAIN = "main"  # name of the view of the batch itself
HOOKS = tuple(name for name, value in vars(Technique).items() if callable(value) and not name.startswith("_"))


def overrides(technique: Technique, hook: str) -> bool:
    """Whether a technique implements this hook."""
    return getattr(type(technique), hook, None) is not getattr(Technique, hook)
