"""Settings of `hide_and_seek`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import FILLS, Fill


class HideAndSeekSettings(TechniqueSettings):
    """Hide random cells of a grid laid over the image."""

    technique: ClassVar[str] = "fgvc.techniques.hide_and_seek.technique:HideAndSeek"

    kind: Literal["hide_and_seek"] = "hide_and_seek"
    probability: float = Field(0.5, ge=0, le=1, description="of hiding anything in an image (paper: 1)")
    grid: int = Field(
        4,
        ge=2,
        le=32,
        description="cells a side, so that they grow with the image. The authors' code (and wsolevaluation's grid_size) has the "
        "side of a cell in pixels instead, drawn from none, 16, 32, 44 and 56 of 224: 14 to 4 cells a side",
    )
    share: float = Field(0.5, gt=0, lt=1, description="probability of hiding a cell")
    fill: Fill = Field("zero", description=f"{FILLS}; the paper's is zero")
