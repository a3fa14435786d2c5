"""A deployed file as a network that trains, with the few methods that timm's nets have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fgvc.errors import FgvcError
from fgvc.models.onnxnet.heads import join_heads
from fgvc.models.onnxnet.read import Graph, load_model, read_graph
from fgvc.models.onnxnet.values import Live, Slot

STAGE = "stage_"  # the name of the Identity at the end of a stage, before its number


@dataclass(frozen=True, slots=True)
class Stage:
    """The last value of one resolution that all later ones come from."""

    node: fx.Node
    channels: int
    reduction: int


class OnnxNet(nn.Module):
    """The net of an ONNX file: `forward_features` up to the last spatial map (B,C,h,w) or tokens (B,N,C), `forward_head` from
    there to logits (B,K), without the softmax or sigmoid that the file may end with (`ending`).

    It takes float images (B,3,H,W), as the file's own input is but for layout and type, for any batch.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        parts = _parts(graph)
        for name in parts.stages:
            graph.builder.root.add_module(name, nn.Identity())
        self.file, self.size = graph.file, graph.size
        self.layout, self.dtype, self.batch = graph.file.layout, graph.file.dtype, graph.file.batch
        self.ending, self.output_name = graph.file.ending, graph.file.output
        live = ((name, value.node) for name, value in graph.builder.values.items() if isinstance(value, Live))
        self.features_name = next(name for name, node in live if node is parts.features)  # of the last map, in the file
        self.body = fx.GraphModule(graph.builder.root, parts.body)
        self.pool = fx.GraphModule(graph.builder.root, parts.pool)
        self.classifier: nn.Linear = graph.builder.root.get_submodule(parts.classifier)  # type: ignore[assignment]
        self.tail = None if parts.tail is None else fx.GraphModule(graph.builder.root, parts.tail)
        self.num_classes, self.num_features = self.classifier.out_features, self.classifier.in_features
        self.feature_info = _feature_info((name, stage.channels, stage.reduction) for name, stage in parts.stages.items())
        self.pretrained_cfg: Mapping[str, Any] = {
            "input_size": (3, *graph.size), "classifier": "classifier", "num_classes": self.num_classes,
        }  # fmt: skip
        self.grad_checkpointing = False
        self._depth = _depths(self, parts)
        self.untouched = dict(graph.untouched)
        self.slots = self._own_slots(graph)

    def _own_slots(self, graph: Graph) -> dict[str, list[Slot]]:
        """Locate the file's tensors in this module. One that is read in two ways is not trained: the file holds it once."""
        names = {id(value): name for name, value in [*self.named_parameters(), *self.named_buffers()]}
        own: dict[str, list[Slot]] = {}
        for stored, slots in graph.slots.items():
            values = [(slot, value) for slot in slots if id(value := _value(graph, slot)) in names]
            single = len({id(value) for _, value in values}) == 1 and stored not in graph.untouched
            if not single and any(slot.trained for slot, _ in values):
                self.untouched[stored] = "read in two ways"
                for _, value in values:
                    value.requires_grad_(False)
            if not values:
                self.untouched.setdefault(stored, "the output does not depend on it")
            else:
                own[stored] = [replace(slot, target=names[id(value)], trained=slot.trained and single) for slot, value in values]
        return own

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            features: Tensor = checkpoint(self.body, x, use_reentrant=False)
            return features
        return self.body(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled: Tensor = self.pool(features)
        if pre_logits:  # a classifier that works in each place has its mean behind it
            return pooled.flatten(1, -2).mean(1) if pooled.dim() > 2 else pooled
        logits = self.classifier(pooled)
        return (logits if self.tail is None else self.tail(logits)).flatten(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Apply the file's ending to logits, which gives what the file gives."""
        if self.ending == "sigmoid":
            return logits.sigmoid()
        if self.ending == "log_softmax":
            return logits.log_softmax(1)
        return logits.softmax(1) if self.ending == "softmax" else logits

    def get_classifier(self) -> nn.Linear:
        return self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_stages(self, stages: Sequence[tuple[int, int]]) -> None:
        """Let the stages end where a map of these channels and reductions is the last of its kind, from fine to coarse, as
        timm's `feature_info` of the same net has them. They stay as they are where the file has no such maps."""
        maps = {node.meta["map"]: node for node in self.body.graph.nodes if "map" in node.meta}
        if not stages or len(set(stages)) < len(stages) or not maps.keys() >= set(stages):
            return
        for node in list(self.body.graph.nodes):
            if node.op == "call_module" and str(node.target).startswith(STAGE):
                node.replace_all_uses_with(node.args[0])
                self.body.graph.erase_node(node)
                delattr(self.body, str(node.target))
        for number, stage in enumerate(stages):
            node = maps[stage]
            self.body.add_module(f"{STAGE}{number}", nn.Identity())
            with self.body.graph.inserting_after(node):
                end = self.body.graph.call_module(f"{STAGE}{number}", (node,))
            node.replace_all_uses_with(end, delete_user_cb=lambda user, end=end: user is not end)
        self.body.recompile()
        self.feature_info = _feature_info((f"{STAGE}{number}", *stage) for number, stage in enumerate(stages))

    def no_weight_decay(self) -> set[str]:
        return set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Function from a parameter's name to its depth, for layer decay: the stem is 0, the classifier the deepest."""
        depths, last = self._depth, max(self._depth.values(), default=0) + 1

        def depth(name: str) -> int:
            """Depth of the module that holds the parameter; modules that training has put in its place lie below it."""
            while name not in depths and name:
                name = name.rpartition(".")[0]
            return depths.get(name, last)

        return depth

    def stored(self, state: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the file that may have moved, by its name there and in its shape there, detached, float64. `state`:
        values in place of the net's own, by the keys of its state dict, such as those of `fgvc.reparam.replace.folded_state`."""
        state = dict(self.named_parameters()) | dict(self.named_buffers()) if state is None else state
        for name, slots in self.slots.items():
            value = state[slots[0].target].detach().cpu().double()
            yield name, slots[0].to_file(value)

    def named_modules_in_order(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules, and the holders of parameters of their own, in the order of a forward; those that it calls twice,
        twice."""
        for prefix, graph in (("body", self.body), ("pool", self.pool), ("tail", self.tail)):
            for node in graph.graph.nodes if graph is not None else ():
                target = f"{prefix}.{node.target}"
                if node.op == "call_module":
                    yield from self.get_submodule(target).named_modules(prefix=target)
                elif node.op == "get_attr":
                    yield target, self.get_submodule(target.rpartition(".")[0])
            if prefix == "pool":
                yield "classifier", self.classifier

    def constants(self) -> frozenset[str]:
        """Names of buffers that are constants of the file's graph and no weights."""
        weights = {slot.target for name in self.movable for slot in self.slots[name]}
        return frozenset(name for name, _ in self.named_buffers() if name not in weights)

    @property
    def movable(self) -> frozenset[str]:
        """The file's tensors that a run may write: those that are trained, and running statistics."""
        running = {name for name, reason in self.untouched.items() if reason == "running statistics"}
        return frozenset(name for name, slots in self.slots.items() if name in running or any(slot.trained for slot in slots))

    def by_own_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict whose tensors may have the file's names and shapes there, under the names of this module."""
        own = {name: value for name, value in state.items() if name not in self.slots}
        shapes = {name: value.shape for name, value in [*self.named_parameters(), *self.named_buffers()]}
        for name, slots in self.slots.items():
            for slot in slots if name in state else ():
                if slot.joined:
                    continue  # the last layer is two of the file's: the net's own stays
                value = state[name]
                fits = value.numel() == shapes[slot.target].numel() if slot.target in shapes else False
                for view in slot.views if fits else ():
                    value = view(value)
                own[slot.target] = value
        return own


def open_onnx(
    path: Path, size: tuple[int, int] | None = None, *, output: str | None = None, resized: bool = False
) -> OnnxNet:
    """The net of a classifier's file, in eval mode; see `fgvc.models.onnxnet.read.read_graph`.

    `resized`: images of `size` are to go through it, also where the file takes another one alone: as the graph is at its own
    size, paddings and all. Raises FgvcError where the last map does not grow and shrink with the images.
    """
    net = OnnxNet(read_graph(path, load_model(path), size, output=output, resized=resized)).eval()
    if resized and size is not None and tuple(size) != net.size:
        _refuse_one_size(net, path, size)
    return net


def _refuse_one_size(net: OnnxNet, path: Path, size: tuple[int, int]) -> None:
    try:
        with torch.no_grad():
            own, other = (net.forward_features(torch.zeros(1, 3, *sides)) for sides in (net.size, size))
            net.forward_head(other)
        fits = own.dim() == 4 and all(
            abs(side - cells * pixels / own_pixels) <= 1
            for side, cells, pixels, own_pixels in zip(other.shape[2:], own.shape[2:], size, net.size, strict=True)
        )
    except (RuntimeError, ValueError, IndexError, TypeError):
        fits = False
    if not fits:
        raise FgvcError(
            f"{path}: its graph is made for images of {net.size[0]} x {net.size[1]} pixels: none of {size[0]} x {size[1]} can go "
            "through"
        )


def _feature_info(stages: Iterable[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [
        {"num_chs": channels, "reduction": reduction, "module": f"body.{name}"} for name, channels, reduction in stages
    ]


def _value(graph: Graph, slot: Slot) -> Any:
    return operator.attrgetter(slot.target)(graph.builder.root)


# --- where the graph is cut --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Parts:
    """The graph of a file, divided at its features and its classifier."""
    features: fx.Node
    body: fx.Graph
    pool: fx.Graph
    classifier: str
    tail: fx.Graph | None
    stages: dict[str, Stage]


def _parts(graph: Graph) -> Parts:
    whole = graph.builder.graph
    whole.output(graph.output.node)
    whole.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    logits = graph.builder.values[graph.file.logits]
    assert isinstance(logits, Live)
    last = join_heads(graph.builder, logits.node) or logits.node
    nodes = [node for node in whole.nodes if node.op not in ("get_attr", "output")]
    shapes = {value.node: value.shape for value in graph.builder.values.values() if isinstance(value, Live)}
    cuts = _cuts(nodes)
    classifier = _classifier(graph, nodes, cuts)
    before = [node for node in nodes[: nodes.index(classifier)] if node in cuts and node in shapes]
    features = _features(graph, before, shapes)
    stages = _stages(graph, before[: before.index(features) + 1], shapes)
    body = _between(whole, None, features, stages)
    pool = _between(whole, features, classifier.args[0], {})  # type: ignore[arg-type]
    tail = None if last is classifier else _between(whole, classifier, last, {})
    return Parts(features, body, pool, str(classifier.target), tail, stages)


def _cuts(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that all of the output passes through: no value before one of them is read behind it."""
    place = {node: at for at, node in enumerate(nodes)}
    cuts, reach = set(), -1
    for at, node in enumerate(nodes):
        if _is_batch(node):
            continue
        last = max((place.get(user, len(nodes)) for user in node.users if not _is_batch(user)), default=at)
        if reach <= at:
            cuts.add(node)
        reach = max(reach, last)
    return cuts


def _is_batch(node: fx.Node) -> bool:
    """Whether a node is the number of images, or a multiple of it."""
    if node.op == "call_method" and node.target == "size":
        return True
    return node.op == "call_function" and node.target is operator.mul and all(
        not isinstance(arg, fx.Node) or _is_batch(arg) for arg in node.args
    )  # fmt: skip


def _classifier(graph: Graph, nodes: list[fx.Node], cuts: set[fx.Node]) -> fx.Node:
    """The last linear layer: all of the output comes through it, and it has an output a class."""
    for node in reversed(nodes):
        if node.op == "call_module":
            module = graph.builder.root.get_submodule(str(node.target))
            if isinstance(module, nn.Linear) and module.out_features == graph.classes and node in cuts:
                return node
            break
    raise FgvcError(
        f"{graph.path}: its output {graph.file.output!r} does not come from one linear layer of {graph.classes} classes: not a "
        "classifier that can be trained here"
    )


def _features(graph: Graph, cuts: list[fx.Node], shapes: Mapping[fx.Node, torch.Size]) -> fx.Node:
    """The last of the cuts before the classifier that has places: a map, or else tokens."""
    maps = [node for node in cuts if _cells(shapes[node]) > 1]
    if not maps:
        raise FgvcError(f"{graph.path}: no map of features is left before its classifier")
    moved = len(maps) > 1 and maps[-1].target is torch.permute and maps[-1].args[0] is maps[-2]
    return maps[-2] if moved and not _channels_last(shapes[maps[-2]]) else maps[-1]


def _cells(shape: torch.Size) -> int:
    """Places of a map (B,C,h,w) or (B,h,w,C), or of tokens (B,N,C)."""
    if len(shape) == 4:
        return int(shape[1] * shape[2] if _channels_last(shape) else shape[2] * shape[3])
    return int(shape[1]) if len(shape) == 3 else 0


def _channels_last(shape: torch.Size) -> bool:
    return shape[1] == shape[2] and shape[3] > shape[2] and shape[1] != shape[3]


def _stages(graph: Graph, cuts: list[fx.Node], shapes: Mapping[fx.Node, torch.Size]) -> dict[str, Stage]:
    """The last cut of each resolution, from fine to coarse; the name is that of an Identity behind it. `cuts` ends with the
    features. Where a depthwise convolution leaves the resolution, what widens the map for it belongs to the next stage."""
    root = graph.builder.root
    ends: dict[int, Stage] = {}
    for node in cuts:
        shape = shapes[node]
        if len(shape) != 4 or node.op == "placeholder" or node.target in (F.pad, torch.permute):
            continue
        height, width, channels = shape[1:] if _channels_last(shape) else (*shape[2:], shape[1])
        rows, columns = graph.size[0] / height, graph.size[1] / width
        reduction = round(rows)
        if reduction > 1 and 2 / 3 < rows / columns < 3 / 2:  # else heads of attention: of another shape than the image's
            node.meta["map"] = (int(channels), reduction)
            ends[reduction] = Stage(node, int(channels), reduction)
    for reduction, stage in ends.items():
        if stage.node is not cuts[-1] and any(_is_depthwise(user, root) for user in _readers(stage.node)):
            narrow = _before_widening(stage.node, root)
            if narrow in cuts and shapes[narrow][2:] == shapes[stage.node][2:]:
                ends[reduction] = Stage(narrow, int(shapes[narrow][1]), reduction)
    ordered = sorted(ends.values(), key=lambda stage: stage.reduction)
    return {f"{STAGE}{number}": stage for number, stage in enumerate(ordered)}


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read a value, as it is or padded."""
    return [reader for user in node.users for reader in (_readers(user) if user.target is F.pad else [user])]


def _is_depthwise(node: fx.Node, root: nn.Module) -> bool:
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _before_widening(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The input of the 1 x 1 convolution that a value is from, through a norm and an activation; None: it is from none."""
    for _ in range(4):
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        inputs = node.all_input_nodes
        if len(inputs) != 1:
            return None
        if isinstance(module, nn.Conv2d):
            return inputs[0] if set(module.kernel_size) == {1} else None
        node = inputs[0]
    return None


def _between(whole: fx.Graph, start: fx.Node | None, end: fx.Node, stages: Mapping[str, Stage]) -> fx.Graph:
    """The nodes from behind `start` to `end` as a graph of one input, with an Identity behind the end of each stage."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    entry = graph.placeholder("x")
    needed = _ancestors(end, start)
    ends = {stage.node: name for name, stage in stages.items()}
    if start is not None:
        copies[start] = entry
    for node in whole.nodes:
        if node.op == "placeholder" and start is None:
            copies[node] = entry
        elif node in needed and node is not start:
            if _is_batch(node) and node.op == "call_method":
                copies[node] = graph.call_method("size", (entry, 0))
            else:
                copies[node] = graph.node_copy(node, lambda old: copies[old])
            if node in ends:
                copies[node] = graph.call_module(ends[node], (copies[node],))
    graph.output(copies[end])
    return graph


def _ancestors(end: fx.Node, start: fx.Node | None) -> set[fx.Node]:
    """Nodes that `end` is computed from, itself among them, up to `start`."""
    nodes: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in nodes or node is start:
            continue
        nodes.add(node)
        if not (_is_batch(node) and node.op == "call_method"):
            stack.extend(node.all_input_nodes)
    return nodes


def _depths(net: OnnxNet, parts: Parts) -> dict[str, int]:
    """Module name -> number of the layers with weights before it, of those on its way."""
    depths: dict[str, int] = {}
    ranks: dict[fx.Node, int] = {}
    for node in parts.body.nodes:
        before = max((ranks.get(parent, 0) for parent in node.all_input_nodes), default=0)
        module = net.body.get_submodule(str(node.target)) if node.op == "call_module" else None
        heavy = isinstance(module, nn.Linear) or (module is not None and type(module).__name__.startswith("Conv"))
        ranks[node] = before + heavy
        if node.op == "call_module":
            depths[f"body.{node.target}"] = ranks[node]
        elif node.op == "get_attr":
            depths[f"body.{node.target}"] = before
    return depths
