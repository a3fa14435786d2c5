"""Tracing of a net's uses of its weights: in which calls, in which order, and behind which layers.

Any net will do, timm's or that of an ONNX file: what is watched are torch's functions while an image goes through. A net without
data (device meta) is watched as well as a real one. The same watch lets a net run with other weights in the places of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVS = {torch.conv1d, torch.conv2d, torch.conv3d}
PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
SCALES = {getattr(torch.Tensor, name) for name in ("mul", "mul_", "__mul__", "__rmul__", "__imul__")} | {torch.mul}
SHIFTS = {getattr(torch.Tensor, name) for name in ("add", "add_", "__add__", "__radd__", "__iadd__")} | {torch.add}
LIKENESS = {torch.Tensor.type_as, torch.Tensor.expand_as, torch.Tensor.view_as, torch.Tensor.to}  # an operand gives its form
MOVES = {  # numbers keep their channel
    torch.flatten, torch.Tensor.flatten, torch.Tensor.reshape, torch.reshape, torch.Tensor.view, torch.Tensor.contiguous,
    torch.Tensor.permute, torch.permute, torch.Tensor.transpose, torch.transpose, torch.Tensor.unflatten, F.dropout,
    torch.dropout, F.dropout2d,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that is computed from weights alone, as a call reads it."""

    value: Tensor
    names: tuple[str, ...]  # the parameters and buffers that it is computed from
    direct: bool  # whether it is one of them itself
    turned: bool = False  # whether `value` is it transposed

    @property
    def form(self) -> tuple[int, ...]:
        """The operand's shape without axes of one."""
        return tuple(side for side in self.value.shape if side > 1)


@dataclass(slots=True)
class Use:
    """One call that combines weights with values that depend on the image.

    kind: *layer* (a convolution or a linear layer: weight, and bias where there is one), *norm* (by running statistics: mean,
    variance, and scale and shift where there are any), *scale* (a product), *shift* (a sum), *other*.
    """

    kind: str
    operands: list[Operand]
    after: frozenset[int]  # the layers that its inputs come from, with none between
    behind: int | None  # the layer that it follows, with at most other numbers a channel between
    eps: float = 0.0  # of a norm

    @property
    def key(self) -> tuple[int, ...]:
        """The shape of a layer's weight; a 1 x 1 convolution has that of a linear layer."""
        return layer_key(self.operands[0].value.shape)


