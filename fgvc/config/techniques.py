"""The settings class of every technique: fgvc's own, and those of installed packages (entry points)."""

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
BUILT_IN = {
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


def load_object(reference: str) -> Any:
    """Import the object that "package.module:name" names. Raises ImportError or AttributeError."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


@cache
def settings_by_kind() -> dict[str, type[TechniqueSettings]]:
    """The settings classes by kind, in the order of the hooks, those of installed packages last.

    Raises FgvcError for an entry point that can't be imported, is no settings class, has another `kind` than its name, or has the
    name of another technique."""
    classes = {kind: load_object(reference) for kind, reference in BUILT_IN.items()}
    for point in entry_points(group=GROUP):
        where = f"entry point {point.name} of {point.dist.name if point.dist else GROUP}"
        try:
            settings = point.load()
        except Exception as error:  # an import may raise anything
            raise FgvcError(f"{where}: {point.value} can't be imported: {error}; mend the package, or remove it") from error
        if not (isinstance(settings, type) and issubclass(settings, TechniqueSettings)):
            raise FgvcError(f"{where}: {point.value} is no TechniqueSettings (fgvc.config.techniques)")
        if settings.model_fields["kind"].default != point.name:
            raise FgvcError(f"{where}: its kind is {settings.model_fields['kind'].default!r}; give both one name")
        if ":" not in getattr(settings, "technique", ""):
            raise FgvcError(f"{where}: {point.value} has no `technique`, the class that does it as 'package.module:Class'")
        if point.name in classes:
            raise FgvcError(f"{where}: there is a technique of that name already; choose another")
        classes[point.name] = settings
    return classes


class _Recorded(Section):
    """Base of `Techniques`: techniques of installed packages that are off are not dumped.

    So a run that doesn't use them can be read, and is the same run, where these packages are not installed."""

    @model_serializer(mode="wrap")
    def _without(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {kind: settings for kind, settings in handler(self).items() if settings is not None or kind in BUILT_IN}


_fields: dict[str, Any] = {
    kind: (settings | None, Field(None, description=settings.__doc__)) for kind, settings in settings_by_kind().items()
}
Techniques = create_model(
    "Techniques", __base__=_Recorded, __doc__="Technique -> its settings; null removes one.", **_fields
)


def enabled_techniques(techniques: Section) -> dict[str, TechniqueSettings]:
    """Settings of the techniques that a recipe enables, by kind, in the order of the hooks."""
    return {kind: settings for kind in settings_by_kind() if (settings := getattr(techniques, kind)) is not None}
