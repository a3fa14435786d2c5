"""From the settings of techniques to what does them."""

from __future__ import annotations

from typing import Protocol

from fgvc.config.section import Section
from fgvc.config.techniques import TechniqueSettings, chosen, named


class Technique(Protocol):
    """What every technique says of itself; its hooks are optional and found by name (docs/design.md):
    setup, before_epoch, on_sample, mixes, draw, on_batch, views, views_after, losses, after_step, state_dict,
    load_state_dict.

    With `mixes(progress)`, the share of the steps in which it mixes images and labels, it draws in those steps only
    (`Context.draw` is None in the others), and no other that mixes does.

    With `losses` comes `weights`, name of a term -> fgvc.config.schedule.Scheduled; names in `measures` are only reported."""

    source: str  # the paper
    forwards: str  # what it adds to a step, in forwards of the backbone
    leaves: str  # what is left in the deployed graph's weights


def build(techniques: Section) -> dict[str, Technique]:
    """The techniques of a recipe, by kind, in the order of their hooks: the order of the YAML never matters."""
    return {kind: made_of(own) for kind, own in chosen(techniques).items()}


def made_of(settings: TechniqueSettings) -> Technique:
    """What does it."""
    technique: Technique = named(settings.technique)(settings)
    return technique
