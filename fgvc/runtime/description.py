"""What a classifier's ONNX file takes, does to pictures by itself, and gives: read from its graph. No torch, no onnx.

The one reading that training, evaluation, serving and export share, so that nothing is done twice: what the graph does at its
start is left out before it, and a softmax or sigmoid at its end is not applied again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fgvc.config.images import Ending, Layout, NetworkFile, Triple
from fgvc.errors import FgvcError
from fgvc.io.places import what_it_is
from fgvc.runtime.onnx_graph import KINDS, Node, OnnxGraph, Port, read_onnx_graph

DTYPES = ("float32", "float16", "float64", "uint8")
# What moves numbers alone.
PASSING = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Dropout")
ENDINGS: Mapping[str, Ending] = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}
LAYERS = ("Conv", "FusedConv", "ConvTranspose", "MaxPool", "AveragePool")  # have padding of their own
MODES = {"linear": "bilinear", "cubic": "bicubic"}  # of Resize
SIZES = ("Shape", "Size")  # read the shape of an image, and nothing else of it
LARGEST = 2**31  # bytes of a protobuf message
WHITE_ABOVE = 2.0  # a mean or std above this is of pixels up to 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A classifier's file from outside."""

    input: str
    layout: Layout
    dtype: str  # of the input, as numpy names it: one of DTYPES
    batch: int | None  # None: any; else the file takes so many images at once, no more and no less
    height: int | None  # pixels; None: any
    width: int | None
    in_graph: tuple[str, ...]  # what the graph does to the pixels before its first layer, in words, in order
    # What the graph subtracts by itself, and divides by then, in units and channel order of its input; None: nothing.
    mean: Triple | None
    std: Triple | None
    output: str  # whose numbers are the classes'
    gives: str  # type of that output
    others: tuple[str, ...]  # the file's other outputs
    classes: int | None  # None: the file does not declare them
    ending: Ending | None  # what the classes' numbers went through last; None: they are logits
    logits: str  # the value that the ending is taken of; the output itself where there is none

    @property
    def white(self) -> Literal[1, 255] | None:
        """The value of white that the input is to have, by what the graph does to it; None: it tells nothing."""
        if self.dtype == "uint8":
            return 255
        if self.mean is None or self.std is None:
            return None
        return 255 if max(*map(abs, self.mean), *map(abs, self.std)) > WHITE_ABOVE else 1

    @property
    def record(self) -> NetworkFile:
        """The description as a bundle's preprocess.json has it."""
        return NetworkFile(
            input=self.input, layout=self.layout, dtype=self.dtype, in_graph=self.in_graph, output=self.output, ending=self.ending
        )  # fmt: skip


def describe(
    model: Path | bytes, *, output: str | None = None, classes: int | None = None, where: Path | None = None
) -> Description:
    """Read a classifier's file. `output`: which of several has the classes; `classes`: how many these are, where it is known;
    `where`: the file that bytes are from, for messages.

    Raises FgvcError where it is no classifier of images, and where nothing tells which of its outputs has the classes.
    """
    named = str(where or ("the model" if isinstance(model, bytes) else model))
    if isinstance(model, Path):
        refuse_large(model)
    try:
        graph = read_onnx_graph(model if isinstance(model, bytes) else model.read_bytes())
    except FileNotFoundError as error:
        raise FgvcError(f"{named}: no such file") from error
    except (OSError, ValueError) as error:
        place = what_it_is(model) if isinstance(model, Path) else ""
        raise FgvcError(f"{named}: not an ONNX file, or cut short ({error}){place}") from error
    image = _image(named, graph)
    assert image.shape is not None
    constants = _Constants(graph)
    layout = _layout(named, graph, image)
    start = _start(graph, image.name, layout, constants)
    port = _output(named, graph, output, classes)
    ending, logits = _ending(graph, port.name)
    height, width = image.shape[2:] if layout == "NCHW" else image.shape[1:3]
    return Description(
        input=image.name, layout=layout, dtype=image.kind, batch=image.shape[0], height=height, width=width,
        in_graph=tuple(start.words), mean=start.mean, std=start.std, output=port.name, gives=port.kind,
        others=tuple(other.name for other in graph.outputs if other.name != port.name), classes=_count(port), ending=ending,
        logits=logits,
    )  # fmt: skip


