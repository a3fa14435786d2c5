"""What all techniques' settings have: what they are called, what does them, what they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from fgvc.config.schedule import ScheduledShare, at
from fgvc.config.section import Section


@dataclass(frozen=True, slots=True)
class Requires:
    """What a technique can't do without."""

    average: bool = False  # the moving average of the weights: an `ema:` section
    boxes: bool = False  # of the objects, in the data
    whole_labels: bool = False  # images of one label, in some steps at least
    cross_entropy: bool = False  # as the base loss, all classes alike
    epochs: int = 1  # as many, or more


class TechniqueSettings(Section):
    """Settings of a technique, which say by `kind` what it is called in recipes, and where the class is that does it: imported
    when a net is built, so that settings can be read without torch."""

    technique: ClassVar[str]  # "package.module:Class", made from these settings alone
    kind: str = ""

    @property
    def requires(self) -> Requires:
        """What these settings need of the rest of a recipe, and of the data."""
        return Requires()


class Mixing(TechniqueSettings):
    """The settings that all techniques have which mix images and their labels."""

    probability: ScheduledShare = Field(
        1.0,
        description="share of the steps that mix so. A step has one mixing technique at most: where the shares of those that "
        "are on add up to more than 1, each is divided by the sum",
    )
    per: Literal["batch", "sample"] = Field(
        "batch", description="one draw for the whole batch (the papers), or one a sample"
    )
    pairing: Literal["any", "other_class"] = Field(
        "any", description="other_class: with an image of another class where the batch has one"
    )

    def share(self, progress: float) -> float:
        """Of the steps at `progress` in [0,1) those that mix so, where nothing else mixes."""
        return at(self.probability, progress)
