"""Settings of `cam_erasing`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from fgvc.config.knots import Scheduled
from fgvc.config.technique import Requires, TechniqueSettings
from fgvc.techniques.settings import FILLS, AnyMethod, Fill, Region


class CamErasingSettings(TechniqueSettings):
    """Erase from the image the region that the network relies on."""

    technique: ClassVar[str] = "fgvc.techniques.cam_erasing.technique:CamErasing"

    kind: Literal["cam_erasing"] = "cam_erasing"
    source: Literal["current", "ema", "previous_epoch"] = Field(
        "current",
        description="of the map. current: this step's, on a view of its own; ema: of the average, by one forward without "
        "gradient; previous_epoch: recorded one epoch ago, for no forward at all",
    )
    probability: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of erasing an image; default: 1 with `current`, whose view is beside the whole image, else 0.5",
    )
    weight: Scheduled | None = Field(
        None, description="of the erased view's cross-entropy, for source: current alone; default: 1"
    )
    map: AnyMethod = Field("auto", description="cam | gradcam | gradcam++; auto: cam where the head allows it")
    region: Region = Field(Region(), description="what is erased, of the map from 0 to 1; by an empty map nothing")
    fill: Fill = Field("zero", description=FILLS)

    @model_validator(mode="after")
    def _weighs(self) -> Self:
        if self.weight is not None and self.source != "current":
            raise ValueError(f"weight is of the view that source: current adds; with {self.source} give a probability")
        return self

    @property
    @override
    def requires(self) -> Requires:
        return Requires(average=self.source == "ema", geometry=self.source == "previous_epoch")
