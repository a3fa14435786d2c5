"""Outputs that are the mean of two linear layers, as those of distilled transformers (arXiv:2012.12877): read as one layer."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx, nn

from fgvc.models.onnxnet.convert import Builder
from fgvc.models.onnxnet.values import Columns, Doubled, Slot


def join_heads(builder: Builder, last: fx.Node) -> fx.Node | None:
    """Replace `last`, where it is (A x + a + B y + b) / 2, by one linear layer [A B] of the features (x, y) / 2 with the bias (a
    + b) / 2, and return that; None where it is something else.

    A and B are trained as they are in the file. Of the biases the sum alone matters: a takes all of its change, and b stays.
    """
    pair = _halved_sum(last)
    heads = [] if pair is None else [module for node in pair if (module := _linear(builder, node)) is not None]
    if pair is None or len(heads) != 2:
        return None
    (first, second), (one, two) = heads, pair
    slots = {key: _only_slot(builder, key) for node in pair for key in (f"{node.target}.weight", f"{node.target}.bias")}
    if None in slots.values() or first.out_features != second.out_features:
        return None
    width, joined = first.in_features, nn.Linear(1, 1, device="meta")
    joined.in_features, joined.out_features = width + second.in_features, first.out_features
    joined.weight = nn.Parameter(torch.cat([first.weight, second.weight], 1).detach())
    joined.bias = nn.Parameter(((first.bias + second.bias) / 2).detach())
    name = builder.add_module(f"{one.target}_and_{str(two.target).rpartition('.')[2]}", joined)
    moves = {
        f"{one.target}.weight": (f"{name}.weight", Columns(0, width)),
        f"{two.target}.weight": (f"{name}.weight", Columns(width, joined.in_features)),
        f"{one.target}.bias": (
            f"{name}.bias",
            Doubled(first.bias.detach().double() - 2 * joined.bias.detach().double()),
        ),
    }
    for old, (target, step) in moves.items():
        stored, slot = slots[old]  # type: ignore[misc]
        builder.slots[stored] = [replace(slot, target=target, joined=step)]
    left, _ = slots[f"{two.target}.bias"]  # type: ignore[misc]
    del builder.slots[left]
    builder.kept[left] = "of two biases that are added the other is trained"
    graph = builder.graph
    with graph.inserting_before(last):
        both = graph.call_function(torch.cat, ([one.args[0], two.args[0]], -1))
        node = graph.call_module(name, (graph.call_function(operator.mul, (both, 0.5)),))
    last.replace_all_uses_with(node)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return node


def _halved_sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    halved = (node.target is operator.truediv and node.args[1] == 2) or (
        node.target is operator.mul and node.args[1] == 0.5
    )
    total = node.args[0] if halved else None
    if not isinstance(total, fx.Node) or total.target not in (operator.add, torch.add) or len(total.users) > 1:
        return None
    one, two = total.args
    return (one, two) if isinstance(one, fx.Node) and isinstance(two, fx.Node) and one is not two else None


def _linear(builder: Builder, node: fx.Node) -> nn.Linear | None:
    """The layer of a node, where it has a bias and nothing else reads it."""
    module = builder.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.Linear) and module.bias is not None and len(node.users) == 1 else None


def _only_slot(builder: Builder, target: str) -> tuple[str, Slot] | None:
    """The stored tensor in a place of the module, and its slot; None where it is read elsewhere, too."""
    held = [(stored, slots) for stored, slots in builder.slots.items() if any(slot.target == target for slot in slots)]
    (stored, slots), *_ = held
    return (stored, slots[0]) if len(slots) == 1 and stored not in builder.kept else None
