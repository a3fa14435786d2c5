"""From the settings of techniques to what does them."""

from __future__ import annotations

from fgvc.config.section import Section
from fgvc.config.technique import TechniqueSettings
from fgvc.config.techniques import chosen, named
from fgvc.techniques.api import Technique


def build(techniques: Section) -> dict[str, Technique]:
    """The techniques of a recipe, by kind, in the order of their hooks: the order of the YAML never matters."""
    return {kind: made_of(own) for kind, own in chosen(techniques).items()}


def made_of(settings: TechniqueSettings) -> Technique:
    """What does it."""
    technique: Technique = named(settings.technique)(settings)
    return technique
