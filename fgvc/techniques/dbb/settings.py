"""Settings of `dbb`."""

from __future__ import annotations

from typing import ClassVar, Literal

from fgvc.techniques.settings import ConvSelection


class DbbSettings(ConvSelection):
    """Branches of several scales and depths beside square convolutions; step 0 is the pretrained function."""

    technique: ClassVar[str] = "fgvc.techniques.dbb.technique:Dbb"

    kind: Literal["dbb"] = "dbb"
