"""Settings of `centre_loss`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from fgvc.config.knots import Scheduled
from fgvc.config.technique import Requires, TechniqueSettings


class CentreLossSettings(TechniqueSettings):
    """Draw the features of each class together."""

    technique: ClassVar[str] = "fgvc.techniques.centre_loss.technique:CentreLoss"

    kind: Literal["centre_loss"] = "centre_loss"
    centre: Scheduled = Field(0.003, description="weight of half the squared distance to the class's centre (the paper's lambda)")
    rate: float = Field(0.5, gt=0, le=1, description="how fast the centres follow (the paper's alpha)")

    @property
    @override
    def requires(self) -> Requires:
        return Requires(whole_labels=True)
