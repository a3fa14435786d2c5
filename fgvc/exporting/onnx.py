"""Export of a plain model to an ONNX graph whose bytes depend on nothing but the weights and the versions."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from torch import Tensor, nn

from fgvc.config.exporting import OPSETS, BatchNorm, Export, Exporter, another_exporter, refuse_opset
from fgvc.errors import FgvcError
from fgvc.models.backbone import feature_map
from fgvc.models.class_maps import closed_form

BATCH: Mapping[int, str] = {0: "batch"}  # the default: batch dynamic, height and width fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """Interface of a classifier's graph to a serving stack: the keyword arguments of `export_onnx` but the exporter."""

    size: tuple[int, int]  # height, width of the input
    opset: int = 20
    input_name: str = "input"
    output_names: tuple[str, ...] = ("logits",)
    axes: Mapping[int, str] = field(default_factory=lambda: dict(BATCH))
    batch: int = 2
    ir_version: int | None = None
    batch_norm: BatchNorm = "fold"

    @classmethod
    def of(cls, export: Export, size: tuple[int, int]) -> Interface:
        """The interface that a recipe's settings make, for images of this size."""
        return cls(size=size, opset=export.opset, batch_norm=export.batch_norm)


def export_onnx(
    model: nn.Module,
    *,
    size: tuple[int, int],
    exporter: Exporter,
    opset: int,
    input_name: str = "input",
    output_names: Sequence[str] = ("logits",),
    axes: Mapping[int, str] = BATCH,
    batch: int = 2,
    ir_version: int | None = None,
    batch_norm: BatchNorm = "fold",
) -> onnx.ModelProto:
    """Export `model` (in eval mode) to ONNX, quietly, without a trace of the machine.

    `axes` names the dynamic dimensions of the input (B,3,H,W); `batch` is B of the example, and stays where 0 is not
    in `axes`. `ir_version`: None for the exporter's own. `batch_norm`: whether batch norms behind convolutions are folded into
    them. Equal weights give equal bytes.
    Raises FgvcError where torch can't export the model.
    """
    if model.training:
        raise ValueError("export_onnx wants a model in eval mode")
    refuse_opset(exporter, opset)
    example = torch.zeros(batch, 3, *size, dtype=next(model.parameters()).dtype)
    names: dict[str, Any] = {"input_names": [input_name], "output_names": list(output_names), "opset_version": opset}
    try:
        with _quiet(), torch.no_grad():
            by = _by_dynamo if exporter == "dynamo" else _by_script
            proto = by(model, example, axes, names, keep_norms=batch_norm == "keep")
    except Exception as error:  # the exporters raise dozens of kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FgvcError(
            f"export.exporter={exporter}, opset {opset}: torch can't export {type(model).__name__} at "
            f"{size[0]}x{size[1]}: {reason}\n{another_exporter(exporter, opset)}"
        ) from error
    _anonymise(proto)
    proto.ir_version = ir_version or proto.ir_version
    onnx.checker.check_model(proto, full_check=True)
    return proto


def load_onnx(path: Path) -> onnx.ModelProto:
    """Load an ONNX file. Raises FgvcError where it is missing, not ONNX, or has its weights in other files."""
    try:
        proto = onnx.load_from_string(path.read_bytes())
    except OSError as error:
        raise FgvcError(f"{path}: can't read the ONNX file: {error.strerror}") from error
    except DecodeError as error:
        raise FgvcError(f"{path}: is not an ONNX file") from error
    if not proto.graph.output:
        raise FgvcError(f"{path}: is not an ONNX file (a graph without outputs)")
    for tensor in proto.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            raise FgvcError(f"{path}: keeps {tensor.name!r} in another file; save the model as one file")
    return proto


