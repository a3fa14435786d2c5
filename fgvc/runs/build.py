"""The net of a run and its training step, built from a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.optim import list_optimizers
from torch import Tensor, nn

from fgvc.config.images import Preprocess
from fgvc.config.models import Model, run_of
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import enabled_techniques
from fgvc.data.deployed import refuse_unstated, sidecar_doubts
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.names import nearest
from fgvc.models.backbone import freeze, head_prefixes, refuse_size, refuse_unknown
from fgvc.models.loss import make_criterion
from fgvc.models.net import shipped_net
from fgvc.models.norms import running_norms, zero_gamma
from fgvc.models.onnxnet.folded import folded_convolutions
from fgvc.models.onnxnet.net import OnnxNet
from fgvc.models.probe import require_linear_head, zero_head
from fgvc.models.weights import Weights, load_weights, preprocess_for, stated_keys, unlikely
from fgvc.reparam.replace import Block, folded_state
from fgvc.reparam.unfold import unfold
from fgvc.runs.folder import read_run, recorded_classes
from fgvc.runs.step import StepModule
from fgvc.runtime.engine import doubts_about, refuse_misfit
from fgvc.techniques.registry import build
from fgvc.techniques.teacher import Teacher


def class_counts(index: ImageIndex) -> NDArray[np.int64]:
    """Count the training images by class, (K,)."""
    return np.bincount(index.labels[index.rows("train")], minlength=len(index.classes))


def refuse_names(recipe: Recipe) -> None:
    """Raise FgvcError for names of backbones or of the optimizer that timm does not know."""
    if recipe.model.backbone is not None:
        refuse_unknown(recipe.model.backbone, key="model.backbone")
    for kind, settings in enabled_techniques(recipe.techniques).items():
        for number, teacher in enumerate(getattr(settings, "teachers", ())):
            if (backbone := getattr(teacher, "backbone", None)) is not None:
                refuse_unknown(backbone, key=f"techniques.{kind}.teachers.{number}.backbone")
    if recipe.optim.name not in list_optimizers():
        near = nearest(recipe.optim.name, list_optimizers(), 3)
        hint = f"; nearest: {', '.join(near)}" if near else f"; it has {', '.join(list_optimizers())}"
        raise FgvcError(f"optim.name: timm has no optimizer {recipe.optim.name!r}{hint}")


@dataclass(slots=True)
class BuiltNet:
    """The network side of a recipe, before any training."""

    step: StepModule
    weights: Weights
    preprocess: Preprocess
    pretrained: tuple[str, ...]  # parameters of `step` whose values are those of `weights`


def build_net(
    recipe: Recipe,
    classes: int,
    *,
    pretrained: bool = True,
    counts: NDArray[np.int64] | None = None,
    opener: Callable[..., Teacher] | None = None,
) -> BuiltNet:
    """Build the plain model with its first weights, and what the techniques add to it and replace in it; hooks not yet attached.

    `pretrained=False` skips `model.weights`: for loading a checkpoint, whose run folder records the preprocessing.
    `counts` (K,): training images by class, for a loss that weighs classes. `opener`: loads teachers. Both are for a net that is
    to learn; without an opener what techniques add for teachers is left out.
    Raises FgvcError where the backbone can't take the image size, or a technique refuses the backbone.
    """
    size = recipe.image.size
    net = shipped_net(recipe.model, classes, size)
    model = recipe.model if pretrained else recipe.model.model_copy(update={"weights": "none"})
    weights = load_weights(net, model, stated=stated_keys(recipe.deploy), plain=_folded_weights(Path(model.weights).expanduser()))
    if pretrained:
        zero_gamma(net, model)
        if model.head == "zero":
            _zero_head(net)
    else:
        weights = replace(weights, origin="of the checkpoint")
    if isinstance(net, OnnxNet):
        weights = replace(weights, doubts=(*weights.doubts, *_unfold(net, recipe.model)))
    fitted_head = head_prefixes(net) if model.head != "timm" else ()
    loaded = {id(p) for name, p in net.named_parameters() if name not in weights.fresh and not name.startswith(fitted_head)}
    epochs = recipe.train.epochs
    for side in {size, *(recipe.image.train_size(epoch / epochs) for epoch in range(epochs))}:
        refuse_size(net, side, classes, recipe.model.name)
    if pretrained and model.head == "probe":
        require_linear_head(net, size, f"model.head: probe: {recipe.model.name}", way="set model.head=timm")
    preprocess = preprocess_for(recipe.deploy, size, weights)
    if isinstance(net, OnnxNet):
        preprocess = preprocess.model_copy(update={"network": net.file.record})
    if pretrained:
        doubts = check_file(net, recipe, preprocess, counts) if isinstance(net, OnnxNet) else ()
        doubts = (*doubts, *sidecar_doubts(recipe, preprocess), *unlikely(preprocess, weights))
        weights = replace(weights, doubts=(*weights.doubts, *doubts))
    step = StepModule(
        net,
        build(recipe.techniques),
        size=size,
        criterion=make_criterion(recipe.loss, counts),
        l1=recipe.loss.l1,
        grad_checkpointing=recipe.train.grad_checkpointing,
        frozen=_frozen_modules(net, recipe.model),
        opener=None if opener is None else partial(opener, student=preprocess),
    )
    return BuiltNet(step, weights, preprocess, tuple(name for name, p in step.named_parameters() if id(p) in loaded))


def _zero_head(net: nn.Module) -> None:
    try:
        zero_head(net)
    except FgvcError as error:
        raise FgvcError(f"model.head: zero: {error}; set model.head=timm") from error


def check_file(
    net: OnnxNet, recipe: Recipe, spec: Preprocess, counts: NDArray[np.int64] | None
) -> tuple[str, ...]:
    """Doubts about how a deployed file's images are prepared. Raises FgvcError where the recipe leaves that open, does not
    make what the file takes, or has a loss that does not fit the file's end, or a new head where classes have no images."""
    refuse_unstated(recipe)
    if counts is not None and (absent := int((counts == 0).sum())) and recipe.model.head != "timm":
        raise FgvcError(
            f"model.head: {recipe.model.head} makes new rows for classes with training images, and {absent} of the file's "
            f"{len(counts)} have none: beside their rows these would mean nothing. Set it to timm, which keeps the file's head"
            + ("" if recipe.model.weights == "deployed" else ", with model.weights: deployed")
        )
    assert recipe.model.onnx is not None
    refuse_misfit(net.file, spec, model=recipe.model.onnx, where="deploy")
    if net.ending == "sigmoid" and recipe.loss.kind != "bce":
        raise FgvcError(
            f"loss.kind: {recipe.loss.kind}: {recipe.model.onnx} ends with a sigmoid, which answers for each class by itself; "
            "set it to bce"
        )
    return tuple(f"{recipe.model.onnx}: {doubt}" for doubt in doubts_about(net.file, spec))


