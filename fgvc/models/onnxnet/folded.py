"""Detection, by a file's graph, of convolutions that a batch norm was folded into."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fgvc.models.onnxnet.layers import normalise
from fgvc.models.onnxnet.net import OnnxNet

OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm)
OWN_STATISTICS = {F.layer_norm, F.group_norm, F.instance_norm, torch.sqrt, torch.rsqrt}  # a norm, or the parts of one
ACTIVATIONS = {F.relu, F.hardtanh, F.hardswish, F.leaky_relu, F.silu}


@dataclass(frozen=True, slots=True)
class Folded:
    """Convolutions of an OnnxNet without a batch norm behind them."""

    names: tuple[str, ...]  # of those that one was folded into, in the order of the graph
    left: dict[str, str]  # all others -> why no norm can be, or was, folded into them
    arithmetic: int = 0  # convolutions with a norm that is written as a product, by a number a channel, and a sum


def folded_convolutions(net: OnnxNet) -> Folded:
    """Classify the convolutions of a net as it was read.

    Exporters fold a batch norm into the convolution before it, which has a bias from then on. So one was folded into each that
    has a bias and works on a map, in a net that has no norms of another kind; in a net that has some (layer norms), into those
    alone that an activation follows, which layer norms leave to linear layers.
    """
    used = Counter(id(weight) for module in net.modules() for weight in module.parameters(recurse=False))
    otherwise = _normalises_otherwise(net)
    names: list[str] = []
    left: dict[str, str] = {}
    arithmetic = 0
    for name, node in _convolutions(net):
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        if any(_is_norm(reader) for reader in _readers(node)):
            continue
        if any(_is_product(reader) for reader in _readers(node)):
            arithmetic += 1
            continue
        if conv.bias is None:
            left[name] = "no bias, which a folded norm leaves"
        elif not conv.weight.requires_grad or not conv.bias.requires_grad:
            left[name] = "not trained"
        elif used[id(conv.weight)] > 1 or used[id(conv.bias)] > 1:
            left[name] = "its tensors are read twice"
        elif _cells(node) == 1:
            left[name] = "on a map of one cell"
        elif otherwise and not any(reader.target in ACTIVATIONS for reader in _readers(node)):
            left[name] = "in a net of other norms, and no activation follows"
        else:
            names.append(name)
    return Folded(tuple(names), left, arithmetic)


def _convolutions(net: OnnxNet) -> Iterator[tuple[str, fx.Node]]:
    for part, nodes in _graphs(net):
        for node in nodes:
            if node.op == "call_module" and type(net.get_submodule(f"{part}.{node.target}")) is nn.Conv2d:
                yield f"{part}.{node.target}", node


def _graphs(net: OnnxNet) -> Iterator[tuple[str, list[fx.Node]]]:
    for part in ("body", "pool", "tail"):
        module = getattr(net, part)
        if module is not None:
            yield part, list(module.graph.nodes)


def _normalises_otherwise(net: OnnxNet) -> bool:
    own = any(
        node.target in OWN_STATISTICS for _, nodes in _graphs(net) for node in nodes if node.op == "call_function"
    )
    return own or any(isinstance(module, OTHER_NORMS) for module in net.modules())


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read a value, through the Identity at a stage's end."""
    return [
        reader
        for user in node.users
        for reader in (_readers(user) if user.op == "call_module" and str(user.target).startswith("stage_") else [user])
    ]


def _is_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm, also one whose statistics are computed."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and isinstance(owner.get_submodule(str(node.target)), _BatchNorm)
    return node.target is normalise or node.target is F.batch_norm


def _is_product(node: fx.Node) -> bool:
    """Whether a node multiplies by numbers of the file."""
    return node.target is operator.mul and any(arg.op == "get_attr" for arg in node.all_input_nodes)


def _cells(node: fx.Node) -> int:
    """Places of a convolution's output."""
    return math.prod(node.meta["shape"][2:])
