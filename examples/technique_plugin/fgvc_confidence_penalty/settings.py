"""Settings of `confidence_penalty`. Read whenever fgvc reads a recipe: no torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.knots import Scheduled
from fgvc.config.technique import TechniqueSettings


class ConfidencePenaltySettings(TechniqueSettings):
    """Penalise outputs of low entropy, so that the net is less overconfident."""

    technique: ClassVar[str] = "fgvc_confidence_penalty.technique:ConfidencePenalty"

    kind: Literal["confidence_penalty"] = "confidence_penalty"
    beta: Scheduled = Field(0.1, description="weight of log K less the entropy of the outputs (the paper tries 0.1 to 8)")
