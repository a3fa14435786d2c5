"""Registry of the converters of ONNX operators, and functions that they share.

A converter takes the builder, the node, its attributes and its inputs, and gives its outputs. Semantics are those of the
operators' specification (onnx.ai/onnx/operators) and of onnxruntime's contrib operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from fgvc.models.onnxnet.convert import Builder, Refused
from fgvc.models.onnxnet.values import Stored, Value

Attributes = Mapping[str, Any]
Inputs = Sequence[Value | None]
Converter = Callable[[Builder, onnx.NodeProto, Attributes, Inputs], list[Value]]
CONVERTERS: dict[tuple[str, str], Converter] = {}  # by domain ("" for ai.onnx) and operator
MICROSOFT = "com.microsoft"


def converts(*names: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Register the function as the converter of these operators."""

    def register(converter: Converter) -> Converter:
        for name in names:
            CONVERTERS[domain, name] = converter
        return converter

    return register


def first(values: Inputs) -> Value:
    """The first input. Raises Refused where it is left out."""
    value = values[0]
    if value is None:
        raise Refused("its input is missing")
    return value


def text(value: Any) -> str:
    """Text of an attribute."""
    return value.decode() if isinstance(value, bytes) else str(value)


def number(b: Builder, value: Value | None, attribute: float | None, default: float) -> float:
    """A single number, from an input or (before it was one) an attribute; never trained."""
    if value is None:
        return default if attribute is None else float(attribute)
    if isinstance(value, Stored):
        b.kept.setdefault(value.name, "a bound")
    return float(b.constant(value, "bound").reshape(-1)[0])


def numbers(b: Builder, a: Attributes, name: str, inputs: Inputs, at: int) -> list[int] | None:
    """Whole numbers, from an attribute (of older operators) or an input; None where neither is there."""
    if name in a:
        return list(a[name])
    value = inputs[at] if at < len(inputs) else None
    return None if value is None else b.ints(value, name)


def attributes_of(node: onnx.NodeProto) -> Attributes:
    """Values by name. A float is the shortest decimal of its 32 bits, which is what its writer had: 0.001, not 0.00100000005."""
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {
        name: float(str(np.float32(value))) if isinstance(value, float) else value for name, value in attributes.items()
    }
