"""onnxruntime's fused convolutions, taken apart, give onnxruntime's answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fgvc.errors import FgvcError
from fgvc.exporting.fused import unfused
from fgvc.exporting.onnx import export_onnx
from fgvc.exporting.quantize import halve, quantise
from fgvc.exporting.reference import randomise
from fgvc.models.backbone import plain_model

rng = np.random.default_rng(0)


def fused(kind: str, numbers: tuple[float, ...], *, summed: bool) -> onnx.ModelProto:
    """One fused convolution of onnxruntime's."""
    tensors = {
        "w": rng.normal(size=(4, 3, 3, 3)), "b": rng.normal(size=4), "z": rng.normal(size=(1, 4, 6, 6)),
    }  # fmt: skip
    inputs = ["x", "w", "b", "z"] if summed else ["x", "w", "b"]
    more = {"activation": kind} | ({"activation_params": list(numbers)} if numbers else {}) if kind else {}
    node = helper.make_node("FusedConv", inputs, ["y"], domain="com.microsoft", pads=[1, 1, 1, 1], **more)
    graph = helper.make_graph(
        [node], "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 6, 6])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def answers(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("", ()),
        ("Relu", ()),
        ("Sigmoid", ()),
        ("Tanh", ()),
        ("LeakyRelu", (0.3,)),
        ("Clip", (-0.5, 0.7)),
        ("HardSigmoid", (0.3, 0.4)),
    ],
)
def test_taken_apart_it_is_the_same_function(kind: str, numbers: tuple[float, ...], summed: bool) -> None:
    model = fused(kind, numbers, summed=summed)
    x = rng.normal(size=(1, 3, 6, 6)).astype(np.float32)
    apart = unfused(model)
    assert {node.domain for node in apart.graph.node} == {""}
    onnx.checker.check_model(apart, full_check=True)
    np.testing.assert_allclose(answers(apart, x), answers(model, x), rtol=1e-5, atol=1e-5)
    assert model.graph.node[0].op_type == "FusedConv", "left as it is"


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(FgvcError, match="its activation is 'Mystery'"):
        unfused(fused("Mystery", (), summed=False))


def test_an_optimised_file_is_quantised_as_the_file_before(tmp_path: Path) -> None:
    net = plain_model("test_resnet", 5)
    randomise(net, 3)
    plain = export_onnx(net.eval(), size=(32, 32), exporter="torchscript", opset=17, axes={0: "batch"}, batch=2)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(plain.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    assert sum(node.op_type == "FusedConv" for node in optimised.graph.node) > 3
    images = rng.normal(size=(24, 3, 32, 32)).astype(np.float32)
    truth = answers(plain, images)
    for convert, bar in ((lambda model: quantise(model, [images], first=2), 0.15), (halve, 0.01)):
        before, after = (answers(convert(model), images) for model in (plain, optimised))
        scale = np.abs(truth).max()
        assert np.abs(after - truth).max() < bar * scale
        assert np.abs(after - before).max() < bar * scale