def layer_key(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of a layer's weight for comparison: 1 x 1 kernels are left out, 1D ones are written as 2D."""
    rows, columns, *kernel = shape
    if all(side == 1 for side in kernel):
        return rows, columns
    return (rows, columns, 1, *kernel) if len(kernel) == 1 else (rows, columns, *kernel)


@dataclass(slots=True)
class Live:
    """Known facts of a tensor that depends on the image."""

    after: frozenset[int] = frozenset()
    behind: int | None = None


class Trace(TorchFunctionMode):
    """Notes each use of the weights of a net. `others`: by the number of a use, what its call reads in the place of its operands;
    None: the call does nothing."""

    def __init__(self, net: nn.Module, others: Mapping[int, Sequence[Tensor | None] | None] | None = None) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self.others = dict(others or {})
        self.entry: Tensor | None = None  # what the first layer reads, but for padding
        self.named = {id(value): name for name, value in [*net.named_parameters(), *net.named_buffers()]}
        self.trained = {name for name, _ in net.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = list(_tensors([args, kwargs]))
        states = [state for tensor in tensors if (state := _live(tensor)) is not None]
        names = [name for tensor in tensors if _live(tensor) is None for name in self._names(tensor)]
        if not states:
            result = func(*args, **kwargs)
            for tensor in _tensors(result) if names else ():
                if id(tensor) not in self.named:
                    tensor._fgvc_names = tuple(dict.fromkeys(names))  # type: ignore[attr-defined]
            return result
        state = Live(frozenset().union(*(state.after for state in states)), states[0].behind if func in MOVES else None)
        if func is F.batch_norm or (names and not self.trained.isdisjoint(names) and func not in LIKENESS):
            result, state = self._use(func, args, kwargs, states, state)
        else:
            result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if id(tensor) not in self.named:
                tensor._fgvc_live = state  # type: ignore[attr-defined]
                if not self.uses and tensor.dim() == 4 and tensor.shape[1] == 3 and func is not F.pad:
                    self.entry = tensor
        return result

    def _names(self, tensor: Tensor) -> tuple[str, ...]:
        name = self.named.get(id(tensor))
        return (name,) if name is not None else getattr(tensor, "_fgvc_names", ())

    def _operand(self, tensor: Tensor, *, turned: bool = False) -> Operand:
        value = tensor.detach()
        return Operand(value.T if turned else value, self._names(tensor), id(tensor) in self.named, turned)

    def _use(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], states: list[Live], state: Live
    ) -> tuple[Any, Live]:
        number, behind = len(self.uses), states[0].behind if len(states) == 1 else None
        replaced = self.others.get(number, ())
        if func in CONVS or func is F.linear:
            return self._layer(func, args, kwargs, state)
        if func in PRODUCTS and _live(args[0]) is not None and args[1].dim() == 2:
            self.uses.append(Use("layer", [self._operand(args[1], turned=True)], state.after, None))
            result = func(args[0], *args[1:], **kwargs) if not replaced else F.linear(args[0], *replaced)  # type: ignore[arg-type]
            return result, Live(frozenset([number]), number)
        if func is F.batch_norm and len(args) > 2 and args[1] is not None and not (len(args) > 5 and args[5]):
            parts = _arguments(("x", "mean", "var", "weight", "bias", "training", "momentum", "eps"), args, kwargs)
            operands = [
                self._operand(parts[name]) for name in ("mean", "var", "weight", "bias") if parts.get(name) is not None
            ]
            self.uses.append(Use("norm", operands, state.after, behind, eps=float(parts.get("eps", 1e-5))))
            if replaced is None or args[0].is_meta:  # torch computes a norm without data step by step: half of the time
                return args[0].clone(), Live(state.after, behind)
            if replaced:
                result = func(args[0], *replaced, False, 0.0, parts.get("eps", 1e-5))
                return result, Live(state.after, behind)
            return func(*args, **kwargs), Live(state.after, behind)
        mine = [tensor for tensor in _tensors([args, kwargs]) if _live(tensor) is None and self._names(tensor)]
        kind = "scale" if func in SCALES else "shift" if func in SHIFTS else "other"
        if behind is not None and (kind == "other" or self._operand(mine[0]).form != self.uses[behind].key[:1]):
            behind = None  # not a number a channel
        self.uses.append(Use(kind, [self._operand(tensor) for tensor in mine], state.after, behind))
        if replaced is None:
            result = next(tensor for tensor in _tensors([args, kwargs]) if _live(tensor) is not None)
        elif replaced:
            table = {id(old): new for old, new in zip(mine, replaced, strict=True)}
            result = func(*_replaced(args, table), **_replaced(kwargs, table))
        else:
            result = func(*args, **kwargs)
        return result, Live(state.after, behind)

    def _layer(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], state: Live
    ) -> tuple[Any, Live]:
        number = len(self.uses)
        parts = _arguments(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, kwargs)
        operands = [self._operand(parts[name]) for name in ("weight", "bias") if parts.get(name) is not None]
        self.uses.append(Use("layer", operands, state.after, None))
        if replaced := self.others.get(number):
            parts["weight"], parts["bias"] = replaced
            result = func(parts.pop("input"), parts.pop("weight"), parts.pop("bias"), **parts)
        else:
            result = func(*args, **kwargs)
        return result, Live(frozenset([number]), number)


@dataclass(frozen=True, slots=True)
class Traced:
    """The uses of a net's weights, its answer, and what its first layer reads, but for padding."""

    uses: list[Use]
    logits: Tensor
    entry: Tensor
    heads: frozenset[int]  # the layers that no other follows

    @property
    def layers(self) -> list[int]:
        """Numbers of the uses that are layers, but for the heads."""
        return [number for number, use in enumerate(self.uses) if use.kind == "layer" and number not in self.heads]


def traced(
    net: nn.Module, images: Tensor, others: Mapping[int, Sequence[Tensor | None] | None] | None = None
) -> Traced:
    """Watch images (B,3,H,W) go through a net in eval mode; see `Trace` for `others`."""
    images = images.detach()
    images._fgvc_live = Live()  # type: ignore[attr-defined]
    trace = Trace(net, others)
    with torch.no_grad(), trace:
        logits = net(images)
    followed = frozenset[int]().union(*(use.after for use in trace.uses if use.kind == "layer"))
    heads = frozenset(n for n, use in enumerate(trace.uses) if use.kind == "layer" and n not in followed)
    return Traced(trace.uses, logits, images if trace.entry is None else trace.entry, heads)


def stages_of(net: nn.Module) -> tuple[tuple[int, int], ...]:
    """Channels and reduction of each stage, as timm's `feature_info` has them; () where it has none."""
    return tuple((int(stage["num_chs"]), int(stage["reduction"])) for stage in getattr(net, "feature_info", None) or ())


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _live(tensor: Tensor) -> Live | None:
    return getattr(tensor, "_fgvc_live", None)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)


def _replaced(tree: Any, table: Mapping[int, Any]) -> Any:
    if isinstance(tree, Tensor):
        return table.get(id(tree), tree)
    if isinstance(tree, tuple | list):
        return type(tree)(_replaced(item, table) for item in tree)
    return {key: _replaced(item, table) for key, item in tree.items()} if isinstance(tree, dict) else tree
