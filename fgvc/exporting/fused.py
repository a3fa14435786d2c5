"""Convolutions that onnxruntime's optimiser fused with what follows, taken apart again: the tools for int8 and fp16 know none."""

from __future__ import annotations

import copy

import numpy as np
import onnx
from onnx import numpy_helper

from fgvc.errors import FgvcError

FUSED, DOMAIN = "FusedConv", "com.microsoft"
NUMBERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta")}  # of `activation_params`, by their own names
ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Clip", *NUMBERS)


def unfused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each FusedConv of a model by Conv, Add where it has a summand, and activation; returns `model` itself where there
    is none. Raises FgvcError for an activation that is not known."""
    if not any(_is_fused(node) for node in model.graph.node):
        return model
    model = copy.deepcopy(model)
    nodes = [part for node in model.graph.node for part in (_parts(node, model.graph) if _is_fused(node) else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _is_fused(node: onnx.NodeProto) -> bool:
    return node.op_type == FUSED and node.domain == DOMAIN


def _parts(node: onnx.NodeProto, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    kind, numbers = given.get("activation", b"").decode(), [float(x) for x in given.get("activation_params", ())]
    if kind not in ("", *ACTIVATIONS):
        raise FgvcError(f"{FUSED} {node.name}: its activation is {kind!r}, which is not known here")
    name, out = node.name or node.output[0], node.output[0]
    conv = onnx.NodeProto()
    conv.CopyFrom(node)
    conv.op_type, conv.domain, conv.name, conv.output[0] = "Conv", "", name, f"{out}/conv"
    del conv.attribute[:], conv.input[3:]
    conv.attribute.extend(attribute for attribute in node.attribute if not attribute.name.startswith("activation"))
    parts = [conv]
    if len(node.input) > 3 and node.input[3]:
        parts.append(onnx.helper.make_node("Add", [f"{out}/conv", node.input[3]], [f"{out}/sum"], f"{name}/sum"))
    if kind:
        bounds = ("min", "max") if kind == "Clip" else ()
        for side, number in zip(bounds, numbers if bounds else (), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array(number, np.float32), f"{out}/{side}"))
        inputs = [parts[-1].output[0], *(f"{out}/{side}" for side in bounds)]
        activation = onnx.helper.make_node(kind, inputs, [out], f"{name}/{kind.lower()}")
        own = zip(NUMBERS.get(kind, ()), numbers, strict=False)
        activation.attribute.extend(onnx.helper.make_attribute(key, number) for key, number in own)
        parts.append(activation)
    parts[-1].output[0] = out
    return parts
