"""Adversarial erasing in rounds: AE-PSL (Wei et al., CVPR 2017, arXiv:1703.08448).

The network is trained, the regions that it relies on are erased from the images, it is trained on the rest, and so on. Masks are
made between rounds with pytorch-grad-cam, stored in the run's folder, and applied before any geometry. After stripping nothing
is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from fgvc.errors import FgvcError
from fgvc.models.cam.offline import Rows
from fgvc.models.class_maps import normalised
from fgvc.rng import SPARED, generator
from fgvc.techniques.ae_psl.rounds import GRID, Grids, MaskRounds, Masks
from fgvc.techniques.ae_psl.settings import AePslSettings
from fgvc.techniques.api import EpochStart, Technique
from fgvc.techniques.masks import erase, united
from fgvc.techniques.plan import Plan

CHUNK = 32  # images a forward


class AePsl(Technique):
    """Adversarial erasing in rounds: I_{t+1} = I_t outside of region(map of I_t by the net of round t), the data
    set's mean colour inside."""

    source: ClassVar[str] = "Wei et al., CVPR 2017, arXiv:1703.08448"
    forwards: ClassVar[str] = "0, and a pass over the images between rounds"
    remembers_images = True

    def __init__(self, config: AePslSettings) -> None:
        self.config = config
        self._round = torch.zeros(1, dtype=torch.int64).share_memory_()  # shared with the workers
        self._masks: MaskRounds | None = None
        self._empty = 0  # number of empty maps in a round
        self._checkpointed: Masks | None = None  # the masks of the round
        self._colour = np.zeros(3, dtype=np.uint8)

    @override
    def setup(self, plan: Plan) -> None:
        """Check the backbone. Raises FgvcError where it has no class map."""
        plan.map("gradcam")

    @override
    def before_epoch(self, start: EpochStart) -> None:
        """Make the next round's masks between two rounds, or resume that where it was interrupted.

        Those of a round that has begun are in the checkpoint, too: a file that is gone or damaged is written anew. Raises
        FgvcError where they are not, as in a checkpoint of an older fgvc.
        """
        # Workers are forked after the first call: only the round, which changes later, is shared with them.
        first = self._masks is None
        masks = self._masks = self._masks or MaskRounds(start.folder / "masks")
        self._colour = np.array(start.colour, dtype=np.uint8)
        begun = int(self._round[0])
        if first and begun:
            start.first(lambda: self._restore(start, begun))
        number = begun
        if start.fresh:  # one round after the other, and none back, whatever becomes of the schedule
            number += self._round_of(start) > number

        def make() -> None:
            if masks.whole(number, epoch=start.number) is None:
                start.say(f"ae_psl: masks of round {number}")
                erase_more = partial(self._erase_more, start, number=number)
                masks.make(number, epoch=start.number, images=start.images, rows=start.rows, erase=erase_more)
                if self._empty:
                    start.say(f"ae_psl: {self._empty} maps were empty, by which nothing was erased")

        if number > begun:
            start.first(make)
            self._checkpointed = masks.whole(number)
        self._round[0] = number

    def _restore(self, start: EpochStart, number: int) -> None:
        """Write the file of the current round's masks from the checkpoint, where it is gone or damaged."""
        assert self._masks is not None
        path, masks = self._masks.path(number), self._masks.whole(number)
        if self._checkpointed is None:
            if not path.is_file():
                raise FgvcError(f"{path}: the masks of this round are gone; restore them, or start anew")
            self._checkpointed = np.load(path)
        elif masks is None or not np.array_equal(masks, self._checkpointed):
            start.say(f"{path}: gone or damaged; written anew from the checkpoint")
            self._masks.put(number, self._checkpointed, epoch=-1)

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {} if self._checkpointed is None else {"masks": torch.from_numpy(self._checkpointed)}
        return {"round": int(self._round[0]), **masks}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round[0] = state["round"]
        self._checkpointed = state["masks"].numpy() if "masks" in state else None

    @override
    def on_sample(self, image: NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
        number = int(self._round[0])
        return image if not number or self._masks is None else self._masks.paint(number, image, row, self._colour)

    def _round_of(self, start: EpochStart) -> int:
        """Round of the epoch that starts: 0 is the first. The loss so far may have stopped the rounds."""
        ends = [-(-number * start.epochs // self.config.rounds) for number in range(1, self.config.rounds)]
        reached = sum(end <= start.number for end in ends)
        losses = [start.losses[end - 1] for end in ends[:reached]]
        for number, loss in enumerate(losses[1:], start=1):
            if self.config.stop is not None and loss > self.config.stop * losses[0]:
                return number
        return reached

    def _erase_more(self, start: EpochStart, rows: Rows, *, number: int) -> Iterator[tuple[Rows, Grids]]:
        """Erased cells of each image from round `number` on: the regions of all rounds, within bounds."""
        assert self._masks is not None
        masks, self._empty = self._masks, 0
        spared = generator(SPARED, start.seed).random(start.images) >= self.config.probability

        def erased(x: Tensor, batch: Rows) -> Tensor:
            old = torch.from_numpy(masks.grids(number - 1, batch)).to(x.device)
            return erase(x, F.interpolate(old[:, None].float(), x.shape[2:], mode="nearest-exact")[:, 0] > 0, "zero")

        for batch, readable, maps in start.maps(rows, self.config.map, erased, CHUNK):
            grids = masks.grids(number - 1, batch)
            cells = F.adaptive_avg_pool2d(maps[:, None], GRID)[:, 0]
            self._empty += int((maps.flatten(1).amax(1) == 0).sum())
            both = torch.from_numpy(grids[readable]), normalised(cells)
            grids[readable] = united(*both, self.config.region, largest=self.config.largest).numpy()
            grids[spared[batch]] = False
            yield batch, grids
