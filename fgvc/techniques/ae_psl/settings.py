"""Settings of `ae_psl`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from fgvc.config.technique import Requires, TechniqueSettings
from fgvc.techniques.settings import OfflineMethod, Region


class Added(Region):
    """Region that a round adds: the upper fifth of the map's range, as in the paper."""

    value: float = Field(0.8, ge=0, description="see rule")
    area: tuple[float, float] = Field((0.0, 0.2), description="least and most share of the image in one round")


class AePslSettings(TechniqueSettings):
    """Erase, round after round, the regions of the image that the network relies on."""

    technique: ClassVar[str] = "fgvc.techniques.ae_psl.technique:AePsl"

    kind: Literal["ae_psl"] = "ae_psl"
    rounds: int = Field(
        3, ge=2, description="of training; the run's epochs are divided among them, nothing is erased in the first"
    )
    map: OfflineMethod = Field("GradCAM", description="of pytorch-grad-cam")
    region: Added = Field(Added(), description="what a round adds, of the map from smallest 0 to largest 1")
    largest: float = Field(0.4, gt=0, lt=1, description="share of an image that all rounds together may erase")
    probability: float = Field(
        1.0, gt=0, le=1, description="share of the images that are erased; which ones is drawn once"
    )
    stop: float | None = Field(
        2.0, gt=1, description="no further round once the loss ends a round above this many times the first round's"
    )

    @property
    @override
    def requires(self) -> Requires:
        return Requires(epochs=self.rounds)
