"""Settings of `spatial_dropout`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import TechniqueSettings


class SpatialDropoutSettings(TechniqueSettings):
    """Drop whole channels of one stage's output."""

    technique: ClassVar[str] = "fgvc.techniques.spatial_dropout.technique:SpatialDropout"

    kind: Literal["spatial_dropout"] = "spatial_dropout"
    rate: float = Field(
        0.1, gt=0, lt=1, description="share of the channels that is dropped; the others grow by 1/(1-rate)"
    )
    stage: int = Field(-1, description="of timm's feature_info; negative numbers count from the end")
