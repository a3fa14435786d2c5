"""Settings of `acol`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fgvc.config.knots import Scheduled
from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import AnyMethod, Region


class ErasedCells(Region):
    """Region to erase: half of the map and more, since another classifier must live on the rest."""

    area: tuple[float, float] = Field(
        (0.0, 0.7),
        description="least and most share of the map; of equal cells all go or none. The authors' code has no cap ([0, 0.999]): "
        "there a flat map can lose nearly all its cells, and the other classifier learns from what says nothing",
    )


class AcolSettings(TechniqueSettings):
    """Erase from the features the region that the classifier relies on, and classify the rest."""

    technique: ClassVar[str] = "fgvc.techniques.acol.technique:Acol"

    kind: Literal["acol"] = "acol"
    erased: Scheduled = Field(1.0, description="weight of the cross-entropy of the erased features")
    heads: int = Field(1, ge=1, le=4, description="in a chain: each erases the region it relies on for the next")
    shared: bool = Field(False, description="the deployed classifier itself classifies the rest; nothing is added")
    hidden: int = Field(
        0, ge=0, description="channels of two 3x3 convolutions in each added classifier (paper: 1024); 0: a 1x1 alone"
    )
    map: AnyMethod = Field(
        "auto", description="of the deployed classifier: cam | gradcam | gradcam++; auto: cam if it can"
    )
    region: ErasedCells = Field(ErasedCells(), description="what is erased, of the map from smallest 0 to largest 1")

    @model_validator(mode="after")
    def _shares_or_adds(self) -> AcolSettings:
        if self.shared and self.hidden:
            raise ValueError("hidden is of added classifiers, and with shared: true there are none")
        return self
