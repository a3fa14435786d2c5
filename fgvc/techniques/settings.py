"""Settings that several techniques have. Torch-free, as all settings are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from fgvc.config.section import Section
from fgvc.config.technique import TechniqueSettings

Fill = Literal["zero", "mean", "random", "noise", "blur"]
FILLS = (
    "zero: the data set's mean colour (0 after normalisation) | mean: the picture's own mean colour | "
    "random: one normal colour | noise: normal noise | blur: the picture itself, blurred"
)


class Region(Section):
    """Region of a map: above a threshold, within bounds of area."""

    rule: Literal["share", "quantile", "mean+std"] = Field(
        "share",
        description="above `value` times the map's maximum; the `value`-quantile; the mean + `value` x the deviation",
    )
    value: float = Field(0.6, ge=0, description="see rule")
    area: tuple[float, float] = Field(
        (0.0, 0.3),
        description="least and most share of the picture: the map's highest region of that size; of equal values all go or none",
    )

    @model_validator(mode="after")
    def _share(self) -> Self:
        if self.rule != "mean+std" and self.value > 1:
            raise ValueError(f"value: {self.value:g} of a {self.rule}: at most 1")
        return self

    @field_validator("area")
    @classmethod
    def _bounds(cls, area: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= area[0] <= area[1] < 1 or area[1] == 0:
            raise ValueError("two shares in [0, 1), the smaller first; all of a picture may not go")
        return area


FEATURES: Literal["features"] = "features"  # the gate that needs no hook: on the output of forward_features
AnyMethod = Literal["auto", "cam", "gradcam", "gradcam++"]


def _distinct(stages: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(stages)) < len(stages):
        raise ValueError("each stage once")
    return stages


Stages = Annotated[
    tuple[int | Literal["features"], ...],
    Field(
        min_length=1,
        description="features: what the classifier reads; or stages of timm's feature_info, negative ones from the end",
    ),
    AfterValidator(_distinct),
]
OfflineMethod = Literal["GradCAM", "GradCAMPlusPlus", "HiResCAM", "XGradCAM", "LayerCAM"]  # pytorch-grad-cam's names, for ae_psl


class ConvSelection(TechniqueSettings):
    """Convolutions by their names in the timm net."""

    include: tuple[str, ...] = Field(
        ("*",), description="which convolutions, by their name in the timm net; * and ? stand for anything"
    )
    exclude: tuple[str, ...] = Field((), description="which of those to leave alone, e.g. [conv_stem]")
