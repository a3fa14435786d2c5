"""The net that ships: one of timm's by name, or that of a deployed file. Only this module distinguishes the two."""

from __future__ import annotations

from torch import nn

from fgvc.config.models import Model
from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.models.lookup.twin import timm_stages
from fgvc.models.onnxnet.classes import change_classes
from fgvc.models.onnxnet.net import OnnxNet, open_onnx


def shipped_net(model: Model, classes: int | None, size: tuple[int, int] | None) -> nn.Module:
    """The net that ships, by definition, a `Classifier`: timm's own with K = `classes` outputs (None: any number, two) and random
    weights, or the deployed file's with its weights, but for a last layer of zeros where `model.classes` change. `size`: height
    and width of the images; None: a file's own.

    Raises FgvcError where timm refuses the name or the arguments, or the file is no net of so many classes and this size.
    """
    if model.onnx is None:
        assert model.backbone is not None
        return plain_model(model.backbone, 2 if classes is None else classes, model.kwargs)
    net = file_net(model, size)
    if model.classes == "change" and classes is not None:
        try:
            change_classes(net, classes)
        except FgvcError as error:
            raise FgvcError(f"model.classes: change: {model.onnx}: {error}; train a net of model.backbone instead") from error
    if classes is not None and net.num_classes != classes:
        raise FgvcError(
            f"model.onnx: {model.onnx} gives {net.num_classes} numbers an image, and its labels name {classes} classes: give "
            "those of all its outputs in deploy.labels"
        )
    return net.train()


def file_net(model: Model, size: tuple[int, int] | None) -> OnnxNet:
    """The net of `model.onnx`, in eval mode, its stages timm's where timm has a net with the same layers. Raises FgvcError, with
    the setting, where the file is none."""
    assert model.onnx is not None
    try:
        net = open_onnx(model.onnx.expanduser(), size, output=model.output)
    except FgvcError as error:
        raise FgvcError(f"model.onnx: {error}") from error
    net.set_stages(timm_stages(net))
    return net
