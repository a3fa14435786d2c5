"""From the settings of techniques to what does them."""

from __future__ import annotations

from fgvc.config.section import Section
from fgvc.config.technique import TechniqueSettings
from fgvc.config.techniques import chosen, load_object
from fgvc.errors import FgvcError
from fgvc.techniques.api import Technique


def build(techniques: Section) -> dict[str, Technique]:
    """The techniques of a recipe, by kind, in the order of their hooks: the order of the YAML never matters."""
    return {kind: made_of(own) for kind, own in chosen(techniques).items()}


def made_of(settings: TechniqueSettings) -> Technique:
    """What does it. Raises FgvcError where its class is not where its settings say."""
    try:
        made = load_object(settings.technique)
    except (ImportError, AttributeError) as error:
        raise FgvcError(f"techniques.{settings.kind}: {settings.technique} can't be imported: {error}") from error
    technique: Technique = made(settings)
    return technique