def refuse_large(path: Path) -> None:
    """Raise FgvcError for a file that protobuf can't read, before it is in memory."""
    if path.is_file() and path.stat().st_size >= LARGEST:
        raise FgvcError(
            f"{path}: is of 2 GB or more, which no protobuf message can be, so that nothing reads it; save the model with its "
            "weights as external data (onnx.save_model(..., save_as_external_data=True))"
        )


def _image(where: str, graph: OnnxGraph) -> Port:
    if len(graph.inputs) != 1:
        names = ", ".join(port.name for port in graph.inputs) or "none"
        raise FgvcError(f"{where}: a classifier of images has one input, this has {len(graph.inputs)} ({names})")
    image = graph.inputs[0]
    if not image.kind:
        raise FgvcError(f"{where}: the input {image.name!r} is no tensor")
    if image.shape is None or len(image.shape) != 4:
        axes = "undeclared axes" if image.shape is None else f"{len(image.shape)} axes"
        raise FgvcError(
            f"{where}: the input {image.name!r} has {axes}; images have four (batch, channels, height, width, or channels last)"
        )
    if image.kind not in DTYPES:
        raise FgvcError(
            f"{where}: the input {image.name!r} is of {image.kind}; images are of {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
        )
    return image


def _layout(where: str, graph: OnnxGraph, image: Port) -> Layout:
    """Layout of the input: by the axis of three; where the file declares both or neither so, by a Transpose before the first
    layer, which in ONNX takes channels first."""
    assert image.shape is not None
    second, last = (image.shape[axis] in (3, None) for axis in (1, 3))
    if not second and not last:
        raise FgvcError(f"{where}: the input {image.name!r} is {list(image.shape)}: no axis of three channels")
    if (image.shape[1] == 3) != (image.shape[3] == 3):
        return "NCHW" if image.shape[1] == 3 else "NHWC"
    if second != last:
        return "NCHW" if second else "NHWC"
    value = image.name
    while (node := _only_reader(graph, value)) is not None and node.op not in LAYERS:
        if node.op == "Transpose":
            return "NHWC" if list(node.attributes.get("perm", ())) == [0, 3, 1, 2] else "NCHW"
        value = node.outputs[0]
    return "NCHW"


def _only_reader(graph: OnnxGraph, value: str) -> Node | None:
    """The node that reads a value, readers of its shape apart; None where there are several, or none."""
    readers = [node for node in graph.nodes if value in node.inputs and node.op not in SIZES]
    return readers[0] if len(readers) == 1 else None


class _Constants:
    """Numbers of the graph that no image reaches."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.nodes for name in node.outputs}

    def values(self, name: str) -> NDArray[Any] | None:
        """All numbers of a constant as a flat array, through operators that only move numbers; None where it is none, or
        large."""
        for _ in range(20):
            if name in self._graph.constants:
                return self._graph.constants[name].reshape(-1)
            node = self._makers.get(name)
            if node is None:
                return None
            if node.op == "Constant":
                value = next(iter(node.attributes.values()), None)
                return None if value is None or isinstance(value, str) else np.asarray(value).reshape(-1)
            if node.op not in PASSING and node.op != "Expand":
                return None
            name = node.inputs[0]
        return None


class _Start:
    """Preprocessing at the start of the graph, before its first layer: the affine function scale * pixel + shift, by channel, in
    the order of the input's channels."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.scale, self.shift = np.ones(3), np.zeros(3)
        self.swapped = False

    def multiply(self, by: NDArray[Any]) -> None:
        ordered = self._ordered(by)
        self.scale, self.shift = self.scale * ordered, self.shift * ordered

    def add(self, value: NDArray[Any]) -> None:
        self.shift = self.shift + self._ordered(value)

    def _ordered(self, values: NDArray[Any]) -> NDArray[Any]:
        spread = np.broadcast_to(values.astype(np.float64), (3,))
        return spread[::-1] if self.swapped else spread

    @property
    def _normalises(self) -> bool:
        return bool((self.scale != 1).any() or self.shift.any()) and bool(self.scale.all())

    @property
    def mean(self) -> Triple | None:
        return _triple(-self.shift / self.scale) if self._normalises else None

    @property
    def std(self) -> Triple | None:
        return _triple(1 / self.scale) if self._normalises else None


