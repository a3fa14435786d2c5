"""Settings of `overparam`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.techniques.settings import ConvSelection


class OverparamSettings(ConvSelection):
    """Several branches of a convolution's own size beside it, 1x1 and identity; step 0 is the pretrained function."""

    technique: ClassVar[str] = "fgvc.techniques.overparam.technique:Overparam"

    kind: Literal["overparam"] = "overparam"
    branches: int = Field(
        4, ge=1, le=8, description="of the convolution's own size, beside itself: 4 make five such paths; MobileOne's k = 4 is 3"
    )
