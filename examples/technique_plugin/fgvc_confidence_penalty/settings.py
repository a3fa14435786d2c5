"""Settings of `confidence_penalty`. Read whenever fgvc reads a recipe: no torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.schedule import Scheduled
from fgvc.config.technique import TechniqueSettings


class ConfidencePenaltySettings(TechniqueSettings):
    """Answers of little entropy cost something, so that the net stays unsure where it has reason to be."""

    technique: ClassVar[str] = "fgvc_confidence_penalty.technique:ConfidencePenalty"

    kind: Literal["confidence_penalty"] = "confidence_penalty"
    beta: Scheduled = Field(0.1, description="weight of log K less the entropy of the answers (the paper tries 0.1 to 8)")
