"""Calibration of a run's and a bundle's probabilities."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fgvc.config.section import Section

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
LOWEST, HIGHEST = 0.05, 20.0  # bounds of the fitted temperature; at a bound the fit has failed


class Calibration(Section):
    """Temperature and rejection threshold of a run or bundle, and the figures of their fit.

    p = softmax(logits / temperature), or its sigmoid where the file ends with one; the answer is "none of these" if the largest p
    is below `threshold`. Figures `after` are cross-fitted."""

    temperature: float = Field(ge=LOWEST, le=HIGHEST, allow_inf_nan=False, description="divides the logits before the softmax")
    threshold: Share = Field(description="0: rejects nothing")
    keep: Share = Field(description="share of the right answers that the threshold was to keep")
    fitted_on: str = Field(description="split of the data")
    images: int = Field(ge=1, description="of that split")
    nll_before: float = Field(ge=0, allow_inf_nan=False, description="mean cross-entropy in nats")
    nll_after: float = Field(ge=0, allow_inf_nan=False, description="the same with the temperature")
    ece_before: Share = Field(description="expected calibration error, 15 bins")
    ece_after: Share = Field(description="the same with the temperature")
    kept: Share = Field(description="share of the right answers that get through")
    coverage: Share = Field(description="share of the images that get an answer")
    accuracy: Share = Field(description="of those answers")
    note: str = Field("", description="why the temperature is 1, or what to think of it")

    @property
    def calibrated(self) -> bool:
        """Whether the temperature was fitted; if it couldn't be, it is 1 or at a bound, and `note` says why."""
        return self.temperature not in (LOWEST, HIGHEST) and (self.temperature != 1 or not self.note)
