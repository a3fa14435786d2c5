"""Settings of `attention_crop_drop`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fgvc.config.knots import Scheduled, ever
from fgvc.config.section import ShareRange
from fgvc.config.technique import TechniqueSettings
from fgvc.techniques.settings import FILLS, AnyMethod, Fill

SCALE = 20.0  # of the pooled features


class AttentionCropDropSettings(TechniqueSettings):
    """Train also on crops of the attended region, and on images without it."""

    technique: ClassVar[str] = "fgvc.techniques.attention_crop_drop.technique:AttentionCropDrop"

    kind: Literal["attention_crop_drop"] = "attention_crop_drop"
    guide: Literal["attention", "cam", "random"] = Field(
        "attention",
        description="attention: the learned maps | cam: the deployed head's class map | random: the same boxes and regions as "
        "with attention, elsewhere (the control)",
    )
    maps: int = Field(32, ge=1, description="number of attention maps (M)")
    map: AnyMethod = Field("auto", description="for guide: cam; auto: cam if the head allows it, else gradcam")
    crop: Scheduled = Field(1.0, description="weight of the cropped view's cross-entropy")
    drop: Scheduled = Field(1.0, description="weight of the dropped view's cross-entropy")
    crop_threshold: ShareRange = Field((0.4, 0.6), description="share of the maximum; a box goes around what is above")
    drop_threshold: ShareRange = Field((0.2, 0.5), description="share of the maximum; what is above is dropped")
    padding: float = Field(0.1, ge=0, le=1, description="of the box on every side, as a share of the image's side")
    largest_drop: float = Field(0.5, gt=0, lt=1, description="share of the image that may be dropped")
    fill: Fill = Field("zero", description=FILLS)
    render: float = Field(1.5, ge=1, le=4, description="crops are cut from images of so many times the size")
    pooled: Scheduled = Field(1.0, description="weight of the branch's own classifier, on every view")
    scale: float = Field(
        SCALE, gt=0, description="before it. WS-DAN's 100 suits its rate of 0.001: logits move by the rate x its square"
    )
    centre: Scheduled = Field(1.0, description="weight of the distance to the class's feature centre")
    centre_rate: float = Field(
        0.05, gt=0, le=1, description="beta, towards a class's mean; WS-DAN's code: its last image"
    )

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.guide != "cam" and not self.learns:
            raise ValueError("pooled and centre are 0, and nothing trains the maps: give one of them, or guide: cam")
        return self

    @property
    def learns(self) -> bool:
        return ever(self.pooled) or ever(self.centre)
