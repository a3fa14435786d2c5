"""Base classes of techniques' settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.knots import ScheduledShare, value_at
from fgvc.config.section import Section


@dataclass(frozen=True, slots=True)
class Requires:
    """Requirements of a technique on the recipe and the data."""

    average: bool = False  # the moving average of the weights: an `ema:` section
    boxes: bool = False  # of the objects, in the data
    geometry: bool = False  # where each crop lies in its image, without a remainder: no policy that moves pixels without a record
    whole_labels: bool = False  # images of one label, in some steps at least
    cross_entropy: bool = False  # as the base loss, all classes alike
    epochs: int = 1  # as many, or more
    side: int = 1  # pixels of the images' shorter side, or more


class TechniqueSettings(Section):
    """Settings of a technique; `kind` is its name in recipes.

    The class that implements it is named by its import path and imported when a net is built, so that settings can be read
    without torch."""

    technique: ClassVar[str]  # "package.module:Class", made from these settings alone
    kind: str = ""

    @property
    def requires(self) -> Requires:
        """Requirements of these settings on the rest of the recipe and on the data."""
        return Requires()


class Mixing(TechniqueSettings):
    """Settings of a technique that mixes images and their labels. Its class has the hook `mixes`, which returns `share`."""

    probability: ScheduledShare = Field(
        1.0,
        description="share of the steps that mix so. A step has one mixing technique at most: where the shares of those that "
        "are on add up to more than 1, each is divided by the sum",
    )

    def share(self, progress: float) -> float:
        """Share of the steps at `progress` in [0,1) that mix so, if no other technique mixes."""
        return value_at(self.probability, progress)


class PairMixing(Mixing):
    """Settings of a technique that mixes each image with others of its batch, by one draw or one an image."""

    per: Literal["batch", "sample"] = Field(
        "batch", description="one draw for the whole batch (the papers), or one a sample"
    )
    pairing: Literal["any", "other_class"] = Field(
        "any", description="other_class: with an image of another class where the batch has one"
    )
