"""Settings of `snapmix`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import PairMixing
from fgvc.techniques.settings import AnyMethod


class SnapmixSettings(PairMixing):
    """Put a piece of another image into each; labels by their share of the class maps, not of the area."""

    technique: ClassVar[str] = "fgvc.techniques.snapmix.technique:Snapmix"

    kind: Literal["snapmix"] = "snapmix"
    alpha: float = Field(5.0, gt=0, description="shares of both boxes, before edges cut them, ~ Beta(alpha, alpha)")
    map: AnyMethod = Field(
        "auto", description="cam (the paper's) | gradcam | gradcam++; auto: cam if the head allows it"
    )
    one_class: Literal["once", "twice"] = Field(
        "once",
        description="pairs of one class. once: their two weights add up, as for any pair | twice: each of the two is that sum, "
        "as in the authors' code, so that such an image counts double. Their code also resizes pieces with corners aligned",
    )
