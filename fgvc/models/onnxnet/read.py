"""Reading a classifier's ONNX file: the model, its data, and its graph as torch has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import torch

from fgvc.errors import FgvcError
from fgvc.io.places import what_it_is
from fgvc.models.onnxnet import elementwise, layers, pooling, shapes  # noqa: F401 - they register their converters
from fgvc.models.onnxnet.convert import Builder, Refused, refusal
from fgvc.models.onnxnet.payload import external_file, read_tensor, stored_tensors
from fgvc.models.onnxnet.registry import CONVERTERS, attributes_of
from fgvc.models.onnxnet.values import Array, Known, Live, Slot, Stored, Value
from fgvc.runtime.description import Description, describe, refuse_large

INT8 = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "QLinearAdd", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearMul", "QLinearSigmoid", "QGemm", "QLinearConcat",
    "QLinearLeakyRelu", "QLinearSoftmax",
}  # fmt: skip


@dataclass(slots=True)
class Graph:
    """A file's graph, converted to torch."""

    path: Path
    builder: Builder
    output: Live
    file: Description
    size: tuple[int, int]
    classes: int
    slots: dict[str, list[Slot]]
    untouched: dict[str, str]  # floats that nothing trains: why


def load_model(path: Path) -> onnx.ModelProto:
    """The model without external data. Raises FgvcError where the file is none."""
    refuse_large(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise FgvcError(f"{path}: no such file") from error
    except Exception as error:  # protobuf has several of its own
        raise FgvcError(f"{path}: not an ONNX file, or cut short ({type(error).__name__}){what_it_is(path)}") from error
    if not model.graph.node:
        raise FgvcError(f"{path}: not an ONNX model: it has no nodes")
    for tensor in stored_tensors(model).values():
        external_file(tensor)
    return model


def read_graph(
    path: Path, model: onnx.ModelProto, size: tuple[int, int] | None = None, *, output: str | None = None, resized: bool = False
) -> Graph:
    """Convert a classifier's file, loaded by `load_model`. `size`: height and width, where the file leaves them open; that
    of images of which the net is to be asked beside (`resized`), where the file has its own; `output`: which of several.

    Raises FgvcError that says which input, output or node can't be taken, and why.
    """
    written = stored_tensors(model).keys()  # those in functions can't be told apart by name: nothing trains them
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
    tensors = stored_tensors(model)
    _refuse_int8(path, graph)
    file = describe(model.SerializeToString(), output=output, where=path)
    size, batch, name = _size(path, file, size, resized), file.batch, file.output
    # Held: protobuf makes a new object for a node that nothing holds, and they are told apart by id.
    nodes = list(graph.node)
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for read in node.input:
            consumers.setdefault(read, []).append(node)
    own = batch or 1
    builder = Builder(
        batches=(own, own + 1, own + 2), fixed=batch is not None, opsets=opsets, consumers=consumers,
        outputs=frozenset(value.name for value in graph.output), of_images=_of_images(nodes, file.input),
    )  # fmt: skip
    for stored, tensor in tensors.items():
        array = read_tensor(tensor, path.parent)
        builder.values[stored] = _value(stored, array, builder) if stored in written else Known((array,) * len(builder.batches))
    placeholder = builder.graph.placeholder("x")
    builder.input = placeholder
    shape = (3, *size)
    metas = tuple(torch.empty(batch, *shape, device="meta") for batch in builder.batches)
    x = Live(placeholder, metas)
    if file.layout == "NHWC":
        x = builder.call(torch.permute, x, (0, 2, 3, 1))
    builder.values[file.input] = x
    needed = _needed(nodes, name)
    for node in nodes:
        if id(node) in needed:
            _convert(path, builder, node)
    result = builder.values.get(name)
    if not isinstance(result, Live):
        raise FgvcError(f"{path}: the output {name!r} does not depend on the image")
    classes = _classes(path, name, result)
    return Graph(
        path=path, builder=builder, output=result, file=file, size=size, classes=classes, slots=builder.slots,
        untouched=builder.kept,
    )  # fmt: skip


def _convert(path: Path, builder: Builder, node: onnx.NodeProto) -> None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    builder.on_image = not builder.of_images.isdisjoint(node.input)
    try:
        inputs = [builder.values[name] if name else None for name in node.input]
        if (fused := builder.fused.get(id(node))) is not None:
            builder.values[node.output[0]] = builder.values[fused]
            return
        if node.op_type == "Constant" and domain == "":
            for name in node.output:
                if name not in builder.values:
                    builder.values[name] = builder.evaluate(node, [])[0]
            return
        converter = CONVERTERS.get((domain, node.op_type))
        if not any(isinstance(value, Live) for value in inputs) and _is_number(builder, node, inputs, domain):
            outputs: Sequence[Value] = builder.evaluate(node, inputs)
            for value in inputs:
                if isinstance(value, Stored):
                    builder.kept.setdefault(value.name, "part of a computed constant")
        elif converter is None:
            raise Refused("this operator is not known here; export the net with plain operators of ai.onnx, or ask for it")
        else:
            outputs = converter(builder, node, attributes_of(node), inputs)
    except Refused as error:
        raise refusal(str(path), node, str(error)) from error
    except KeyError as error:
        raise refusal(str(path), node, f"it reads {error}, which nothing gives") from error
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, StopIteration) as error:
        raise refusal(
            str(path), node, f"can't be read as a layer ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
        ) from error
    for name, value in zip(node.output, outputs, strict=False):
        if name:
            builder.values[name] = value


