"""Building techniques from their settings."""

from __future__ import annotations

from fgvc.config.section import Section
from fgvc.config.technique import Mixing, TechniqueSettings
from fgvc.config.techniques import enabled_techniques, in_words, load_object
from fgvc.errors import FgvcError
from fgvc.techniques.api import Technique, overrides
from fgvc.techniques.checks import naming


def build(techniques: Section) -> dict[str, Technique]:
    """Build a recipe's techniques, by kind, in the order of their hooks: the order of the YAML never matters."""
    return {kind: build_technique(settings) for kind, settings in enabled_techniques(techniques).items()}


def build_technique(settings: TechniqueSettings) -> Technique:
    """Build the technique of these settings. Raises FgvcError where its class can't be imported or made, or is none."""
    where = f"techniques.{settings.kind}: {settings.technique}"
    try:
        factory = load_object(settings.technique)
    except Exception as error:  # an import may raise anything
        raise FgvcError(f"{where} can't be imported: {in_words(error)}") from error
    with naming(settings.kind, settings.technique):
        technique = factory(settings)
    if not isinstance(technique, Technique):
        raise FgvcError(f"{where} is no Technique (fgvc.techniques.api), but a {type(technique).__name__}")
    if isinstance(settings, Mixing) and not overrides(technique, "mixes"):
        raise FgvcError(f"{where} has no hook `mixes`, so it would mix in every step; let it return settings.share(progress)")
    return technique
