"""Settings of `random_erasing`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.section import ShareRange
from fgvc.config.technique import TechniqueSettings


class RandomErasingSettings(TechniqueSettings):
    """Erase a rectangle of random area and aspect."""

    technique: ClassVar[str] = "fgvc.techniques.random_erasing.technique:RandomErasing"

    kind: Literal["random_erasing"] = "random_erasing"
    statistics: Literal["original", "timm"] = Field(
        "original",
        description="of the aspect. original: uniform in [aspect, 1/aspect], so mostly tall boxes; timm: log-uniform there",
    )
    probability: float = Field(0.5, ge=0, le=1, description="of erasing from an image")
    area: ShareRange = Field(
        (0.02, 0.2),
        description="share of the image, uniform (paper: 0.02 to 0.4; small parts matter on fine-grained data)",
    )
    aspect: float = Field(0.3, gt=0, le=1, description="least height / width; its inverse is the largest")
    boxes: int = Field(1, ge=1, le=64, description="rectangles an image, which share the area")
    fill: Literal["zero", "mean", "random", "pixel"] = Field(
        "zero",
        description="zero: the data set's mean colour (0 after normalisation; the authors' code) | mean: the picture's own | "
        "random: one normal colour | pixel: normal noise (timm's), a random value each, as the paper fills (uniform there)",
    )