def _triple(values: NDArray[Any]) -> Triple:
    a, b, c = (float(f"{value:.7g}") + 0.0 for value in values)  # to what a float32 holds, and no -0
    return a, b, c


def _start(graph: OnnxGraph, value: str, layout: Layout, constants: _Constants) -> _Start:
    start, axis = _Start(), 1 if layout == "NCHW" else 3
    while (node := _only_reader(graph, value)) is not None:
        words, axis = _step(graph, node, value, axis, constants, start)
        if words is None:
            break
        start.words += [words] if words else []
        value = node.outputs[0]
    return start


def _step(
    graph: OnnxGraph, node: Node, value: str, axis: int, constants: _Constants, start: _Start
) -> tuple[str | None, int]:
    """Read one node of the graph's start. Returns its description ("": nothing that a caller needs to know; None: the start is
    over), and the axis of channels behind it."""
    attributes, others = node.attributes, [name for name in node.inputs if name and name != value]
    if node.domain:
        return None, axis
    if node.op in ("Identity", "Dropout"):
        return "", axis
    if node.op == "Cast":
        return f"cast to {KINDS.get(attributes.get('to', 1), 'another type')}", axis
    if node.op == "Transpose":
        order = list(attributes.get("perm", ()))
        if order not in ([0, 3, 1, 2], [0, 2, 3, 1]):
            return None, axis
        return "channels first" if order == [0, 3, 1, 2] else "channels last", order.index(axis)
    if node.op in ("Add", "Sub", "Mul", "Div") and len(others) == 1:
        return _arithmetic(node, value, constants.values(others[0]), start), axis
    if node.op in ("Resize", "Upsample"):
        return _resize(node, axis, constants), axis
    if node.op == "Clip":
        bounds = [constants.values(name) for name in node.inputs[1:] if name]
        bounds += [np.array(attributes[name]) for name in ("min", "max") if name in attributes]
        if any(bound is None for bound in bounds):
            return None, axis
        return f"clip to {' to '.join(_numbers(bound) for bound in bounds if bound is not None)}", axis
    if node.op == "Pad":  # right before a layer it is that layer's padding
        after = _only_reader(graph, node.outputs[0])
        return (None if after is None or after.op in LAYERS else "pad"), axis
    if node.op in ("Gather", "Slice") and _swaps(node, axis, constants):
        start.swapped = not start.swapped
        return "channels in the opposite order", axis
    return None, axis


def _arithmetic(node: Node, value: str, numbers: NDArray[Any] | None, start: _Start) -> str | None:
    if numbers is None or numbers.size not in (1, 3) or not np.isfinite(numbers.astype(np.float64)).all():
        return None
    numbers, first = numbers.astype(np.float64), node.inputs[0] == value
    if node.op == "Div" and (not first or not numbers.all()):
        return None
    if node.op in ("Mul", "Div"):
        start.multiply(numbers if node.op == "Mul" else 1 / numbers)
        return f"{'multiply' if node.op == 'Mul' else 'divide'} by {_numbers(numbers)}"
    if node.op == "Sub" and not first:
        start.multiply(np.array([-1.0]))
        start.add(numbers)
        return f"subtract from {_numbers(numbers)}"
    start.add(numbers if node.op == "Add" else -numbers)
    return f"{'add' if node.op == 'Add' else 'subtract'} {_numbers(numbers)}"


