"""The int8 and fp16 files beside model.onnx: each must be what the independent plain model becomes in the same way.

Both come from float graphs that are proven equal but for their weights, so what differs here was done by the quantisation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from fgvc.errors import FgvcError
from fgvc.exporting.canonical import canonicalise
from fgvc.exporting.difference import compare_graphs
from fgvc.exporting.onnx import serialised
from fgvc.exporting.quantize import Int8, halve, needs_reduced_range, quantise
from fgvc.exporting.reference import Plain
from fgvc.exporting.structure import Canonical
from fgvc.runtime.bundle import Variant

NOISE = 2  # images; ranges do not shape a graph
SIGNED = frozenset({"int8", "int32"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantFile:
    """A file beside model.onnx. `contract`: how it was made and what it is."""

    variant: Variant
    model: bytes = field(repr=False)
    contract: Mapping[str, Any]


def make_int8(exported: Plain, reference: Plain, images: Iterable[np.ndarray], settings: Int8) -> VariantFile:
    """Make the int8 file; `images`: batches (B,3,H,W) float32 of the train split, to calibrate with.

    Raises FgvcError where the graph is not what the plain model's becomes, with the differences.
    """
    reduce = needs_reduced_range() if settings.reduce_range is None else settings.reduce_range
    counted = _Counted(images)
    proto = quantise(exported.proto, counted, first=settings.first, reduce_range=reduce)
    how = {
        "calibration": "mean of the extremes", "images": counted.images, "float_layers": settings.first, "reduce_range": reduce,
        "activations": "uint8, per tensor", "weights": "int8, per channel",
    }  # fmt: skip
    return _checked("int8", proto, exported, reference, how)


def make_fp16(exported: Plain, reference: Plain) -> VariantFile:
    """Make the fp16 file. Raises FgvcError where the graph is not what the plain model's becomes, with the differences."""
    return _checked("fp16", halve(exported.proto), exported, reference, {})


def differences(
    variant: Variant, proto: onnx.ModelProto, exported: Plain, reference: Plain, how: Mapping[str, Any]
) -> list[str]:
    """Differences of `proto`, made from `exported`, from what `reference` becomes in the same way. `how`: as in the contract.

    The reference's ranges come from noise: which nodes are quantised does not depend on them.
    """
    if variant == "int8":
        noise = np.random.default_rng(0).normal(size=(NOISE, 3, *reference.size)).astype(np.float32)
        theirs = quantise(reference.proto, [noise], first=how["float_layers"], reduce_range=how["reduce_range"])
    else:
        theirs = halve(reference.proto)
    return [str(difference) for difference in compare_graphs(structure(proto, exported), structure(theirs, reference))]


def structure(proto: onnx.ModelProto, source: Plain) -> Canonical:
    """Canonical form of a variant of `source`, with the payloads blanked that training and calibration decide.

    Weights that stayed floating-point are recognised by the names that they have in `source`: both tools keep these, where
    positions shift. What a QuantizeLinear or DequantizeLinear reads is blanked by its role (see `_ranged`).
    """
    names = [initializer.stored_name for initializer in canonicalise(source.proto, weights=()).initializers]
    weights = {names[position] for position in source.weights}
    initializers = canonicalise(proto, weights=()).initializers
    form = canonicalise(proto, weights={k for k, w in enumerate(initializers) if w.stored_name in weights})
    ranged = _ranged(form)
    blanked = (
        replace(w, tensor=replace(w.tensor, digest=None)) if w.name in ranged else w
        for w in form.initializers
    )
    return replace(form, initializers=tuple(blanked))


def _ranged(form: Canonical) -> set[str]:
    """Initializers whose every reader takes them for a scale, an activation's zero point, or quantised weights.

    Not blanked are the zero points of signed tensors, which are weights and biases: 0, or else they are not symmetric, and
    integer kernels are slow or wrong. Types and shapes stay too: an uint8 in place of an int8, a scale for each channel in place
    of one; and attributes, the axis of the channels among them.
    """
    initializers = {w.name: w.tensor for w in form.initializers}
    roles: dict[str, set[bool]] = {}
    for node in form.graph.nodes:
        linear = node.op in ("QuantizeLinear", "DequantizeLinear")
        for slot, ref in enumerate(node.inputs):
            if ref in initializers:
                data = node.op == "DequantizeLinear" and slot == 0
                zero = linear and slot == 2 and initializers[ref].dtype not in SIGNED
                roles.setdefault(ref, set()).add(data or (linear and slot == 1) or zero)
    return {ref for ref, those in roles.items() if those == {True}}


def _checked(
    variant: Variant, proto: onnx.ModelProto, exported: Plain, reference: Plain, how: Mapping[str, Any]
) -> VariantFile:
    """File of `proto`. Raises FgvcError with the differences where it is not what `reference` becomes."""
    if faults := differences(variant, proto, exported, reference, how):
        raise FgvcError(f"model.{variant}.onnx is not what the plain model becomes:\n  " + "\n  ".join(faults))
    model = serialised(proto)
    contract = {
        **how,
        "sha256": structure(proto, exported).sha256,
        "bytes": len(model),
        "float_bytes": len(serialised(exported.proto)),
        "nodes": len(proto.graph.node),
        "operators": dict(sorted(_integer_operators(proto).items())) if variant == "int8" else {},
    }
    return VariantFile(variant=variant, model=model, contract=contract)


def _integer_operators(proto: onnx.ModelProto) -> Counter[str]:
    """Number of nodes of each operator that read from DequantizeLinear alone: these may run in integers."""
    ready = {name for node in proto.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    skipped = ("QuantizeLinear", "DequantizeLinear")
    nodes = [node for node in proto.graph.node if node.op_type not in skipped and node.input]
    return Counter(node.op_type for node in nodes if set(filter(None, node.input)) <= ready)


class _Counted:
    """Batches whose images are counted as they pass."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self.batches, self.images = batches, 0

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.images += len(batch)
            yield batch
