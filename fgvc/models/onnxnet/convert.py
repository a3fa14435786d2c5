"""An ONNX graph as a torch.fx graph of modules and functions.

A module computes for any batch, also where the file's own is fixed: a size that is `k` times the batch for each of the
builder's batches is written so. Height and width are those that the net is read for.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

from fgvc.errors import FgvcError
from fgvc.models.onnxnet.values import Array, Known, Live, Size, Slot, Stored, Value, View


class Refused(Exception):
    """Raised where a node can't be converted, with the reason; the caller names the node."""


@dataclass(slots=True)
class Builder:
    """A torch.fx graph under construction, and the modules that it calls."""

    batches: tuple[int, ...]  # the file's own first
    fixed: bool  # the file takes its own batch alone
    opsets: Mapping[str, int]
    consumers: Mapping[str, Sequence[onnx.NodeProto]]
    outputs: frozenset[str]
    of_images: frozenset[str]  # names of values that are computed from the image
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[str, Value] = field(default_factory=dict)
    slots: dict[str, list[Slot]] = field(default_factory=dict)  # by the name of the stored tensor
    kept: dict[str, str] = field(default_factory=dict)  # stored floats that nothing trains: why
    fused: dict[int, str] = field(default_factory=dict)  # id of a node that is part of one before: the value it stands for
    learned: bool = False  # whether a layer with weights has been met: what comes before is preprocessing
    on_image: bool = True  # whether the node at hand reads what is computed from the image, not weights alone
    names: Counter[str] = field(default_factory=Counter)
    shared: dict[tuple[str, tuple[View, ...]], nn.Parameter] = field(default_factory=dict)
    _batch: fx.Node | None = None
    input: fx.Node | None = None

    # --- values -------------------------------------------------------------------------------------------------------

    def constant(self, value: Value | None, what: str) -> Array:
        """The array of a known value that does not depend on the batch. Raises Refused where it does, or is not known."""
        if isinstance(value, Stored):
            return value.tensor().numpy()
        if not isinstance(value, Known) or not value.fixed:
            raise Refused(f"its {what} is computed from the images")
        return value.array

    def ints(self, value: Value | None, what: str) -> list[int]:
        """Whole numbers of a constant value. `what`: its name in the message. Raises Refused where they depend on the batch."""
        return [int(number) for number in self.constant(value, what).reshape(-1)]

    def sizes(self, value: Value) -> list[int | Size]:
        """Whole numbers of a value, where a number of images is a Size."""
        if not isinstance(value, Known):
            raise Refused("a shape is computed from the images")
        return [self.size(numbers) for numbers in zip(*(array.reshape(-1).tolist() for array in value.arrays), strict=True)]

    def size(self, numbers: Sequence[float]) -> int | Size:
        if len(set(numbers)) == 1:
            return int(numbers[0])
        times = {number / batch for number, batch in zip(numbers, self.batches, strict=True)}
        if len(times) != 1 or not float(times.copy().pop()).is_integer():
            raise Refused(f"a size depends on the batch in another way than k times it ({numbers} for {self.batches})")
        return Size(int(times.pop()))

    def live(self, value: Value, *, name: str = "constant", trained: bool = True) -> Live:
        """A value as the graph reads it: a stored tensor becomes a parameter, or a buffer where it is not trained."""
        if isinstance(value, Live):
            return value
        if isinstance(value, Known):
            if not value.fixed:
                return self._repeated(value, name)
            data = torch.from_numpy(np.array(value.array))
            data = data.float() if data.dtype in (torch.float16, torch.float64) else data
            target = self._free(name)
            _register(self.root, target, data)
            return self._attribute(target, data)
        tensor = value.tensor()
        reason = "" if trained else "running statistics"
        if trained and self.on_image and not self.learned:
            reason = "preprocessing: before the first layer"
        elif trained and _is_mask(tensor):
            reason = "a mask: two values alone"
        target = self._free(_clean(value.name))
        if reason:
            _register(self.root, target, tensor)
            self.kept.setdefault(value.name, reason)
        else:
            _register(self.root, target, self.parameter(value))
        self.slots.setdefault(value.name, []).append(Slot(target, value.views, trained=not reason))
        return self._attribute(target, tensor)

    def _repeated(self, value: Known, name: str) -> Live:
        """Numbers that are the same for each image of a batch."""
        first = value.array[:1] if value.array.ndim else value.array
        for array, batch in zip(value.arrays, self.batches, strict=True):
            if array.ndim != first.ndim or array.shape != (batch, *first.shape[1:]) or not (array == first).all():
                raise Refused("a tensor of numbers depends on the batch")
        row = self.live(Known((first,) * len(self.batches)), name=name)
        return self.call(torch.Tensor.expand, row, (Size(1), *first.shape[1:]))

    def parameter(self, value: Stored) -> nn.Parameter:
        """The parameter of a stored tensor as it is viewed; the same one for all readers with the same view."""
        return self.shared.setdefault((value.name, value.views), nn.Parameter(value.tensor()))

    def _attribute(self, target: str, data: Tensor) -> Live:
        return Live(self.graph.get_attr(target), (data.to("meta"),) * len(self.batches))

    def batch(self) -> fx.Node:
        if self._batch is None:
            assert self.input is not None
            with self.graph.inserting_after(self.input):
                self._batch = self.graph.call_method("size", (self.input, 0))
        return self._batch

    # --- nodes --------------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Live:
        """A function of live values (and numbers, sizes, lists of them) as a node. Values without data go through it, too."""
        node = self.graph.call_function(function, _plain(args, self._node), _plain(kwargs, self._node))
        with torch.no_grad():
            metas = tuple(
                function(*_plain(args, self._meta(at)), **_plain(kwargs, self._meta(at))) for at in range(len(self.batches))
            )
        return Live(node, metas)

    def elementwise(self, function: Callable[..., Any], x: Live, *args: Any, **kwargs: Any) -> Live:
        """Add the call of a function whose result has the shape and type of its input: no computation is needed to know them.
        (For some of torch's functions `call` would load its compiler.)"""
        return Live(self.graph.call_function(function, (x.node, *args), kwargs), x.metas)

    def broadcast(self, function: Callable[..., Any], *operands: Live | float) -> Live:
        """Add the call of a function of operands that are broadcast together."""
        live = [value for value in operands if isinstance(value, Live)]
        shapes = [torch.broadcast_shapes(*(value.metas[at].shape for value in live)) for at in range(len(self.batches))]
        node = self.graph.call_function(function, tuple(self._node(value) for value in operands))
        return Live(node, tuple(torch.empty(shape, device="meta") for shape in shapes))

    def module(self, name: str, x: Live, shape: Callable[[torch.Size], Sequence[int]]) -> Live:
        """A module of one input as a node. `shape`: of its output, from that of its input."""
        node = self.graph.call_module(name, (x.node,))
        metas = tuple(torch.empty(tuple(shape(meta.shape)), device="meta") for meta in x.metas)
        node.meta["shape"] = tuple(metas[0].shape)
        return Live(node, metas)

    def add_module(self, base: str, module: nn.Module, **stored: Stored | None) -> str:
        """Put a module into the tree, its parameters and buffers those of stored tensors; returns its name."""
        name = self._free(base)
        for attribute, value in stored.items():
            if value is None:
                continue
            if attribute in module._buffers:
                module._buffers[attribute] = value.tensor()
                self.kept.setdefault(value.name, "running statistics")
                self.slots.setdefault(value.name, []).append(Slot(f"{name}.{attribute}", value.views, trained=False))
            else:
                module._parameters[attribute] = self.parameter(value)
                self.slots.setdefault(value.name, []).append(Slot(f"{name}.{attribute}", value.views, trained=True))
        _register(self.root, name, module)
        self.learned = True
        return name

    def _free(self, base: str) -> str:
        """A name that nothing has: neither an attribute, nor a module around or below one."""
        name = base
        while not name or self._taken(name):
            self.names[base] += 1
            name = f"{base}_{self.names[base]}"
        return name

    def _taken(self, name: str) -> bool:
        place: Any = self.root
        words = name.split(".")
        for word in words[:-1]:
            place = getattr(place, word, None)
            if place is None:
                return False
            if type(place) is not nn.Module:
                return True
        return hasattr(place, words[-1])

    def _node(self, value: Any) -> Any:
        if isinstance(value, Live):
            return value.node
        if isinstance(value, Size):
            return self.batch() if value.times == 1 else self.graph.call_function(operator.mul, (self.batch(), value.times))
        return value

    def _meta(self, at: int) -> Callable[[Any], Any]:
        def meta(value: Any) -> Any:
            if isinstance(value, Live):
                return value.metas[at]
            return value.times * self.batches[at] if isinstance(value, Size) else value

        return meta

    # --- numbers ------------------------------------------------------------------------------------------------------

    def evaluate(self, node: onnx.NodeProto, inputs: Sequence[Value | None]) -> list[Known]:
        """The outputs of a node of known numbers, for each batch, by onnx's own reference implementation."""
        results = []
        for at in range(len(self.batches)):
            feed = {name: _numbers(value, at) for name, value in zip(node.input, inputs, strict=True) if name}
            results.append(run_node(node, feed, self.opsets))
            if all(
                isinstance(value, Stored) or value is None or (isinstance(value, Known) and value.fixed) for value in inputs
            ):
                results *= len(self.batches)
                break
        return [Known(tuple(np.asarray(array) for array in arrays)) for arrays in zip(*results, strict=True)]


