"""Settings of ResizeMix."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.technique import Mixing


class ResizeMixSettings(Mixing):
    """Put all of another image, made smaller, into each."""

    technique: ClassVar[str] = "fgvc_resize_mix.technique:ResizeMix"

    kind: Literal["resize_mix"] = "resize_mix"
    smallest: float = Field(0.1, gt=0, le=1, description="side of the small image, as a share of the image's: drawn from here")
    largest: float = Field(0.8, gt=0, le=1, description="to here")
