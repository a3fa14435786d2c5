"""The registry: a technique is in fgvc when its config is in this union."""

from __future__ import annotations

from typing import Annotated, Any, Protocol, get_args

from pydantic import Field, create_model

from fgvc.config.section import Section
from fgvc.techniques.acb.technique import AcbConfig
from fgvc.techniques.acol.technique import AcolConfig
from fgvc.techniques.adl.technique import AdlConfig
from fgvc.techniques.ae_psl.technique import AePslConfig
from fgvc.techniques.attention_crop_drop.technique import AttentionCropDropConfig
from fgvc.techniques.box_head.technique import BoxHeadConfig
from fgvc.techniques.cam_erasing.technique import CamErasingConfig
from fgvc.techniques.centre_loss.technique import CentreLossConfig
from fgvc.techniques.cutmix.technique import CutmixConfig
from fgvc.techniques.cutout.technique import CutoutConfig
from fgvc.techniques.dbb.technique import DbbConfig
from fgvc.techniques.dcl.technique import DclConfig
from fgvc.techniques.distill.technique import DistillConfig
from fgvc.techniques.dropblock.technique import DropblockConfig
from fgvc.techniques.hide_and_seek.technique import HideAndSeekConfig
from fgvc.techniques.mixup.technique import MixupConfig
from fgvc.techniques.mosaic.technique import MosaicConfig
from fgvc.techniques.multiscale_head.technique import MultiscaleHeadConfig
from fgvc.techniques.overparam.technique import OverparamConfig
from fgvc.techniques.random_erasing.technique import RandomErasingConfig
from fgvc.techniques.repvgg.technique import RepvggConfig
from fgvc.techniques.saliencymix.technique import SaliencymixConfig
from fgvc.techniques.similar_smoothing.technique import SimilarSmoothingConfig
from fgvc.techniques.snapmix.technique import SnapmixConfig
from fgvc.techniques.spatial_dropout.technique import SpatialDropoutConfig

AnyConfig = Annotated[
    # The order is that of the hooks: maps of the clean image are erased before images are mixed, random boxes after it.
    AePslConfig
    | CamErasingConfig
    | MixupConfig
    | CutmixConfig
    | SnapmixConfig
    | SaliencymixConfig
    | MosaicConfig
    | CutoutConfig
    | RandomErasingConfig
    | HideAndSeekConfig
    | DclConfig
    | AttentionCropDropConfig
    | AcolConfig
    | CentreLossConfig
    | SimilarSmoothingConfig
    | AdlConfig
    | DropblockConfig
    | SpatialDropoutConfig
    | MultiscaleHeadConfig
    | BoxHeadConfig
    | DistillConfig
    | AcbConfig
    | DbbConfig
    | RepvggConfig
    | OverparamConfig,
    Field(discriminator="kind"),
]


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


CONFIGS: dict[str, type[Section]] = {
    config.model_fields["kind"].default: config for config in get_args(get_args(AnyConfig)[0])
}

_fields: dict[str, Any] = {
    kind: (config | None, Field(None, description=config.__doc__)) for kind, config in CONFIGS.items()
}
Techniques = create_model(
    "Techniques", __base__=Section, __doc__="Technique -> its settings; null removes one.", **_fields
)


def build(chosen: Section) -> dict[str, Technique]:
    """The techniques of a recipe, by kind, in the union's order: the order of the YAML never matters."""
    configs = {kind: getattr(chosen, kind) for kind in CONFIGS}
    return {kind: config.build() for kind, config in configs.items() if config is not None}
