"""Quantisation of a bundle's proven float graph to int8 and fp16, by onnxruntime's own tools.

What is quantised depends on the operators alone, never on weights or images: so the plain backbone's graph, quantised in
the same way, must come out the same (variant.py checks it).
"""

from __future__ import annotations

import copy
import io
import logging
import platform
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper as onnx_numpy
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from fgvc.errors import FgvcError
from fgvc.exporting.fused import unfused
from fgvc.runtime.description import describe
from fgvc.runtime.engine import feed

IMAGES = 200  # to calibrate with
FIRST = 6  # layers that stay in float: the first lose most and cost little (docs/measurements.md)
BATCH = 16
LARGEST = 127  # of a signed 8-bit weight; -128 is not used, so that zero is in the middle
REDUCED = 64
SMALLEST_SCALE = 0.6  # of a channel's weights, over the scale that clips none
SCALES = 100  # tried for each channel
# Operators that are cheap in int8 or pass it on. Softmax, norms and GELU of a ViT stay in float: eight bits are too few for them.
OPERATORS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Mul",
    "Relu", "Reshape", "Squeeze", "Transpose",
)  # fmt: skip
WEIGHTED = ("Conv", "Gemm", "MatMul")
LOWEST_OPSET = 13  # where DequantizeLinear takes a scale for each channel
VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """Settings of the int8 file."""

    images: int = IMAGES  # of the train split, to calibrate with
    first: int = FIRST  # layers that stay in float
    reduce_range: bool | None = None  # weights of 7 bits; None: where this CPU would need it


def needs_reduced_range(*, cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> bool:
    """Whether 8-bit products overflow on this CPU: x86 without VNNI adds pairs of them in 16 bits.

    On x86 without /proc/cpuinfo, where that can't be read, they are assumed to.
    """
    if (machine or platform.machine()).lower() not in {"x86_64", "amd64", "i386", "i686"}:
        return False
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return True
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return VNNI.isdisjoint(flags)


def quantise(
    model: onnx.ModelProto, images: Iterable[np.ndarray], *, first: int = FIRST, reduce_range: bool = False
) -> onnx.ModelProto:
    """Quantise `model` to int8: QuantizeLinear and DequantizeLinear around what onnxruntime then runs in integers.

    Weights are signed and have a scale for each channel; activations are unsigned, in the mean range of the batches (B,3,H,W)
    float32 of `images`. The `first` layers with weights, and the last, stay in float. Layers in the middle can't: onnxruntime
    quantises a float convolution between two others itself, with one scale for all channels. Inputs and outputs are those
    of `model`. Raises FgvcError for what onnxruntime can't quantise.
    """
    model = unfused(model)
    if (opset := opset_of(model)) < LOWEST_OPSET:
        raise FgvcError(
            f"int8: the graph is of opset {opset}; a scale for each channel needs opset {LOWEST_OPSET} or newer"
        )
    layers = _layers(model)
    float_layers = {*layers[:first], *layers[-1:]}
    if float_layers.issuperset(layers):
        raise FgvcError(
            f"int8: the network has {len(layers)} layers, and the first {first} and the last stay in float; name fewer "
            "(--int8-float)"
        )
    ready = copy.deepcopy(model)
    scales = _scale_weights(ready, float_layers, REDUCED if reduce_range else LARGEST)
    add_pre_process_metadata(ready)  # the exporter has inferred the shapes and folded the constants
    with tempfile.TemporaryDirectory(prefix="fgvc-int8-") as folder, _quiet():
        out = Path(folder, "int8.onnx")
        try:
            quantize_static(
                ready,
                out,
                _Reader(model, images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=sorted(float_layers),
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"TensorQuantOverrides": scales, "CalibMovingAverage": True},
            )
        except Exception as error:  # onnxruntime raises what happens to fail
            raise FgvcError(f"onnxruntime can't quantise the graph: {type(error).__name__}: {error}") from error
        return _finished(onnx.load(out), model)


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators that a graph is written for."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert `model` to float16, its inputs and outputs in float32 as before. Raises FgvcError for what can't be converted."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = unfused(model)
    with _quiet():
        try:
            converted = convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)
        except Exception as error:
            raise FgvcError(f"the graph can't be converted to fp16: {type(error).__name__}: {error}") from error
    return _finished(converted, model)


