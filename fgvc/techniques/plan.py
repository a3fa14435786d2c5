"""The only ways by which a technique may touch the network: hook, gate, add, replace (docs/design.md).

`Plan` is for the setup alone, `Context` for one step. Both belong to one technique.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fgvc.config.teachers import AnyTeacher
from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map, modules_behind, scale_cells, zeros_through
from fgvc.models.class_maps import Method, evaluating, refusal
from fgvc.models.classifier import as_classifier
from fgvc.models.norms import batch_statistics
from fgvc.reparam.replace import Site, find_sites, replace_conv
from fgvc.techniques.api import Batch, Draws, Output
from fgvc.techniques.settings import FEATURES, AnyMethod
from fgvc.techniques.teacher import Teacher

Gate = Callable[[Tensor, "Context"], Tensor]


@dataclass(slots=True)
class Attachments:
    """All that the techniques attach to a net: read by the step, stripped at export."""

    net: nn.Module
    size: tuple[int, int]
    branches: nn.ModuleDict = field(default_factory=nn.ModuleDict)  # by technique; never inside the backbone
    hooked: set[str] = field(default_factory=set)  # module names
    replaced: set[str] = field(default_factory=set)  # names of convolutions
    gates: list[tuple[str, str, Gate]] = field(default_factory=list)  # technique, module name, gate
    notes: list[str] = field(default_factory=list)
    grad_checkpointing: bool = False  # activation checkpointing is on
    render: float = 1.0  # side of the rendered images in units of the network's input
    opener: Callable[[AnyTeacher, Attachments], Teacher] | None = None  # None: the net is only rebuilt, not trained
    teachers: list[Teacher] = field(default_factory=list)  # of all techniques, as they were opened
    average: list[nn.Module] = field(default_factory=list)  # the moving average, once there is one
    refusals: dict[Method, str | None] = field(default_factory=dict)
    _sites: tuple[list[Site], dict[str, str]] | None = None
    _shapes: tuple[tuple[int, int, int], int] | None = None

    def sites(self) -> tuple[list[Site], dict[str, str]]:
        """Replaceable convolutions, and why others are not; looked for once, on the plain net, before any is replaced."""
        if self._sites is None:
            self._sites = find_sites(self.net, self.size)
        return self._sites

    def shapes(self) -> tuple[tuple[int, int, int], int]:
        """Shape (C,h,w) of the feature map and width of the pooled features, from one forward of zeros."""
        if self._shapes is None:
            features, pooled = zeros_through(self.net, self.size, pre_logits=True)
            _, channels, height, width = feature_map(self.net, features, self.size).shape
            self._shapes = (channels, height, width), pooled.shape[1]
        return self._shapes


class Plan:
    """View of the network for one technique, during its setup. Every refusal is an FgvcError that names the technique."""

    def __init__(self, kind: str, attachments: Attachments) -> None:
        self.kind, self._attachments = kind, attachments

    @property
    def sites(self) -> list[Site]:
        """Convolutions that can be replaced and folded back."""
        return self._attachments.sites()[0]

    @property
    def refused(self) -> dict[str, str]:
        """Convolutions that can't be replaced, and why."""
        return self._attachments.sites()[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self._attachments.size

    @property
    def classes(self) -> int:
        return int(self._attachments.net.num_classes)  # type: ignore[arg-type]

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """Shape (C,h,w) of what `Context.grid` returns. Raises FgvcError where the features are no map."""
        return self._attachments.shapes()[0]

    @property
    def pooled_width(self) -> int:
        """Width D of what `Context.pooled` returns."""
        return self._attachments.shapes()[1]

    def module(self, name: str) -> nn.Module:
        """A module of the net. Raises FgvcError where there is none of that name."""
        try:
            return self._attachments.net.get_submodule(name)
        except AttributeError as error:
            raise FgvcError(f"techniques.{self.kind}: this backbone has no module {name!r}") from error

    def stage(self, number: int | Literal["features"]) -> str:
        """Name of the last block of a `feature_info` stage (negative numbers count from the end), or FEATURES.

        Hooks sit on blocks: under activation checkpointing timm never calls the stage module itself. Raises FgvcError where the
        backbone has no such stage, or timm does not name its module.
        """
        if number == FEATURES:
            return FEATURES
        info = list(getattr(self._attachments.net, "feature_info", None) or [])
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
        return int(list(self._attachments.net.feature_info)[number]["num_chs"])  # type: ignore[arg-type]

    def shape_at(self, module: str) -> tuple[int, int, int]:
        """Shape (C,h,w) of `Context.grid` of this module's output, or of FEATURES. Raises FgvcError where that is no map."""
        with torch.no_grad(), self._noise_through(module) as (f, _):
            _, channels, height, width = self._map(module, f).shape
        return channels, height, width

    def _map(self, module: str, f: Tensor) -> Tensor:
        try:
            return feature_map(self._attachments.net, f, self.size)
        except FgvcError as error:
            raise FgvcError(f"techniques.{self.kind}: {module}: {error}") from error

    def norms_after(self, module: str) -> int:
        """Number of batch norms after a module, in the order of registration."""
        behind = modules_behind(self._attachments.net, module)
        return sum(isinstance(other, nn.modules.batchnorm._BatchNorm) for other in behind)

    def cells(self, stage: int | Literal["features"]) -> str:
        """Name of a stage, or FEATURES, for a gate on the cells of its map.

        Raises FgvcError where these are no map, or the classifier does not read them.
        """
        name, net = self.stage(stage), self._attachments.net
        with torch.enable_grad(), self._noise_through(name) as (f, features):
            self.need_cells(self._map(name, f).shape[2:])
            pooled = as_classifier(net).forward_head(features, pre_logits=True)
            # Not of the plain sum: a layer norm's has no gradient.
            signs = torch.linspace(-1, 1, pooled.numel(), device=pooled.device).view_as(pooled)
            (gradient,) = torch.autograd.grad((pooled * signs).sum(), f, allow_unused=True)
            if gradient is None or not feature_map(net, gradient, self.size).abs().max() > 0:
                raise FgvcError(
                    f"techniques.{self.kind}: the classifier of a {type(net).__name__} does not read the map at {name} "
                    "(a class token alone, most likely); choose an earlier stage"
                )
        return name

    def need_cells(self, cells: Sequence[int]) -> None:
        """Refuse a map of these sides if it is one cell: there no place stands out. Raises FgvcError."""
        if max(cells) == 1:
            height, width = self.size
            raise FgvcError(
                f"techniques.{self.kind}: at {height} x {width} pixels the map is one cell, which tells no place from another; "
                "raise image.size, or choose an earlier stage where there is a choice"
            )

    def can_be_negative(self, module: str) -> bool:
        """Whether this module (or forward_features) returns values below 0, by a forward of noise."""
        with torch.no_grad(), self._noise_through(module) as (f, _):
            return bool((f < 0).any())

    @contextmanager
    def _noise_through(self, module: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Output of this module (or of forward_features) for two images of noise in eval mode, and the features."""
        net, outputs = self._attachments.net, list[Tensor]()
        modules = [] if module == FEATURES else [self.module(module)]
        handles = [m.register_forward_hook(lambda _m, _x, f: outputs.append(f)) for m in modules]
        rng, weight = torch.Generator().manual_seed(0), next(net.parameters())
        x = torch.randn(2, 3, *self.size, generator=rng).to(weight).requires_grad_(torch.is_grad_enabled())
        with evaluating(net):
            try:
                features = as_classifier(net).forward_features(x)
            finally:
                for handle in handles:
                    handle.remove()
            if modules and not outputs:
                raise FgvcError(f"techniques.{self.kind}: this backbone's forward never calls {module!r}")
            yield (outputs[0] if modules else features), features

    def hook(self, module: str) -> None:
        """Record this module's output in every forward: `Output.hooked[module]`."""
        self.module(module)
        self._attachments.hooked.add(module)

    def gate(self, module: str, gate: Gate) -> None:
        """Change this module's output, or that of forward_features (FEATURES), in train mode, for the views that are gated;
        identity in eval mode."""
        if module != FEATURES:
            self.module(module)
        self._attachments.gates.append((self.kind, module, gate))

    def add(self, name: str, module: nn.Module) -> None:
        """Add a training-only module, later `ctx.branches[name]`. Raises FgvcError for a name that is taken, or can't be one."""
        branches = self._attachments.branches
        modules = branches[self.kind] if self.kind in branches else nn.ModuleDict()
        if name in dict(modules.named_children()):
            raise FgvcError(f"techniques.{self.kind}: plan.add({name!r}): there is a module of that name already; choose another")
        try:
            modules.add_module(name, module)
        except (KeyError, TypeError) as error:
            raise FgvcError(f"techniques.{self.kind}: plan.add({name!r}): {error.args[0]}") from error
        branches[self.kind] = modules

    def map(self, method: AnyMethod) -> Method:
        """Method by which `Output.map` can compute class maps; auto: the closed form where there is one, else gradcam.

        Raises FgvcError where this backbone has none.
        """
        self.need_cells(self.map_shape[1:])
        for candidate in ("cam", "gradcam") if method == "auto" else (method,):
            if candidate not in self._attachments.refusals:
                self._attachments.refusals[candidate] = refusal(self._attachments.net, self.size, candidate)
            if (reason := self._attachments.refusals[candidate]) is None:
                return candidate
        raise FgvcError(f"techniques.{self.kind}: no {method} map: {reason}")

    def render(self, scale: float) -> None:
        """Render the crops at this many times the input's side or more: `Batch.render`."""
        self._attachments.render = max(self._attachments.render, scale)

    def teachers(self, teacher_settings: Sequence[AnyTeacher]) -> list[Teacher]:
        """Open teachers; none where a trained net is only rebuilt, for which they may be gone.

        Raises FgvcError for one that is not there, or can't teach these classes.
        """
        opener = self._attachments.opener
        try:
            teachers = [] if opener is None else [opener(settings, self._attachments) for settings in teacher_settings]
        except FgvcError as error:
            raise FgvcError(f"techniques.{self.kind}.teachers: {error}") from error
        self._attachments.teachers += teachers
        return teachers

    def replace(self, site: Site, block: nn.Module) -> None:
        """Replace a convolution by a block that folds back into it."""
        replace_conv(self._attachments.net, site, block)
        self._attachments.replaced.add(site.name)

    def note(self, text: str) -> None:
        """Add one line for the user: what was done, what was left alone."""
        self._attachments.notes.append(f"{self.kind}: {text}")


def _no_eval_pass(of: str) -> Output:
    raise FgvcError(f"there is no pass through the {of} outside of a training step")


@dataclass(frozen=True, slots=True)
class Context:
    """Read-only services of one step, for one technique."""

    draw: Any  # the value of its `draw`
    progress: float
    branches: Mapping[str, nn.Module]
    # All three take features as forward_features returns them, and leave the running statistics of a norm in the head alone.
    head: Callable[[Tensor], Tensor]  # -> logits (B,K), through the deployed head
    pooled: Callable[[Tensor], Tensor]  # -> (B,D), what the deployed head's last layer reads
    grid: Callable[..., Tensor]  # -> (B,C,h,w), whatever the layout; of images of this step's size, see `sized`
    # One forward of the clean images through the "net" or the "ema", without gradient and in eval mode, once a step.
    eval_pass: Callable[[str], Output] = _no_eval_pass
    batch: Batch | None = None  # the clean one, where there is a step
    scaled: Callable[[Tensor, Tensor], Tensor] = torch.mul  # features, (B,h,w) weights of cells -> features
    second_pass: bool = False  # over the same batch (SAM): what after_step needs was collected in the first
    # From one hook to later ones of this micro-batch, its second pass included; `after_step` gets that of the last one.
    state: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)  # from one hook to later ones of this pass alone, whose graph it may hold
    shown: dict[str, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    def sized(self, size: Sequence[int]) -> Context:
        """This context for images of another size (height, width) than the step's."""
        return replace(self, grid=partial(self.grid, size=size))

    def show(self, name: str, maps: Tensor, x: Tensor | None = None) -> None:
        """Record maps (B,h,w), float in [0,1] or bool, on images x (B,3,H,W), for previews and studies; x None: the main view.

        The first of a name in a step stays: gates are called once for every group of views.
        """
        self.shown.setdefault(name, (x, maps.detach()))


def context_of(
    kind: str,
    attachments: Attachments,
    draws: Draws,
    eval_pass: Callable[[str], Output] = _no_eval_pass,
    batch: Batch | None = None,
    *,
    size: Sequence[int] | None = None,
    second_pass: bool = False,
) -> Context:
    """Context of one technique for one step. `size`: of the images (height, width); None: the batch's, or without one, the
    plan's."""
    branches = dict(attachments.branches[kind].named_children()) if kind in attachments.branches else {}
    size = size or (attachments.size if batch is None else batch.x.shape[2:])

    def head(features: Tensor, *, pre_logits: bool = False) -> Tensor:
        with batch_statistics(attachments.net, recompute=attachments.grad_checkpointing):
            return as_classifier(attachments.net).forward_head(features, pre_logits=pre_logits)

    return Context(
        draw=draws.of.get(kind),
        progress=draws.progress,
        branches=branches,
        head=head,
        pooled=partial(head, pre_logits=True),
        grid=partial(feature_map, attachments.net, size=size),
        eval_pass=eval_pass,
        batch=batch,
        scaled=partial(scale_cells, attachments.net),
        second_pass=second_pass,
        state=draws.state.setdefault(kind, {}),
    )