VIEWS = ("Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
MOVES = ("Expand", "Tile", "Gather", "Slice", "Concat", "Split")  # numbers stay what they are
BOUNDS = ("Resize", "Upsample", "Clip", "Pad")  # read numbers that are none of the image's
WEIGHTS = {  # the inputs that hold weights
    "Conv": (1, 2), "FusedConv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1),
    "BatchNormalization": (0, 1, 2, 3, 4), "InstanceNormalization": (0, 1, 2),
}  # fmt: skip


def _is_number(builder: Builder, node: onnx.NodeProto, inputs: Sequence[Value | None], domain: str) -> bool:
    """Whether a node that no image reaches is computed while the graph is read. Views of weights are not, and neither is what a
    layer's weights are computed by, such as a standardisation, nor what moves them to where they are read (a class token that is
    repeated for each image, a table of position biases): these train through it."""
    if node.op_type in ("Shape", "Size") or domain != "":
        return False
    stored = [value for value in inputs if isinstance(value, Stored)]
    if not stored:
        return True
    if node.op_type in VIEWS or node.op_type in WEIGHTS:
        return False
    return not _reaches_weights(builder, node) and not (node.op_type in MOVES and _reaches_images(builder, node))


def _reaches_images(builder: Builder, node: onnx.NodeProto) -> bool:
    """Whether what moves numbers, alone or before others that do, ends where they meet what is computed from the image."""
    readers = [reader for name in node.output for reader in builder.consumers.get(name, ())]
    return any(
        reader.op_type not in BOUNDS
        if builder.of_images.intersection(reader.input)
        else reader.op_type in (*MOVES, *VIEWS) and _reaches_images(builder, reader)
        for reader in readers
    )


def _reaches_weights(builder: Builder, node: onnx.NodeProto) -> bool:
    stack, visited = [node.output[0]], set()
    while stack:
        name = stack.pop()
        for reader in builder.consumers.get(name, ()):
            if any(name == reader.input[at] for at in WEIGHTS.get(reader.op_type, ()) if at < len(reader.input)):
                return True
            if id(reader) not in visited and not builder.of_images.intersection(reader.input):
                visited.add(id(reader))
                stack.extend(reader.output)
    return False


def _value(name: str, array: Array, builder: Builder) -> Value:
    """Floats are weights until something shows that they are none; all else is numbers."""
    if np.issubdtype(array.dtype, np.floating):
        layers = ("Conv", "Gemm", "BatchNormalization", "MatMul")  # may have a single channel
        if array.size > 1 or any(node.op_type in layers for node in builder.consumers.get(name, ())):
            return Stored(name, array)
        builder.kept.setdefault(name, "a single number")
    return Known((array,) * len(builder.batches))


def _of_images(nodes: Sequence[onnx.NodeProto], image: str) -> frozenset[str]:
    """The names of all values that are computed from the image."""
    names = {image}
    for node in nodes:
        if names.intersection(node.input):
            names.update(node.output)
    return frozenset(names)


def _needed(nodes: Sequence[onnx.NodeProto], output: str) -> set[int]:
    """The ids of nodes that the output depends on."""
    makers = {name: node for node in nodes for name in node.output if name}
    needed: set[int] = set()
    stack = [output]
    while stack:
        node = makers.get(stack.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            stack.extend(node.input)
    return needed


def _refuse_int8(path: Path, graph: onnx.GraphProto) -> None:
    if quantised := next((node for node in graph.node if node.op_type in INT8), None):
        raise FgvcError(
            f"{path}: node {quantised.name or quantised.output[0]!r} ({quantised.op_type}): an int8 file can't be trained; "
            "give the float file that it was made from, and quantise what comes out anew"
        )
    if any(node.domain == "com.microsoft.nchwc" for node in graph.node):
        raise FgvcError(
            f"{path}: onnxruntime has laid it out for one kind of processor (com.microsoft.nchwc): give the file that "
            "it was optimised from, or optimise it at level basic or extended"
        )


def _size(path: Path, file: Description, size: tuple[int, int] | None, resized: bool) -> tuple[int, int]:
    """Height and width to read the graph for."""
    if file.height is not None and file.width is not None:
        fixed = (file.height, file.width)
        if size is not None and tuple(size) != fixed and not resized:
            raise FgvcError(
                f"{path}: takes images of {fixed[0]} x {fixed[1]} pixels alone, not {size[0]} x {size[1]}: set image.size"
            )
        return fixed
    if size is None:
        raise FgvcError(
            f"{path}: leaves height and width open: give the size that it is used with (image.size, --size HEIGHTxWIDTH)"
        )
    return int(size[0]), int(size[1])


def _classes(path: Path, name: str, value: Live) -> int:
    shape = list(value.shape)
    dependent = value.metas[0].shape != value.metas[1].shape
    rest = math.prod(shape[1:])
    if not dependent or value.metas[1].shape[0] == shape[0] or max(shape[1:], default=0) != rest or rest < 2:
        raise FgvcError(
            f"{path}: the output {name!r} is {shape}: a classifier gives one number a class and image, (batch, classes)"
        )
    return rest
