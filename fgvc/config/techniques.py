"""Which techniques there are: fgvc's own by name, and those of installed packages."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer

from fgvc.config.section import Section
from fgvc.config.technique import TechniqueSettings
from fgvc.errors import FgvcError

GROUP = "fgvc.techniques"  # of entry points: kind = "package.module:Settings"
# In the order of the hooks: maps of the clean image are erased before images are mixed, random boxes after it.
OWN = {
    "ae_psl": "fgvc.techniques.ae_psl.settings:AePslSettings",
    "cam_erasing": "fgvc.techniques.cam_erasing.settings:CamErasingSettings",
    "mixup": "fgvc.techniques.mixup.settings:MixupSettings",
    "cutmix": "fgvc.techniques.cutmix.settings:CutmixSettings",
    "snapmix": "fgvc.techniques.snapmix.settings:SnapmixSettings",
    "saliencymix": "fgvc.techniques.saliencymix.settings:SaliencymixSettings",
    "mosaic": "fgvc.techniques.mosaic.settings:MosaicSettings",
    "cutout": "fgvc.techniques.cutout.settings:CutoutSettings",
    "random_erasing": "fgvc.techniques.random_erasing.settings:RandomErasingSettings",
    "hide_and_seek": "fgvc.techniques.hide_and_seek.settings:HideAndSeekSettings",
    "dcl": "fgvc.techniques.dcl.settings:DclSettings",
    "attention_crop_drop": "fgvc.techniques.attention_crop_drop.settings:AttentionCropDropSettings",
    "acol": "fgvc.techniques.acol.settings:AcolSettings",
    "centre_loss": "fgvc.techniques.centre_loss.settings:CentreLossSettings",
    "similar_smoothing": "fgvc.techniques.similar_smoothing.settings:SimilarSmoothingSettings",
    "adl": "fgvc.techniques.adl.settings:AdlSettings",
    "dropblock": "fgvc.techniques.dropblock.settings:DropblockSettings",
    "spatial_dropout": "fgvc.techniques.spatial_dropout.settings:SpatialDropoutSettings",
    "multiscale_head": "fgvc.techniques.multiscale_head.settings:MultiscaleHeadSettings",
    "box_head": "fgvc.techniques.box_head.settings:BoxHeadSettings",
    "distill": "fgvc.techniques.distill.settings:DistillSettings",
    "acb": "fgvc.techniques.acb.settings:AcbSettings",
    "dbb": "fgvc.techniques.dbb.settings:DbbSettings",
    "repvgg": "fgvc.techniques.repvgg.settings:RepvggSettings",
    "overparam": "fgvc.techniques.overparam.settings:OverparamSettings",
}


def named(reference: str) -> Any:
    """What "package.module:name" names. Raises ImportError or AttributeError."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@cache
def settings_by_kind() -> dict[str, type[TechniqueSettings]]:
    """By kind, in the order of the hooks; those of installed packages come last. Raises FgvcError for one that can't be read, has
    another kind than its name, or takes a name that is taken."""
    own = {kind: named(reference) for kind, reference in OWN.items()}
    for point in entry_points(group=GROUP):
        where = f"entry point {point.name} of {point.dist.name if point.dist else GROUP}"
        try:
            found = point.load()
        except Exception as error:  # whatever a package does when it is imported
            raise FgvcError(f"{where}: {point.value} can't be imported: {error}; mend the package, or remove it") from error
        if not (isinstance(found, type) and issubclass(found, TechniqueSettings)):
            raise FgvcError(f"{where}: {point.value} is no TechniqueSettings (fgvc.config.techniques)")
        if found.model_fields["kind"].default != point.name:
            raise FgvcError(f"{where}: its kind is {found.model_fields['kind'].default!r}; give both one name")
        if ":" not in getattr(found, "technique", ""):
            raise FgvcError(f"{where}: {point.value} has no `technique`, the class that does it as 'package.module:Class'")
        if point.name in own:
            raise FgvcError(f"{where}: there is a technique of that name already; choose another")
        own[point.name] = found
    return own


class _Recorded(Section):
    """One of an installed package that is off leaves no trace in what a run records: the run is read, and is the same run, where
    the package is not installed."""

    @model_serializer(mode="wrap")
    def _without(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {kind: own for kind, own in handler(self).items() if own is not None or kind in OWN}


_fields: dict[str, Any] = {
    kind: (own | None, Field(None, description=own.__doc__)) for kind, own in settings_by_kind().items()
}
Techniques = create_model(
    "Techniques", __base__=_Recorded, __doc__="Technique -> its settings; null removes one.", **_fields
)


def chosen(techniques: Section) -> dict[str, TechniqueSettings]:
    """The techniques that a recipe asks for, by kind, in the order of the hooks."""
    return {kind: own for kind in settings_by_kind() if (own := getattr(techniques, kind)) is not None}
