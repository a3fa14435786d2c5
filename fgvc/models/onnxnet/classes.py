"""Change of the number of classes of a deployed file's net: a new last layer, and its tensors in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn

from fgvc.errors import FgvcError
from fgvc.models.onnxnet.net import OnnxNet
from fgvc.models.onnxnet.values import Slot, View

LAST = ("classifier.weight", "classifier.bias")


def last_tensors(net: OnnxNet) -> dict[str, Slot]:
    """The tensors of the file that belong to the last layer alone, by name. Raises FgvcError, with the reason, where the last
    layer has no tensors of its own."""
    stored = {
        name: slots[0] for name, slots in net.slots.items() if name in net.movable and any(slot.target in LAST for slot in slots)
    }
    expected = [name for name in LAST if getattr(net.classifier, name.partition(".")[2]) is not None]
    if sorted(slot.target for slot in stored.values()) != sorted(expected):
        raise FgvcError("its last layer is computed in the graph")
    if any(slot.joined is not None for slot in stored.values()):
        raise FgvcError("its last layer is the mean of two of the file's")
    if any(len(net.slots[name]) > 1 for name in stored):
        raise FgvcError("a tensor of its last layer is read elsewhere, too")
    return stored


def change_classes(net: OnnxNet, classes: int) -> None:
    """Give the net a last layer of so many classes, in place: zeros, to be fitted. Its tensors in the file are then of another
    shape (`fgvc.exporting.changed` writes them). Raises FgvcError where the file's last layer can't be another."""
    old = net.classifier.out_features
    changed = {name: replace(slot, views=_resized(slot.views, old, classes)) for name, slot in last_tensors(net).items()}
    like = net.classifier.weight
    layer = nn.Linear(net.classifier.in_features, classes, bias=net.classifier.bias is not None).to(like.device, like.dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    net.classifier, net.num_classes = layer, classes
    net.pretrained_cfg = {**net.pretrained_cfg, "num_classes": classes}
    net.slots |= {name: [slot] for name, slot in changed.items()}
    if net.tail is not None:  # what it reshapes, it reshapes by numbers
        for node in net.tail.graph.nodes:
            if node.target is torch.reshape:
                node.args = (node.args[0], tuple(classes if side == old else side for side in node.args[1]))
        net.tail.recompile()


def _resized(views: Sequence[View], old: int, new: int) -> tuple[View, ...]:
    """Views from a stored tensor to the layer's parameter, whose first axis are the classes, for another number of these."""
    axis, resized = 0, list[View]()
    for view in reversed(views):  # from the parameter back to the file
        if view.kind == "permute":
            before = view.argument[axis]
            argument = view.argument
        else:
            stride = prod(view.argument[axis + 1 :])
            places = [at for at, side in enumerate(view.before) if side == old and prod(view.before[at + 1 :]) == stride]
            if not places:
                raise FgvcError("the classes are no axis of its last layer's tensors")
            before, argument = places[0], _with(view.argument, axis, new)
        resized.insert(0, View(view.kind, argument, _with(view.before, before, new)))
        axis = before
    return tuple(resized)


def _with(shape: tuple[int, ...], axis: int, side: int) -> tuple[int, ...]:
    return (*shape[:axis], side, *shape[axis + 1 :])
