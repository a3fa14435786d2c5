"""The interface of a classifier, timm's or that of a deployed file: all that techniques, training and class maps use of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Classifier(Protocol):
    """A classifier, an `nn.Module` besides. Logits (B,K) of images x (B,3,H,W) are forward_head(forward_features(x))."""

    num_classes: int  # K
    num_features: int  # channels of the last features
    feature_info: Any  # of each stage: num_chs, reduction (pixels a cell), module (its name)
    pretrained_cfg: Mapping[str, Any]  # `classifier`: the last layer's name; of timm's weights: their preprocessing

    def forward_features(self, x: Tensor) -> Tensor:
        """The last features: a map (B,C,h,w) or (B,h,w,C), or tokens (B,N,C)."""
        ...

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B,K) of the last features, or (`pre_logits`) what the last layer reads, (B,D)."""
        ...

    def get_classifier(self) -> nn.Module:
        """The last layer, an `nn.Linear` as a rule."""
        ...

    def group_matcher(self, coarse: bool = False) -> Any:
        """Depth of each parameter, for layer decay: see `timm.models.group_parameters`."""
        ...

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


def as_classifier(net: nn.Module) -> Classifier:
    """The net itself, for the type checker: timm's nets are modules of many classes."""
    return cast("Classifier", net)
