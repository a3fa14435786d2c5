"""The settings class of every technique: fgvc's own, and those of installed packages (entry points)."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from functools import cache, partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer

from fgvc.config.section import Deferred, Section
from fgvc.config.technique import Requires, TechniqueSettings
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


def in_words(error: Exception) -> str:
    """Describe the exception of an import: its message, and the file and line of the package that raised it."""
    ours = str(Path(__file__).parents[1])
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(("<", ours))]
    frames = [frame for frame in frames if "importlib" not in Path(frame.filename).parts]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


@cache
def _points() -> dict[str, list[EntryPoint]]:
    """Entry points of installed packages by kind. Nothing of them is imported."""
    points: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        points.setdefault(point.name, []).append(point)
    return points


@cache
def _installed(kind: str) -> type[TechniqueSettings]:
    """Import the settings class of an installed package's technique.

    Raises FgvcError for an entry point that can't be imported, is no settings class, has another `kind` than its name, or has the
    name of another technique."""
    point = _points()[kind][-1]
    package = point.dist.name if point.dist else GROUP
    where = f"entry point {point.name} of {package}"
    ways = f'rename it in [project.entry-points."{GROUP}"] and in `kind`, or pip uninstall {package}'
    if kind in BUILT_IN:
        raise FgvcError(f"{where}: {kind} is a technique of fgvc itself; {ways}")
    if len(_points()[kind]) > 1:
        packages = [other.dist.name if other.dist else other.value for other in _points()[kind]]
        raise FgvcError(f"{where}: more than one package has a technique of that name, {', '.join(packages)}; {ways}")
    torch_free = "torch" not in sys.modules
    try:
        settings = point.load()
    except Exception as error:  # an import may raise anything
        raise FgvcError(
            f"{where}: {point.value} can't be imported: {in_words(error)}; mend the package, or pip uninstall {package}"
        ) from error
    if torch_free and "torch" in sys.modules:
        print(
            f"WARNING: {where}: {point.value} imports torch, so that a recipe of it takes seconds to read, and none can be read "
            "without torch: import it in the module of the technique alone",
            file=sys.stderr,
        )
    if not (isinstance(settings, type) and issubclass(settings, TechniqueSettings)):
        raise FgvcError(f"{where}: {point.value} is no TechniqueSettings (fgvc.config.technique)")
    if settings.model_fields["kind"].default != point.name:
        raise FgvcError(f"{where}: its kind is {settings.model_fields['kind'].default!r}; give both one name")
    if ":" not in getattr(settings, "technique", ""):
        raise FgvcError(f"{where}: {point.value} has no `technique`, the class that does it as 'package.module:Class'")
    return settings


@cache
def settings_by_kind() -> Mapping[str, type[TechniqueSettings]]:
    """The settings classes by kind, in the order of the hooks, those of installed packages last; all of them are imported.

    Raises FgvcError for an entry point as `_installed` does."""
    classes = {kind: load_object(reference) for kind, reference in BUILT_IN.items()}
    return MappingProxyType(classes | {kind: _installed(kind) for kind in _points()})


class _Recorded(Section):
    """Base of `Techniques`: techniques of installed packages that are off are not dumped.

    So a run that doesn't use them can be read, and is the same run, where these packages are not installed."""

    absent: ClassVar[str] = "the package that brings it is not installed"

    @model_serializer(mode="wrap")
    def _without(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {kind: settings for kind, settings in handler(self).items() if settings is not None or kind in BUILT_IN}


def _fields() -> dict[str, Any]:
    """A field for each technique. Packages are imported when a recipe names one of theirs: what is wrong with a package that
    nobody uses does not matter."""
    fields: dict[str, Any] = {}
    for kind, reference in BUILT_IN.items():
        settings = load_object(reference)
        fields[kind] = (settings | None, Field(None, description=settings.__doc__))
    for kind, points in _points().items():
        package = points[-1].dist.name if points[-1].dist else GROUP
        fields[kind] = (Annotated[Any, Deferred(partial(_installed, kind))], Field(None, description=f"of the package {package}"))
    return fields


Techniques = create_model("Techniques", __base__=_Recorded, __doc__="Technique -> its settings; null removes one.", **_fields())


def enabled_techniques(techniques: Section) -> dict[str, TechniqueSettings]:
    """Return the settings of the techniques that a recipe enables, by kind, in the order of the hooks. Raises FgvcError where
    `requires` of one is no Requires."""
    fields = type(techniques).model_fields
    enabled = {kind: settings for kind in fields if (settings := getattr(techniques, kind)) is not None}
    for kind, settings in enabled.items():
        if not isinstance(settings.requires, Requires):
            raise FgvcError(
                f"techniques.{kind}: its settings' `requires` is {settings.requires!r}; return a Requires (fgvc.config.technique)"
            )
    return enabled
