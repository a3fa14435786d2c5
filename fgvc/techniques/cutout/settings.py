"""Settings of `cutout`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import FILLS, Fill


class CutoutSettings(TechniqueSettings):
    """Erase squares at random places."""

    technique: ClassVar[str] = "fgvc.techniques.cutout.technique:Cutout"

    kind: Literal["cutout"] = "cutout"
    probability: float = Field(1.0, ge=0, le=1, description="of cutting into an image")
    length: float = Field(0.25, gt=0, lt=1, description="side of a square as a share of the image's shorter side")
    holes: int = Field(1, ge=1, le=64, description="squares an image; they may overlap")
    fill: Fill = Field("zero", description=FILLS)
