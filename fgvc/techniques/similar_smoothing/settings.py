"""Settings of `similar_smoothing`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from fgvc.config.knots import ScheduledShare
from fgvc.config.technique import Requires, TechniqueSettings


class SimilarSmoothingSettings(TechniqueSettings):
    """Smooth labels towards the classes that look alike."""

    technique: ClassVar[str] = "fgvc.techniques.similar_smoothing.technique:SimilarSmoothing"

    kind: Literal["similar_smoothing"] = "similar_smoothing"
    similar: ScheduledShare = Field(
        0.1,
        description="share e of a label that goes to other classes: target = (1 - e) one-hot + e S. loss.label_smoothing stays "
        "beside it, (1 - l - e) one-hot + l / K + e S: set that to 0 to have this alone",
    )
    temperature: float = Field(0.1, gt=0, description="of the softmax over cosines: low, and only the most alike share")
    rate: float = Field(0.1, gt=0, le=1, description="how fast a class's mean features follow those of a step")

    @property
    @override
    def requires(self) -> Requires:
        return Requires(whole_labels=True, cross_entropy=True)
