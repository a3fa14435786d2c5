"""Replacement of convolutions of a timm net by blocks of the same input and output shapes, which are folded back at the end.

`find_sites` runs the net once and records which modules read each convolution's output; `folded_state` folds the blocks into the
plain state dict. The rules are in docs/design.md.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from timm.layers import BatchNormAct2d, CondConv2d, Conv2dSame, SyncBatchNormAct
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary
from torchvision.ops import DeformConv2d

from fgvc.errors import FgvcError
from fgvc.reparam.fold import exact
from fgvc.reparam.unfold import UNFOLDED, ScaledConv2d

CONVOLUTIONS = (nn.Conv2d, Conv2dSame, ScaledConv2d)  # exact types: a subclass may do anything with its weight
KINDS = (nn.Conv2d, CondConv2d, DeformConv2d)  # all kinds of convolutions; those that can't be replaced are refused by name
NORMS = (nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm, SyncBatchNormAct)


@dataclass(frozen=True, slots=True)
class Site:
    """A convolution that can be replaced and folded back."""

    name: str  # dotted path of the convolution in the timm net
    norm: str | None  # dotted path of the batch norm that is the only reader of its output; None: the convolution has a bias


@runtime_checkable
class Block(Protocol):
    """A module in a convolution's place that can be folded into an equal convolution."""

    norm: str | None  # set by `replace_conv`: the batch norm that takes the folded bias; None: the convolution's own bias does

    def fold(self) -> tuple[Tensor, Tensor | None]:
        """The equal convolution in eval mode: kernel (out, in/groups, k, k) and bias (out,), float64 on the CPU."""
        ...


def find_sites(net: nn.Module, size: tuple[int, int]) -> tuple[list[Site], dict[str, str]]:
    """The convolutions that can be replaced, in the order of `named_modules`, and for all others: name -> reason.

    Runs one eval-mode forward of a (2,3,*size) example on a copy: flags, buffers, hooks and gradients of `net` and
    torch's generators stay as they are.
    """
    trial = copy.deepcopy(net).eval()
    owners = Counter(id(module) for _, module in trial.named_modules(remove_duplicate=False))
    users = Counter(id(weight) for module in trial.modules() for weight in module.parameters(recurse=False))
    refused = {
        name: reason for name, conv in _convolutions(trial) if (reason := _unfit(conv, owners=owners, users=users))
    }
    calls, readers = _watch(trial, size)

    sites: list[Site] = []
    for name, conv in _convolutions(trial):
        if name in refused:
            continue
        norm = _sole_norm(trial, readers.get(name, set()), calls)
        if calls[name] != 1:
            refused[name] = f"called {calls[name]} times in a forward" if calls[name] else "not called in a forward"
        elif norm is None and conv.bias is None:
            refused[name] = "no bias, and no batch norm that alone reads its output: a folded bias has nowhere to go"
        else:
            sites.append(Site(name, norm))
    return sites, refused


def is_replaced(module: nn.Module) -> bool:
    """Whether a technique has put a block there. A convolution that got back what its file had folded is none."""
    return isinstance(module, Block) and not isinstance(module, UNFOLDED)


def replace_conv(net: nn.Module, site: Site, block: nn.Module) -> None:
    """Replace the convolution of `site` by `block`. Raises FgvcError if it, or a module around it, is replaced already."""
    path = site.name.split(".")
    for end in range(1, len(path) + 1):
        present = net.get_submodule(".".join(path[:end]))
        if is_replaced(present):
            raise FgvcError(
                f"{site.name}: {type(present).__name__} replaces it already: two techniques replace the same "
                "convolution; remove one, or keep them apart with include and exclude"
            )
    conv = net.get_submodule(site.name)
    # A convolution with a bias takes the folded one itself, whatever follows it.
    block.norm = site.norm if conv.bias is None else None  # type: ignore[assignment]
    if not isinstance(block, Block):
        raise TypeError(f"{site.name}: {type(block).__name__} has no fold(): it can't go back into a plain convolution")
    net.set_submodule(site.name, block.train(conv.training), strict=True)


