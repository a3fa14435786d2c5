"""Where a technique may touch the network, and nothing else (DESIGN 2): watch, gate, add, graft.

`Plan` is offered during setup only; `Context` gives the services of one step. Both are scoped to one technique.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from fgvc.model.backbone import feature_map, modules_behind, zeros_through
from fgvc.model.graft import Site, find_sites, graft
from fgvc.types import Draws, FgvcError

Gate = Callable[[Tensor, "Context"], Tensor]
FEATURES = "features"  # the tap that needs no hook: the output of forward_features


@dataclass(slots=True)
class Joints:
    """What all techniques together asked for: read by the step, stripped at export."""

    net: nn.Module
    size: tuple[int, int]
    branches: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # by technique; never inside the backbone
    taps: set[str] = field(default_factory=set)  # module names
    gates: list[tuple[str, str, Gate]] = field(default_factory=list)  # technique, module name, gate
    notes: list[str] = field(default_factory=list)
    _sites: tuple[list[Site], dict[str, str]] | None = None
    _shapes: tuple[tuple[int, int, int], int] | None = None

    def sites(self) -> tuple[list[Site], dict[str, str]]:
        """Found once, on the plain net: later grafts do not hide sites from each other."""
        if self._sites is None:
            self._sites = find_sites(self.net, self.size)
        return self._sites

    def shapes(self) -> tuple[tuple[int, int, int], int]:
        """(C,h,w) of the feature map and the width of the pooled features, from one forward of zeros."""
        if self._shapes is None:
            features, pooled = zeros_through(self.net, self.size, pre_logits=True)
            _, channels, height, width = feature_map(self.net, features).shape
            self._shapes = (channels, height, width), pooled.shape[1]
        return self._shapes


class Plan:
    """The setup-time view that one technique has of the network. Every refusal is an FgvcError that names the technique."""

    def __init__(self, kind: str, joints: Joints) -> None:
        self.kind, self._joints = kind, joints

    @property
    def sites(self) -> list[Site]:
        """Convolutions that can be replaced and folded back."""
        return self._joints.sites()[0]

    @property
    def refused(self) -> dict[str, str]:
        """Convolutions that can't, and why."""
        return self._joints.sites()[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self._joints.size

    @property
    def classes(self) -> int:
        return int(self._joints.net.num_classes)  # type: ignore[arg-type]

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C,h,w) of what `Context.grid` gives. Raises FgvcError where the features are no map."""
        return self._joints.shapes()[0]

    @property
    def pooled_width(self) -> int:
        """D of what `Context.pooled` gives."""
        return self._joints.shapes()[1]

    def module(self, name: str) -> nn.Module:
        return self._joints.net.get_submodule(name)

    def stage(self, number: int) -> str:
        """Name of the last block of a `feature_info` stage (negative numbers count from the end).

        Hooks sit on blocks: under activation checkpointing timm never calls the stage module itself.
        """
        info = list(getattr(self._joints.net, "feature_info", None) or [])
        if not -len(info) <= number < len(info):
            raise FgvcError(f"techniques.{self.kind}: stage {number}: this backbone has {len(info)} stages")
        name = str(info[number]["module"])
        if not name:
            raise FgvcError(f"techniques.{self.kind}: stage {number}: timm does not name its module; choose another")
        module = self.module(name)
        while isinstance(module, nn.Sequential) and len(module):
            last = list(module._modules)[-1]
            name, module = f"{name}.{last}", module[-1]
        return name

    def stage_channels(self, number: int) -> int:
        """Channels of a `feature_info` stage's output."""
        self.stage(number)
        return int(list(self._joints.net.feature_info)[number]["num_chs"])  # type: ignore[arg-type]

    def norms_after(self, module: str) -> int:
        """Batch norms that come behind a module, in the order of registration."""
        behind = modules_behind(self._joints.net, module)
        return sum(isinstance(other, nn.modules.batchnorm._BatchNorm) for other in behind)

    def tap(self, module: str) -> None:
        """Record this module's output in every forward: `Output.taps[module]`."""
        self.module(module)
        self._joints.taps.add(module)

    def gate(self, module: str, gate: Gate) -> None:
        """Change this module's output in train mode, for the views that are gated; identity in eval mode."""
        self.module(module)
        self._joints.gates.append((self.kind, module, gate))

    def add(self, name: str, module: nn.Module) -> None:
        """A training-only module, later `ctx.branches[name]`."""
        branches = self._joints.branches
        own = branches[self.kind] if self.kind in branches else nn.ModuleDict()
        branches[self.kind] = own
        own.add_module(name, module)

    def graft(self, site: Site, block: nn.Module) -> None:
        """Replace a convolution by a block that folds back into it."""
        graft(self._joints.net, site, block)

    def note(self, text: str) -> None:
        """One line for the user: what was done, what was left alone."""
        self._joints.notes.append(f"{self.kind}: {text}")


@dataclass(frozen=True, slots=True)
class Context:
    """Read-only services of one step, for one technique."""

    draw: Any  # what its own `draw` returned
    progress: float
    branches: Mapping[str, nn.Module]
    # All three take features as forward_features gives them.
    head: Callable[[Tensor], Tensor]  # -> logits (B,K), through the deployed head
    pooled: Callable[[Tensor], Tensor]  # -> (B,D), what the deployed head's last layer reads
    grid: Callable[[Tensor], Tensor]  # -> (B,C,h,w), whatever the backbone's layout


def context_of(kind: str, joints: Joints, draws: Draws) -> Context:
    branches = dict(joints.branches[kind].named_children()) if kind in joints.branches else {}
    head = cast("Callable[..., Tensor]", joints.net.forward_head)
    return Context(
        draw=draws.of.get(kind),
        progress=draws.progress,
        branches=branches,
        head=head,
        pooled=partial(head, pre_logits=True),
        grid=partial(feature_map, joints.net),
    )