def run_node(node: onnx.NodeProto, feed: Mapping[str, Array], opsets: Mapping[str, int]) -> list[Any]:
    """The outputs of one node, by onnx's own reference implementation."""
    inputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "node", inputs, outputs), opset_imports=imports)
    return list(ReferenceEvaluator(model).run(None, dict(feed)))


def _numbers(value: Value | None, at: int) -> Array:
    if isinstance(value, Stored):
        return value.tensor().numpy()
    assert isinstance(value, Known)
    return value.arrays[at]


def _plain(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """A tree of tuples, lists, slices and mappings with its leaves replaced."""
    if isinstance(tree, tuple | list):
        return type(tree)(_plain(item, leaf) for item in tree)
    if isinstance(tree, dict):
        return {key: _plain(item, leaf) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(_plain(item, leaf) for item in (tree.start, tree.stop, tree.step)))
    return leaf(tree)


def _register(root: nn.Module, name: str, value: nn.Module | nn.Parameter | Tensor) -> None:
    *path, last = name.split(".")
    place = root
    for word in path:
        if not hasattr(place, word):
            place.add_module(word, nn.Module())
        place = getattr(place, word)
    if isinstance(value, nn.Module):
        place.add_module(last, value)
    elif isinstance(value, nn.Parameter):
        place.register_parameter(last, value)
    else:
        place.register_buffer(last, value)


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor has two different values at most, as attention masks have."""
    table = tensor.dim() >= 2 and min(tensor.shape[-2:]) > 1
    return table and len(tensor.unique()) <= 2 and bool((tensor.abs() >= 100).any() or not tensor.isfinite().all())


def _clean(name: str) -> str:
    """Convert a name of the file to a module's name: words between dots."""
    words = [re.sub(r"\W", "_", word) for word in re.split(r"[./:]+", name) if word]
    return ".".join(f"_{word}" if word[:1].isdigit() and at == 0 else word for at, word in enumerate(words)) or "tensor"


def module_name(node: onnx.NodeProto, weight: str | None) -> str:
    """Name of a layer's module: that of its weight where that has a name of its own (`blocks.0.conv.weight`); else from the
    scopes in the node's name (`/blocks/blocks.0/conv/Conv`), or that itself."""
    if weight is not None and weight.endswith((".weight", ".kernel", "_weight")):
        return _clean(weight.rpartition("." if "." in weight else "_")[0])
    path: list[str] = []
    for word in [word for word in node.name.split("/") if word]:
        if path and word.startswith(f"{path[-1]}."):
            path[-1] = word
        elif not re.fullmatch(rf"{node.op_type}(_\d+)?", word):
            path.append(word)
    return _clean(".".join(path) or node.name or f"{node.op_type}_{node.output[0]}")


def refusal(where: str, node: onnx.NodeProto, reason: str) -> FgvcError:
    """The error for a node that can't be converted. `where`: the file, for the message."""
    domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
    return FgvcError(f"{where}: node {node.name or node.output[0]!r} ({domain}{node.op_type}): {reason}")
