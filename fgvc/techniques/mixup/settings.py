"""Settings of `mixup`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import PairMixing


class MixupSettings(PairMixing):
    """Mix each image with another one of its batch."""

    technique: ClassVar[str] = "fgvc.techniques.mixup.technique:Mixup"

    kind: Literal["mixup"] = "mixup"
    alpha: float = Field(0.2, gt=0, description="lambda ~ Beta(alpha, alpha)")
