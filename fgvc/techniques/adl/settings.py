"""Settings of `adl`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.knots import ScheduledShare
from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import Stages


class AdlSettings(TechniqueSettings):
    """Drop what a stage attends to most, or weight it by its attention."""

    technique: ClassVar[str] = "fgvc.techniques.adl.technique:Adl"

    kind: Literal["adl"] = "adl"
    stages: Stages = ("features",)
    drop_rate: ScheduledShare = Field(
        0.25,
        description="how often the most attended region is dropped. Its authors' for localisation is 0.75, which costs accuracy",
    )
    threshold: ScheduledShare = Field(
        0.9, description="the most attended region: above this share of the map's maximum (gamma)"
    )
    per: Literal["batch", "sample"] = Field("batch", description="one draw a batch and stage (the paper), or a sample")
    unattended: Literal["keep", "drop"] = Field(
        "keep",
        description="a map whose mean over channels is nowhere above 0, or all alike, has no most attended region. keep: it "
        "loses nothing | drop: as in its authors' code, where a map of zeros loses everything, and one below 0 nothing",
    )
