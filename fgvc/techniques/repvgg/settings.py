"""Settings of `repvgg`."""

from __future__ import annotations

from typing import ClassVar, Literal

from fgvc.techniques.settings import ConvSelection


class RepvggSettings(ConvSelection):
    """1x1 and identity branches beside square convolutions; step 0 is the pretrained function."""

    technique: ClassVar[str] = "fgvc.techniques.repvgg.technique:Repvgg"

    kind: Literal["repvgg"] = "repvgg"