def _numbers(values: NDArray[Any]) -> str:
    """Numbers as they were written, to what a float32 holds; one that stands for all once."""
    texts = [f"{float(number):.7g}" for number in values.reshape(-1)]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _resize(node: Node, axis: int, constants: _Constants) -> str | None:
    mode = node.attributes.get("mode", "nearest")
    by = f"resize ({MODES.get(mode, mode)})"
    places = [0, 0] if axis == 1 else [0, -1]  # height and width, from the end of the four
    rows = slice(2, 4) if places == [0, 0] else slice(1, 3)
    sizes = constants.values(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
    if sizes is None:
        return by
    if "axes" in node.attributes:
        return f"{by} to {' x '.join(str(int(size)) for size in sizes)}"
    return f"{by} to {' x '.join(str(int(size)) for size in sizes[rows])}"


def _swaps(node: Node, axis: int, constants: _Constants) -> bool:
    """Whether a node turns the order of the channels round, RGB to BGR or back."""
    if node.op == "Gather":
        index = constants.values(node.inputs[1])
        own = node.attributes.get("axis", 0) % 4 == axis
        return own and index is not None and [int(at) % 3 for at in index] == [2, 1, 0]
    axes, steps = (constants.values(name) if name else None for name in (*node.inputs[3:5], "", "")[:2])
    return (
        axes is not None and steps is not None and [int(each) % 4 for each in axes] == [axis]
        and [int(step) for step in steps] == [-1]
    )  # fmt: skip


def _output(where: str, graph: OnnxGraph, name_given: str | None, classes: int | None) -> Port:
    """The output with the classes: the named one, the only one, or else the only one that may be (batch, classes)."""
    names = [port.name for port in graph.outputs]
    if name_given is not None:
        if name_given not in names:
            raise FgvcError(f"{where}: has no output {name_given!r}; it has {', '.join(names)}")
        return graph.outputs[names.index(name_given)]
    if not graph.outputs:
        raise FgvcError(f"{where}: has no output")
    if len(names) == 1:
        return graph.outputs[0]
    likely = [port for port in graph.outputs if _may_be_classes(port, classes)]
    if all(port.shape is not None for port in likely):  # class maps of one cell are of the same sizes, but for axes of one
        likely = [port for port in likely if port.shape is not None and len(port.shape) == 2] or likely
    if len(likely) == 1:
        return likely[0]
    raise FgvcError(
        f"{where}: has {len(names)} outputs ({', '.join(names)}); say which are the classes: model.output, or network.output in "
        "preprocess.json"
    )


def _may_be_classes(port: Port, classes: int | None) -> bool:
    """Whether an output may be (batch, classes), as far as the file declares it."""
    axes = [size for size in (port.shape or (None, classes))[1:] if size != 1]
    return port.kind.startswith("float") and len(axes) == 1 and classes in (None, axes[0] or classes)


def _count(port: Port) -> int | None:
    """The number of classes, where an output is declared as (batch, classes), maybe with axes of one."""
    sizes = [size for size in (port.shape or (None, None))[1:] if size != 1]
    return sizes[0] if len(sizes) == 1 else None


def _ending(graph: OnnxGraph, output: str) -> tuple[Ending | None, str]:
    makers = {name: node for node in graph.nodes for name in node.outputs}
    for node in _back(makers, output):
        if node.op in ENDINGS and not node.domain and node.attributes.get("axis", 1) != 0:
            return ENDINGS[node.op], node.inputs[0]
        if node.op == "Log":
            softmax = next(_back(makers, node.inputs[0]), None)
            if softmax is not None and softmax.op == "Softmax":
                return "log_softmax", softmax.inputs[0]
    return None, output


def _back(makers: Mapping[str, Node], value: str) -> Iterator[Node]:
    """The first node before a value that does more than to move numbers; nothing where there is none."""
    while (node := makers.get(value)) is not None:
        if node.op not in PASSING:
            yield node
            return
        value = node.inputs[0]