def _unfold(net: OnnxNet, model: Model) -> tuple[str, ...]:
    """Give each convolution that a batch norm was folded into a norm again, or a scale. Returns a doubt where
    no norm takes batch statistics. Raises FgvcError where norms are to be restored and none was folded."""
    folded, kept = folded_convolutions(net), len(running_norms(net))
    if model.batch_norm == "restore" and not folded.names:
        reasons = "".join(f"; {count} without: {reason}" for reason, count in Counter(folded.left.values()).most_common())
        raise FgvcError(
            f"model.batch_norm: restore: no convolution of {model.onnx} has a batch norm folded into it (it keeps {kept}"
            f"{reasons}); set it to frozen or batch"
        )
    unfold(net, folded.names, norms=model.batch_norm == "restore" or (model.batch_norm == "batch" and not kept))
    if model.batch_norm == "batch" and not kept and not folded.names:
        return (f"model.batch_norm: batch: {model.onnx} has no batch norm, kept or folded: nothing takes batch statistics",)
    return ()


def _frozen_modules(net: nn.Module, model: Model) -> list[nn.Module]:
    """Freeze what the recipe freezes; return the modules that stay in eval mode in training."""
    norms = running_norms(net) if model.batch_norm == "frozen" else []
    return [*(freeze(net, model.freeze) if model.freeze else []), *norms]


def _folded_weights(path: Path) -> dict[str, Tensor] | None:
    """Fold the weights in a checkpoint of a run whose blocks are re-parameterised; None for any other file."""
    if (run := run_of(path)) is None or not path.is_file():
        return None
    step = build_net(read_run(run), len(recorded_classes(run)), pretrained=False).step
    if not any(isinstance(module, Block) for module in step.net.modules()):
        return None
    try:
        step.net.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise FgvcError(f"model.weights: {path}: does not fit the recipe of its run: {error}") from error
    state = folded_state(step.net.eval())
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
