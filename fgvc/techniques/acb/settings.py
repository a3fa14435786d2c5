"""Settings of `acb`."""

from __future__ import annotations

from typing import ClassVar, Literal

from fgvc.techniques.settings import ConvSelection


class AcbSettings(ConvSelection):
    """Asymmetric branches beside square convolutions; step 0 is the pretrained function."""

    technique: ClassVar[str] = "fgvc.techniques.acb.technique:Acb"

    kind: Literal["acb"] = "acb"
