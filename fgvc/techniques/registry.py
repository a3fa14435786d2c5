"""Building techniques from their settings."""

from __future__ import annotations

from fgvc.config.section import Section
from fgvc.config.technique import TechniqueSettings
from fgvc.config.techniques import enabled_techniques, load_object
from fgvc.errors import FgvcError
from fgvc.techniques.api import Technique


def build(techniques: Section) -> dict[str, Technique]:
    """Build a recipe's techniques, by kind, in the order of their hooks: the order of the YAML never matters."""
    return {kind: build_technique(settings) for kind, settings in enabled_techniques(techniques).items()}


def build_technique(settings: TechniqueSettings) -> Technique:
    """Build the technique of these settings. Raises FgvcError where its class can't be imported."""
    try:
        factory = load_object(settings.technique)
    except (ImportError, AttributeError) as error:
        raise FgvcError(f"techniques.{settings.kind}: {settings.technique} can't be imported: {error}") from error
    technique: Technique = factory(settings)
    return technique
