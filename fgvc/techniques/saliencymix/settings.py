"""Settings of `saliencymix`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import PairMixing


class SaliencymixSettings(PairMixing):
    """Put a box around the most salient place of another image into each, at the same place."""

    technique: ClassVar[str] = "fgvc.techniques.saliencymix.technique:Saliencymix"

    kind: Literal["saliencymix"] = "saliencymix"
    alpha: float = Field(
        1.0, gt=0, description="the box's share of the image, before edges cut it, ~ Beta(alpha, alpha)"
    )
