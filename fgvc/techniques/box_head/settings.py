"""Settings of `box_head`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator
from typing_extensions import override

from fgvc.config.knots import Scheduled, Value, ever
from fgvc.config.technique import Requires, TechniqueSettings


class BoxHeadSettings(TechniqueSettings):
    """Predict the object's box in the crop; for data with boxes. Steps that mix labels are left out."""

    technique: ClassVar[str] = "fgvc.techniques.box_head.technique:BoxHead"

    kind: Literal["box_head"] = "box_head"
    loss: Literal["giou", "diou", "ciou"] = Field(
        "ciou",
        description="1 - IoU, and: giou: the empty share of the hull | diou: the centres' distance | ciou: and aspect",
    )
    hidden: int = Field(64, ge=1, description="channels of the 1x1 convolution before the last layer")
    visible: float = Field(
        0.25, gt=0, le=1, description="least share of the box's area in the crop; else it is left out"
    )
    box: Scheduled = Field(1.0, description="weight of the box's loss")
    confidence: Scheduled = Field(
        1.0, description="weight of predicting the box's IoU (IoU-aware confidence)"
    )

    @field_validator("box")
    @classmethod
    def _learns(cls, box: Value) -> Value:
        if not ever(box):
            raise ValueError("with 0 nothing trains the box; take the technique out instead")
        return box

    @property
    @override
    def requires(self) -> Requires:
        return Requires(boxes=True, geometry=True, whole_labels=True)
