"""The plain model, which is deployed: how it is built, its feature layout, and its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from fgvc.errors import FgvcError
from fgvc.io.names import nearest
from fgvc.models import deformable  # noqa: F401 - registers its nets with timm
from fgvc.models.classifier import as_classifier
from fgvc.models.tokens import token_grid


def refuse_unknown(backbone: str, *, key: str = "") -> None:
    """Raise FgvcError with the nearest names if timm has no such model. `key`: the setting with the name, for the message."""
    if not timm.is_model(backbone):
        suggestions = nearest(backbone, timm.list_models(), 3)
        hint = f"; nearest: {', '.join(suggestions)}" if suggestions else ""
        raise FgvcError(f"{key}: " * bool(key) + f"timm has no model {backbone!r}{hint}")


def plain_model(backbone: str, num_classes: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that ships, by definition: timm's own model with K outputs, here with random weights.

    Raises FgvcError if timm refuses the name or the arguments.
    """
    refuse_unknown(backbone)
    try:
        return timm.create_model(backbone, pretrained=False, num_classes=num_classes, **dict(kwargs or {}))
    except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise FgvcError(f"timm can't build {backbone!r} with model.kwargs {dict(kwargs or {})}: {error}") from error


def deployed(model: nn.Module) -> nn.Module:
    """The form in which a plain model ships: in eval mode, and fused if timm itself re-parameterises the net
    (RepVGG, MobileOne, FastViT...). A copy if anything is fused; the argument itself only goes to eval mode."""
    default = torch.get_default_dtype()
    # Some of timm's nets (RepViT, LeViT...) fuse into modules of the default dtype, whatever their own, and in place.
    torch.set_default_dtype(next((p.dtype for p in model.parameters() if p.is_floating_point()), default))
    try:
        with torch.no_grad():
            return reparameterize_model(model.eval(), inplace=False)
    finally:
        torch.set_default_dtype(default)


def feature_layout(net: nn.Module, features: Tensor) -> Literal["NCHW", "NHWC", "tokens"]:
    """The layout of the output of `forward_features`. Raises FgvcError if it is unknown."""
    if isinstance(features, Tensor) and features.ndim == 4:
        declared = getattr(net, "output_fmt", None)
        if declared is not None and str(declared).upper().endswith("NHWC"):
            return "NHWC"
        stages: Any = getattr(net, "feature_info", None) or ()
        widths = {getattr(net, "num_features", features.shape[1]), *(stage["num_chs"] for stage in stages)}
        return "NHWC" if features.shape[-1] in widths and features.shape[1] not in widths else "NCHW"
    if isinstance(features, Tensor) and features.ndim == 3:
        return "tokens"
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise FgvcError(f"{type(net).__name__}: features of kind {shape} have no map layout that fgvc knows")


