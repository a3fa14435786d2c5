"""The registry: a technique is in fgvc when its config is in this union."""

from __future__ import annotations

from typing import Annotated, Any, Protocol, get_args

from pydantic import Field, create_model

from fgvc.config import Section
from fgvc.techniques.acb import AcbConfig
from fgvc.techniques.acol import AcolConfig
from fgvc.techniques.adl import AdlConfig
from fgvc.techniques.ae_psl import AePslConfig
from fgvc.techniques.attention_crop_drop import AttentionCropDropConfig
from fgvc.techniques.box_head import BoxHeadConfig
from fgvc.techniques.cam_erasing import CamErasingConfig
from fgvc.techniques.centre_loss import CentreLossConfig
from fgvc.techniques.cutmix import CutmixConfig
from fgvc.techniques.cutout import CutoutConfig
from fgvc.techniques.dbb import DbbConfig
from fgvc.techniques.dcl import DclConfig
from fgvc.techniques.distill import DistillConfig
from fgvc.techniques.dropblock import DropblockConfig
from fgvc.techniques.hide_and_seek import HideAndSeekConfig
from fgvc.techniques.mixup import MixupConfig
from fgvc.techniques.mosaic import MosaicConfig
from fgvc.techniques.multiscale_head import MultiscaleHeadConfig
from fgvc.techniques.overparam import OverparamConfig
from fgvc.techniques.random_erasing import RandomErasingConfig
from fgvc.techniques.repvgg import RepvggConfig
from fgvc.techniques.saliencymix import SaliencymixConfig
from fgvc.techniques.similar_smoothing import SimilarSmoothingConfig
from fgvc.techniques.snapmix import SnapmixConfig
from fgvc.techniques.spatial_dropout import SpatialDropoutConfig

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

    With `losses` comes `weights`, name of a term -> fgvc.schedule.Scheduled; names in `measures` are only reported."""

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
