"""Settings of the blurred box."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.knots import Scheduled, ScheduledShare
from fgvc.config.technique import TechniqueSettings


class BoxBlurSettings(TechniqueSettings):
    """Classify each image also with a blurred box in it, and locate the box by a small head."""

    technique: ClassVar[str] = "fgvc_box_blur.technique:BoxBlur"

    kind: Literal["box_blur"] = "box_blur"
    factor: int = Field(4, ge=2, le=16, description="how many times coarser the box is")
    side: ScheduledShare = Field(0.5, description="side of the box, as a share of the image's")
    view: Scheduled = Field(0.5, description="weight of the blurred view's cross-entropy; 0: it is not classified")
    where: Scheduled = Field(0.1, description="weight of the head's loss: is a cell in the box?")
    hidden: int = Field(16, ge=1, le=512, description="channels of the head")
