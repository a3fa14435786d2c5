"""Settings of `multiscale_head`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fgvc.config.knots import Scheduled
from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import Stages

WIDEST = 256  # channels of the fused map by default: its 3x3 convolutions are what a step pays for


class MultiscaleHeadSettings(TechniqueSettings):
    """Classify a fusion of several stages, and each of them alone."""

    technique: ClassVar[str] = "fgvc.techniques.multiscale_head.technique:MultiscaleHead"

    kind: Literal["multiscale_head"] = "multiscale_head"
    stages: Stages = (-3, -2, -1)
    level: int | Literal["features"] | None = Field(
        None, description="of `stages` the one to whose size the others are brought; null: the middle one"
    )
    width: int | None = Field(
        None, ge=1, description=f"channels of the fused map; null: those of the stage at `level`, up to {WIDEST}"
    )
    fused: Scheduled = Field(1.0, description="weight of the cross-entropy of the fused stages' classifier")
    each: Scheduled = Field(
        0.3, description="weight of the mean cross-entropy of a classifier on each stage (deep supervision)"
    )

    @model_validator(mode="after")
    def _fuses(self) -> Self:
        if len(self.stages) < 2:
            raise ValueError("stages: to fuse there must be two or more")
        if self.level is not None and self.level not in self.stages:
            raise ValueError(f"level: {self.level} is not one of stages {list(self.stages)}")
        return self