def _finished(proto: onnx.ModelProto, model: onnx.ModelProto) -> onnx.ModelProto:
    """Sort the nodes as ONNX demands and remove traces of how the graph was made: equal input gives equal bytes."""
    ONNXModel(proto).topological_sort()
    del proto.metadata_props[:]
    del proto.graph.value_info[:]  # float16's are those of the float graph
    proto.graph.name, proto.producer_name, proto.producer_version = model.graph.name, "fgvc", ""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise FgvcError(f"the result is no valid graph: {error}") from error
    return proto


class _Reader(CalibrationDataReader):
    """Calibration batches as the graph takes them: in its layout and type, and of its size, the last one filled up with its own
    images."""

    def __init__(self, model: onnx.ModelProto, images: Iterable[np.ndarray]) -> None:
        self._file = describe(model.SerializeToString(), output=model.graph.output[0].name)  # whichever has the classes
        self._batches = self._pieces(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        piece = next(self._batches, None)
        return None if piece is None else {self._file.input: feed(piece, self._file)}

    def _pieces(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        size = self._file.batch or BATCH
        for batch in images:
            for start in range(0, len(batch), size):
                piece = np.ascontiguousarray(batch[start : start + size], dtype=np.float32)
                yield piece if self._file.batch is None else np.resize(piece, (size, *piece.shape[1:]))


def _layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes with weights, in the order of storage: each after those that it depends on."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type in WEIGHTED and not stored.isdisjoint(node.input)]


def _scale_weights(model: onnx.ModelProto, float_layers: Collection[str], largest: int) -> dict[str, list[dict[str, Any]]]:
    """Compute a scale for each output channel of each convolution that is to be quantised, for onnxruntime's
    TensorQuantOverrides, and clip the weights in `model` to its range.

    onnxruntime's own scale takes the largest weight to 127. Of SCALES values from there downwards, this takes the one with
    the smallest ||e||^2 + (sum of e)^2, e being the rounding error: the second term is what the channel's mean input makes of it,
    which after a ReLU is most of the input. A kernel of nine weights gains most.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.name in float_layers or node.input[1] not in stored:
            continue
        tensor = stored[node.input[1]]
        weights = onnx_numpy.to_array(tensor)
        flat = weights.reshape(len(weights), -1)
        scales = _best_scales(flat.astype(np.float64), largest)
        limit = largest * scales[:, None]
        tensor.CopyFrom(onnx_numpy.from_array(np.clip(flat, -limit, limit).reshape(weights.shape), tensor.name))
        common = {"axis": 0, "zero_point": np.int8(0), "quant_type": QuantType.QInt8}
        overrides[tensor.name] = [common | {"scale": scale} for scale in scales]
    return overrides


def _best_scales(weights: NDArray[np.float64], largest: int) -> NDArray[np.float32]:
    """Scale (C,) of each channel of weights (C,N) by the least cost (see `_scale_weights`)."""
    widest = np.abs(weights).max(1) / largest
    widest[widest == 0] = 1.0  # a dead channel
    best, least = widest, np.full(len(weights), np.inf)
    for share in np.linspace(1.0, SMALLEST_SCALE, SCALES):
        scale = (share * widest)[:, None]
        error = np.clip(np.round(weights / scale), -largest, largest) * scale - weights
        cost = (error**2).sum(1) + error.sum(1) ** 2
        better = cost < least
        best, least = np.where(better, scale[:, 0], best), np.where(better, cost, least)
    return best.astype(np.float32)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence both tools' warnings on the root logger, on stdout, and by numpy."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