def interface_of(deployed: onnx.ModelProto, *, where: str) -> tuple[Interface, int, tuple[Exporter, ...]]:
    """Interface of a deployed classifier, its number of classes K, and the exporters to try, the likelier first.

    A height or width that is dynamic comes out as 0 in `size`. Raises FgvcError for what is no image classifier.
    """
    stored = {tensor.name for tensor in deployed.graph.initializer}
    inputs = [port for port in deployed.graph.input if port.name not in stored]
    outputs = list(deployed.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise FgvcError(
            f"{where}: {len(inputs)} inputs ({', '.join(p.name for p in inputs)}) and {len(outputs)} outputs "
            f"({', '.join(p.name for p in outputs)}); a classifier of fgvc has one of each"
        )
    kind, dims = inputs[0].type.tensor_type, list(inputs[0].type.tensor_type.shape.dim)
    if kind.elem_type != TensorProto.FLOAT or len(dims) != 4 or dims[1].dim_value != 3:
        raise FgvcError(f"{where}: input {inputs[0].name!r} is not float32 of shape (B,3,H,W)")
    classes = outputs[0].type.tensor_type.shape.dim
    if len(classes) != 2 or not classes[1].dim_value:
        raise FgvcError(f"{where}: output {outputs[0].name!r} is not of shape (B,K) with K fixed")
    opsets = [entry.version for entry in deployed.opset_import if entry.domain in ("", "ai.onnx")]
    if not opsets:
        raise FgvcError(f"{where}: names no opset of ONNX's own operators")
    fallback = {0: "batch", 2: "height", 3: "width"}
    axes = {
        k: dims[k].dim_param if dims[k].dim_param.isidentifier() else name
        for k, name in fallback.items()
        if not dims[k].HasField("dim_value")
    }
    interface = Interface(
        size=(dims[2].dim_value, dims[3].dim_value),
        opset=opsets[0],
        input_name=inputs[0].name,
        output_names=(outputs[0].name,),
        axes=axes,
        batch=dims[0].dim_value or 2,
        ir_version=deployed.ir_version,
    )
    return interface, classes[1].dim_value, _exporters(deployed, opsets[0])


def _exporters(deployed: onnx.ModelProto, opset: int) -> tuple[Exporter, ...]:
    """Exporters that may have made a file: dynamo names its nodes `node_...`, the older one `/module/Op`, other tools neither."""
    by_dynamo = sum(node.name.startswith("node_") for node in deployed.graph.node)
    by_script = sum(node.name.startswith("/") for node in deployed.graph.node)
    order: tuple[Exporter, ...] = ("dynamo", "torchscript") if by_dynamo >= by_script else ("torchscript", "dynamo")
    return tuple(exporter for exporter in order if opset in OPSETS[exporter])


def serialised(proto: onnx.ModelProto) -> bytes:
    """Bytes of the file; the same for equal protos, in any process."""
    return proto.SerializeToString(deterministic=True)


class ExplainNet(nn.Module):
    """Net that returns logits (B,K) and class activation maps (B,K,h,w): `maps.mean((2, 3)) + bias == logits`.

    It has the weights of the plain model, and is never the deployed file.
    """

    def __init__(self, plain: nn.Module, linear: nn.Linear, size: tuple[int, int]) -> None:
        """Wrap `plain`, whose classifier is `linear`; `size`: height and width of the images."""
        super().__init__()
        self.plain: Any = plain
        self.linear, self.size = linear, size

    @property
    def bias(self) -> Tensor | None:
        return None if self.linear.bias is None else self.linear.bias.detach()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.plain.forward_features(x)
        # As a convolution, which every opset has; an einsum needs 12.
        maps = nn.functional.conv2d(feature_map(self.plain, features, self.size), self.linear.weight[:, :, None, None])
        return self.plain.forward_head(features), maps


def explain_model(plain: nn.Module, *, size: tuple[int, int]) -> tuple[ExplainNet | None, str]:
    """Net that `explain.onnx` is exported from, or None where its class maps have no closed form; and the reason."""
    linear, reason = closed_form(plain, size)
    return (None if linear is None else ExplainNet(plain, linear, size).eval()), reason


def _by_dynamo(
    model: nn.Module, example: Tensor, axes: Mapping[int, str], names: dict[str, Any], *, keep_norms: bool
) -> onnx.ModelProto:
    shape = {dim: torch.export.Dim(name) for dim, name in axes.items()}
    options: dict[str, Any] = {"dynamo": True, "dynamic_shapes": (shape,), "verbose": False}
    program = torch.onnx.export(model, (example,), optimize=not keep_norms, **options, **names)
    assert program is not None
    if keep_norms:  # the optimizer folds no operator of a domain that it does not know
        norms = [node for node in program.model.graph if node.op_type == "BatchNormalization"]
        for node in norms:
            node.domain = "kept"
        program.optimize()
        for node in norms:
            node.domain = ""
    return program.model_proto


def _by_script(
    model: nn.Module, example: Tensor, axes: Mapping[int, str], names: dict[str, Any], *, keep_norms: bool
) -> onnx.ModelProto:
    mode = torch.onnx.TrainingMode.PRESERVE if keep_norms else torch.onnx.TrainingMode.EVAL  # of a net in eval mode
    dynamic = {name: {0: axes[0]} for name in names["output_names"] if 0 in axes}
    dynamic |= {names["input_names"][0]: dict(axes)}
    file = io.BytesIO()
    options: dict[str, Any] = {"f": file, "dynamo": False, "dynamic_axes": dynamic, "training": mode}
    torch.onnx.export(model, (example,), **options, **names)
    return onnx.load_from_string(file.getvalue())


def _anonymise(proto: onnx.ModelProto) -> None:
    """Drop what the exporters write about the machine (stack traces with paths) and the build (`+cu130`)."""
    proto.producer_name, proto.producer_version = "pytorch", torch.__version__.partition("+")[0]
    proto.graph.name = "main_graph"
    proto.doc_string = ""
    del proto.metadata_props[:]
    graphs = [proto.graph]
    while graphs:
        graph = graphs.pop()
        repeated = (graph.node, graph.initializer, graph.input, graph.output, graph.value_info)
        for item in (graph, *(item for items in repeated for item in items)):
            item.doc_string = ""
            del item.metadata_props[:]
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        graphs += [attribute.g for attribute in attributes if attribute.type == onnx.AttributeProto.GRAPH]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters: both warn and print, the older one from C++, where only file descriptors can be redirected."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        sink = stack.enter_context(tempfile.TemporaryFile())
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            duplicate = os.dup(number)
            stack.callback(os.close, duplicate)
            stack.callback(os.dup2, duplicate, number)
            os.dup2(sink.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