def folded_state(net: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain net that equals `net` in eval mode: exactly the plain keys, on the CPU.

    Floating-point entries are float64, the others copied as they are. `net` is not changed, and shares no memory with
    the result. Raises FgvcError in train mode, where batch norms use the statistics of the batch and no plain
    convolution is equal.
    """
    if any(module.training for module in net.modules()):
        raise FgvcError("the net is in train mode: call net.eval() before folding it")
    blocks = {name: module for name, module in net.named_modules() if isinstance(module, Block)}

    state: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    done: set[str] = set()
    for key, value in net.state_dict().items():
        name = next((block for block in blocks if key.startswith(f"{block}.")), None)
        if name is None:
            state[key] = exact(value) if value.is_floating_point() else value.detach().cpu().clone()
        elif name not in done:  # all keys of a block become those of one convolution
            done.add(name)
            state[f"{name}.weight"], bias = blocks[name].fold()
            norm = blocks[name].norm
            if bias is not None and norm is not None:
                shifts[f"{norm}.running_mean"] = bias
            elif bias is not None:
                state[f"{name}.bias"] = bias
    for key, bias in shifts.items():
        state[key] = state[key] - bias  # g * (conv + b - mean) = g * (conv - (mean - b))
    return state


def _convolutions(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in net.named_modules() if isinstance(module, KINDS))


def _unfit(conv: nn.Module, *, owners: Counter[int], users: Counter[int]) -> str | None:
    """The reason why a convolution can't be replaced whatever the forward does with it, or None."""
    if isinstance(conv, DeformConv2d):
        return "a deformable convolution, whose taps are read at offsets"
    if not isinstance(conv, nn.Conv2d) or type(conv) not in CONVOLUTIONS:
        return f"a {type(conv).__name__}, whose kernel is not a plain weight"
    if "weight" not in dict(conv.named_parameters(recurse=False)):
        return "its weight is computed from other parameters"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it carries hooks, which a replacement would lose"
    if owners[id(conv)] > 1:
        return "the module is registered under two names"
    if users[id(conv.weight)] > 1:
        return "its weight is shared with another module"
    if conv.padding_mode != "zeros":
        return f"its padding mode is {conv.padding_mode}, not zeros"
    if conv.dilation != (1, 1):
        return f"its dilation is {max(conv.dilation)}, not 1"
    if not conv.weight.requires_grad:
        return "frozen: its weight takes no gradient"
    return None


class _Readers(TorchDispatchMode):
    """Records the readers of watched tensors: the batch norm that runs the operation, or "" for anything else.

    Recorded below autograd: reads without gradient and through views count too, `x.shape` does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watched = WeakTensorKeyDictionary()  # convolution output -> name; the outputs are not kept alive
        self.inside = ""  # the batch norm that is running
        self.readers: dict[str, set[str]] = {}

    def read(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value in self.watched:
                self.readers.setdefault(self.watched[value], set()).add(self.inside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read((args, kwargs))
        return func(*args, **(kwargs or {}))


def _watch(net: nn.Module, size: tuple[int, int]) -> tuple[Counter[str], dict[str, set[str]]]:
    """Run `net` once; returns the calls of each convolution and batch norm, and the readers of each convolution's output."""
    mode, calls = _Readers(), Counter[str]()

    def after_convolution(name: str, output: Tensor) -> None:
        calls[name] += 1
        mode.watched[output] = name

    def around_norm(name: str, inside: str) -> None:
        calls[name] += bool(inside)
        mode.inside = inside

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output, name=name: after_convolution(name, output))
        elif type(module) in NORMS:
            module.register_forward_pre_hook(lambda module, args, name=name: around_norm(name, name))
            module.register_forward_hook(lambda module, args, output, name=name: around_norm(name, ""))
    weight = next(net.parameters())
    example = torch.zeros(2, 3, *size, device=weight.device, dtype=weight.dtype)
    devices = [weight.device.index] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), mode:
        mode.read(net(example))
    return calls, mode.readers


def _sole_norm(net: nn.Module, readers: set[str], calls: Counter[str]) -> str | None:
    """The only reader, if it is a batch norm with running statistics that reads nothing else; otherwise None."""
    name = next(iter(readers), "")
    if len(readers) != 1 or not name or calls[name] != 1 or net.get_submodule(name).running_mean is None:
        return None
    return name
