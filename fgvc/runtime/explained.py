"""A picture with a network's class map over it, as an object."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from fgvc.config.images import MAX_PIXELS
from fgvc.images.address import picture
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit
from fgvc.io.display import Display, Results, figure
from fgvc.runtime.engine import calibration_word, is_calibrated
from fgvc.runtime.explain import Explainer, Floats, explain_crops, position, why_empty
from fgvc.runtime.predict import BATCH, Pictures, opened


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ExplainedPicture(Display):
    """A picture as a network sees it, and where it looks for a class."""

    image: str  # its path, or another name
    label: str  # whose map
    probability: float  # of that class
    calibrated: bool
    method: str
    picture: Image.Image  # the network's crop
    map: Floats  # (H,W) in [0,1]: 1 where most speaks for the class
    raw: Floats  # (h,w) as the method makes it

    @property
    def overlay(self) -> Image.Image:
        """The picture with the map over it."""
        return overlay(self.picture, self.map)

    @property
    def facts(self) -> Mapping[str, object]:
        share = f"{self.label} {100 * self.probability:.1f} %, {calibration_word(self.calibrated)}"
        return {
            "": self.image,
            self.method: f"of {share}" + ("" if self.map.any() else f", empty: {why_empty(self.raw)}"),
        }

    def _repr_html_(self) -> str:
        return figure(
            [picture(self.picture), picture(self.overlay)], ": ".join(map(str, self.facts.values())), side=224
        )


def explain_pictures(
    explainer: Explainer, images: Pictures, *, target: str | None = None, max_pixels: int = MAX_PIXELS
) -> Results[ExplainedPicture]:
    """Explain pictures: one result for each and each of the explainer's methods. `target`: whose maps, by default of the class
    that each picture is taken for. Raises FgvcError for a class that there is not, and for pictures as `predict` does."""
    return Results(_explained(explainer, images, None if target is None else position(explainer, target), max_pixels))


def _explained(
    explainer: Explainer, images: Pictures, label: int | None, max_pixels: int
) -> Iterable[ExplainedPicture]:
    rest = iter(opened(images, max_pixels))
    while batch := [(name, fit(image, explainer.spec)) for name, image in islice(rest, BATCH)]:
        explanations = explain_crops(explainer, [crop for _, crop in batch], label)
        for (name, crop), explanation in zip(batch, explanations, strict=True):
            for method in explainer.methods:
                yield ExplainedPicture(
                    image=name,
                    label=explainer.labels[explanation.label],
                    probability=float(explanation.p[explanation.label]),
                    calibrated=is_calibrated(explainer.calibration),
                    method=method,
                    picture=Image.fromarray(crop),
                    map=np.asarray(explanation.maps[method]),
                    raw=np.asarray(explanation.raw[method]),
                )
