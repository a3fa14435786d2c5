"""Settings of `dropblock`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from fgvc.config.knots import Scheduled, Value, ever
from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import Stages


class DropblockSettings(TechniqueSettings):
    """Drop squares of a stage's map at random places."""

    technique: ClassVar[str] = "fgvc.techniques.dropblock.technique:Dropblock"

    kind: Literal["dropblock"] = "dropblock"
    stages: Stages = ("features",)
    rate: Scheduled = Field(
        ((0.0, 0.0), (1.0, 0.1)), description="share of the map that is dropped, about; the paper lets it grow from 0"
    )
    block: int = Field(
        7, ge=1, description="side of a square in cells of the map; at most half of the map's side is used"
    )

    @field_validator("rate")
    @classmethod
    def _some_left(cls, rate: Value) -> Value:
        if ever(rate, above=0.9):
            raise ValueError("at most 0.9: something must be left")
        return rate