def feature_map(net: nn.Module, features: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Features in the layout (B,C,h,w), whatever the backbone's; a view where possible.

    `size`: height and width of the input in pixels, from which the grid of tokens follows (`fgvc.models.tokens.token_grid`); only
    tokens need it. Raises FgvcError if tokens form no grid, or, without `size`, may form several.
    """
    layout = feature_layout(net, features)
    if layout == "NCHW":
        return features
    if layout == "NHWC":
        return features.permute(0, 3, 1, 2)
    pixels = None if size is None else (int(size[0]), int(size[1]))
    prefix, grid = token_grid(net, int(features.shape[1]), pixels)
    return features[:, prefix:].transpose(1, 2).unflatten(2, grid)


def scale_cells(net: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Features, in the backbone's layout, times the weights (B,h,w) of the cells of their map; prefix tokens stay."""
    layout, weights = feature_layout(net, features), weights.to(features.dtype)
    if layout == "NCHW":
        return features * weights[:, None]
    if layout == "NHWC":
        return features * weights[..., None]
    cells = weights.flatten(1)[..., None]
    prefix = features.shape[1] - cells.shape[1]
    return torch.cat([features[:, :prefix], features[:, prefix:] * cells], dim=1)


def head_prefixes(net: nn.Module) -> tuple[str, ...]:
    """The prefixes of the names of the classifier's parameters, as timm records them; () if it doesn't."""
    names = pretrained_cfg(net).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def freeze(net: nn.Module, stages: int) -> list[nn.Module]:
    """Freeze the parameters of the first stages, as timm's feature_info counts them (in ResNets the stem is the first). Returns
    the modules that must stay in eval mode, too.

    Raises FgvcError if no stage remains to train, or timm does not know the net's stages.
    """
    info = list(getattr(net, "feature_info", None) or [])
    if not info:
        raise FgvcError(f"model.freeze: timm does not know the stages of a {type(net).__name__}")
    if stages >= len(info):
        raise FgvcError(f"model.freeze: {stages} of the {len(info)} stages: leave at least one of them to train")
    last = str(info[stages - 1]["module"])
    if not last:
        raise FgvcError(f"model.freeze: timm does not name the end of stage {stages} of a {type(net).__name__}")
    behind = {id(module) for module in modules_behind(net, last)}
    frozen = [m for m in net.modules() if all(id(leaf) not in behind for leaf in m.modules() if _is_leaf(leaf))]
    for module in (*frozen, net):  # the net's direct parameters are position and class tokens, which belong to the stem
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return frozen


def modules_behind(net: nn.Module, name: str) -> list[nn.Module]:
    """The modules after the one called `name` and its submodules, in the order of registration, or of the forward where the net
    knows that."""
    named = list(getattr(net, "named_modules_in_order", net.named_modules)())
    end = max(at for at, (path, _) in enumerate(named) if f"{path}.".startswith(f"{name}."))
    return [module for _, module in named[end + 1 :]]


def zeros_through(net: nn.Module, size: tuple[int, int], *, pre_logits: bool = False) -> tuple[Tensor, Tensor]:
    """The outputs for one image of zeros in eval mode: features, and logits or (`pre_logits`) the input of the last layer."""
    training, weight = net.training, next(net.parameters())
    net.eval()
    try:
        with torch.no_grad():
            x = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
            features = as_classifier(net).forward_features(x)
            options = {"pre_logits": True} if pre_logits else {}
            return features, as_classifier(net).forward_head(features, **options)
    finally:
        net.train(training)


def refuse_size(net: nn.Module, size: tuple[int, int], classes: int, name: str) -> None:
    """Raise FgvcError if the backbone called `name` can't take images of this size, or doesn't return a row of logits.

    By a forward pass of zeros, before data are read."""
    try:
        _, z = zeros_through(net, size)
    except (RuntimeError, AssertionError, ValueError, AttributeError, TypeError) as error:
        hint = "; many transformers need model.kwargs.img_size" if "match" in str(error) else ""
        raise FgvcError(f"model.backbone: {name} can't take images of {size[0]} x {size[1]}: {error}{hint}") from error
    if not isinstance(z, torch.Tensor) or z.shape != (1, classes):
        shape = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
        raise FgvcError(
            f"model.backbone: {name} gives {shape}, not one row of {classes} logits: not a plain classifier"
        )


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def memory_format(net: nn.Module) -> torch.memory_format:
    """`channels_last` for convolutional nets (up to 1.4x faster), unless torch would crash with it: in a 1x1 convolution of
    stride > 1 on a 3-channel input, as in RepVGG's stem (torch 2.14, x86 CPUs)."""
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    crashes = any(c.in_channels <= 4 and max(c.kernel_size) == 1 and max(c.stride) > 1 for c in convs)
    spatial = any(max(c.kernel_size) > 1 and c.stride != c.kernel_size for c in convs)
    return torch.channels_last if spatial and not crashes else torch.contiguous_format


def pretrained_cfg(net: nn.Module) -> Mapping[str, Any]:
    """timm's record of a net's pretrained weights: their preprocessing, their place, and the name of the head."""
    return cast("Mapping[str, Any]", net.pretrained_cfg)
