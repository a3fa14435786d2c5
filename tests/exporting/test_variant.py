"""What may differ between the int8 or fp16 files of two nets of one kind, and what may not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, numpy_helper

from fgvc.config.exporting import Exporter
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import Interface, export_onnx, serialised
from fgvc.exporting.quantize import Int8
from fgvc.exporting.reference import Plain, independent_plain, randomise
from fgvc.exporting.variant import VariantFile, differences, make_fp16, make_int8, structure
from fgvc.models.backbone import plain_model

SIZE = (32, 32)
IMAGES = np.random.default_rng(0).normal(size=(20, 3, *SIZE)).astype(np.float32)


@pytest.fixture(scope="module")
def both() -> tuple[Plain, Plain]:
    """A trained net's graph, and the independent plain one's."""
    exporter: Exporter = "torchscript"
    reference, weights = independent_plain(
        backbone="test_efficientnet", num_classes=5, kwargs={}, interface=Interface(size=SIZE), exporter=exporter
    )
    net = plain_model("test_efficientnet", 5)
    randomise(net, 7)
    proto = export_onnx(net.eval(), size=SIZE, exporter=exporter, opset=20)
    return Plain(proto, weights, SIZE), Plain(reference, weights, SIZE)


@pytest.fixture(scope="module")
def int8(both: tuple[Plain, Plain]) -> VariantFile:
    return make_int8(*both, [IMAGES[:12], IMAGES[12:]], Int8(first=2, reduce_range=False))


def test_the_contract_of_int8_and_fp16_counts_operators_and_bytes(both: tuple[Plain, Plain], int8: VariantFile) -> None:
    contract = int8.contract
    assert contract["images"] == 20
    assert contract["operators"]["Conv"] == sum(n.op_type == "Conv" for n in both[0].proto.graph.node) - 2
    assert contract["bytes"] == len(int8.model)
    assert contract["float_bytes"] == len(serialised(both[0].proto))
    half = make_fp16(*both)
    assert half.contract["bytes"] < 0.6 * half.contract["float_bytes"]
    assert half.contract["sha256"] != contract["sha256"]


def node_of(proto: ModelProto, op: str) -> NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op)


def leave_out(proto: ModelProto) -> None:
    """One activation is no longer quantised."""
    quantize = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"][3]
    back = next(node for node in proto.graph.node if node.input and node.input[0] == quantize.output[0])
    for node in proto.graph.node:
        for slot, name in enumerate(node.input):
            if name == back.output[0]:
                node.input[slot] = quantize.input[0]
    proto.graph.node.remove(quantize)
    proto.graph.node.remove(back)


def change(
    proto: ModelProto, pick: Callable[[str, np.ndarray], bool], what: Callable[[np.ndarray], np.ndarray]
) -> None:
    for tensor in proto.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if pick(tensor.name, value):
            tensor.CopyFrom(numpy_helper.from_array(what(value).astype(value.dtype), tensor.name))
            return
    raise AssertionError("nothing to change")


def other_axis(proto: ModelProto) -> None:
    attribute = next(a for node in proto.graph.node for a in node.attribute if a.name == "axis")
    attribute.i += 1


def asymmetric(proto: ModelProto) -> None:
    change(proto, lambda name, v: v.dtype == np.int8 and name.endswith("zero_point") and v.ndim == 1, lambda v: v + 1)


def another_type(proto: ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("_zero_point") and not t.dims)
    value = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(value, np.int8), tensor.name))


def one_scale_for_all(proto: ModelProto) -> None:
    change(proto, lambda name, v: name.endswith("weight_scale") and v.ndim == 1, lambda v: v.mean())


@pytest.mark.parametrize("change_one", [leave_out, other_axis, asymmetric, another_type, one_scale_for_all])
def test_a_changed_graph_differs(change_one: Callable[[ModelProto], None], both: tuple[Plain, Plain], int8: VariantFile) -> None:
    proto = onnx.load_from_string(int8.model)
    change_one(proto)
    assert differences("int8", proto, *both, int8.contract)
    assert structure(proto, both[0]).sha256 != int8.contract["sha256"]


def test_ranges_and_weights_may_differ(both: tuple[Plain, Plain], int8: VariantFile) -> None:
    proto = onnx.load_from_string(int8.model)
    change(proto, lambda name, v: name.endswith("weight_quantized"), lambda v: -v)
    change(proto, lambda name, v: name.endswith("weight_scale"), lambda v: 2 * v)
    change(proto, lambda name, v: name.endswith("_scale") and v.ndim == 0, lambda v: 3 * v)
    change(proto, lambda name, v: v.dtype == np.uint8 and v.ndim == 0, lambda v: np.asarray(7))
    change(proto, lambda name, v: v.dtype == np.float32 and v.ndim == 4, lambda v: -v)
    assert not differences("int8", proto, *both, int8.contract)
    assert structure(proto, both[0]).sha256 == int8.contract["sha256"]


def test_one_more_layer_in_float_is_refused(
    both: tuple[Plain, Plain], int8: VariantFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgvc.exporting import variant

    def careless(proto: ModelProto, images: Any, *, first: int, reduce_range: bool) -> ModelProto:
        more = 1 if proto is both[0].proto else 0
        return quantise(proto, images, first=first + more, reduce_range=reduce_range)

    quantise = variant.quantise
    monkeypatch.setattr(variant, "quantise", careless)
    with pytest.raises(FgvcError, match=r"model\.int8\.onnx is not what the plain model becomes"):
        make_int8(*both, [IMAGES[:2]], Int8(first=2, reduce_range=False))


def test_a_constant_of_the_fp16_graph_counts(both: tuple[Plain, Plain]) -> None:
    proto = onnx.load_from_string(make_fp16(*both).model)
    assert not differences("fp16", proto, *both, {})
    same = copy.deepcopy(proto)
    change(same, lambda name, v: v.dtype == np.float16 and v.ndim == 4, lambda v: -v)
    assert not differences("fp16", same, *both, {})
    node_of(proto, "Conv").attribute.pop()
    assert differences("fp16", proto, *both, {})
