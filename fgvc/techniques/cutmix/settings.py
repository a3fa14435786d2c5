"""Settings of `cutmix`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import PairMixing


class CutmixSettings(PairMixing):
    """Put a box of another image into each."""

    technique: ClassVar[str] = "fgvc.techniques.cutmix.technique:Cutmix"

    kind: Literal["cutmix"] = "cutmix"
    alpha: float = Field(
        1.0, gt=0, description="the box's share of the image, before edges cut it, ~ Beta(alpha, alpha)"
    )
