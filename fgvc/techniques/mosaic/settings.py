"""Settings of `mosaic`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from fgvc.config.section import ShareRange
from fgvc.config.technique import PairMixing


class MosaicSettings(PairMixing):
    """Put each image and three others together into one."""

    technique: ClassVar[str] = "fgvc.techniques.mosaic.technique:Mosaic"

    kind: Literal["mosaic"] = "mosaic"
    until: float = Field(
        0.8, gt=0, le=1, description="share of the run after which none is made: the last epochs see whole images"
    )
    style: Literal["cells", "canvas"] = Field(
        "cells",
        description="cells: each image, reduced, fills its cell of a cross | canvas: as detectors do it, in full size on a "
        "canvas twice as large, of which a window is seen",
    )
    split: ShareRange = Field((0.3, 0.7), description="cells: where the cross lies, as shares of the sides")
    scale: tuple[float, float] = Field((0.5, 1.5), description="canvas: scale of the window")
    shift: float = Field(0.1, ge=0, le=0.3, description="canvas: the window's largest shift, as a share of the sides")

    @field_validator("split")
    @classmethod
    def _open(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] >= 1:
            raise ValueError("below 1, so that all four have a cell")
        return value

    @field_validator("scale")
    @classmethod
    def _sensible(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.5 <= value[0] <= value[1] <= 2:
            raise ValueError("two numbers from 0.5 to 2, the smaller first")
        return value

    def share(self, progress: float) -> float:
        return super().share(progress) if progress < self.until else 0.0
