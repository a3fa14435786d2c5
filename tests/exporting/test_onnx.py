import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import nn

from fgvc.config.exporting import OPSETS, Export
from fgvc.errors import FgvcError
from fgvc.exporting.onnx import explain_model, export_onnx, interface_of, load_onnx, serialised
from fgvc.exporting.reference import randomise
from fgvc.models.backbone import deployed, plain_model
from fgvc.runtime.engine import OnnxSession

BOTH = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def trained(backbone: str = "test_efficientnet", **kwargs: object) -> nn.Module:
    net = plain_model(backbone, 5, kwargs)
    randomise(net, 3)
    return deployed(net)


@BOTH
def test_an_export_is_quiet_anonymous_and_its_bytes_depend_on_the_weights_alone(
    exporter: str, capfd: pytest.CaptureFixture[str]
) -> None:
    net = trained()
    proto = export_onnx(net, size=(32, 32), exporter=exporter, opset=20)
    assert capfd.readouterr() == ("", "")
    content = serialised(proto)
    assert serialised(export_onnx(net, size=(32, 32), exporter=exporter, opset=20)) == content
    for place in (sys.prefix, str(Path(torch.__file__).parent), str(Path.home()), "site-packages", ".py", "timm."):
        assert place.encode() not in content, place
    assert [e.version for e in proto.opset_import] == [20]
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, 32, 32]
    assert [port.name for port in (*proto.graph.input, *proto.graph.output)] == ["input", "logits"]
    with torch.no_grad():
        z = net(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(OnnxSession(content).logits(IMAGES), z, rtol=1e-4, atol=1e-4 * np.abs(z).max())
    randomise(net, 4)
    assert serialised(export_onnx(net, size=(32, 32), exporter=exporter, opset=20)) != content


def test_names_axes_and_ir_version_follow_the_request() -> None:
    request = {"size": (32, 48), "opset": 17, "input_name": "pixels", "output_names": ("score",), "axes": {}, "batch": 4}
    proto = export_onnx(trained(), exporter="torchscript", **request, ir_version=8)
    interface, classes, exporters = interface_of(proto, where="a file")
    assert {key: getattr(interface, key) for key in request} == request
    assert (interface.ir_version, classes, exporters) == (8, 5, ("torchscript",))


@BOTH
def test_the_exporter_is_recognised(exporter: str) -> None:
    proto = export_onnx(trained(), size=(32, 32), exporter=exporter, opset=18, axes={0: "n"})
    interface, _, exporters = interface_of(proto, where="a file")
    assert exporters[0] == exporter
    assert dict(interface.axes) == {0: "n"}


def test_a_net_that_torch_cannot_export_is_one_error_and_no_noise(capfd: pytest.CaptureFixture[str]) -> None:
    resampling = trained("test_vit")  # made for 160 pixels: resamples its position embedding in the graph
    with pytest.raises(FgvcError, match=r"exporter=torchscript, opset 20.*(?s:.*)\nset export.exporter=dynamo"):
        export_onnx(resampling, size=(64, 64), exporter="torchscript", opset=20)
    assert capfd.readouterr() == ("", "")


def test_what_can_not_be_asked_for() -> None:
    with pytest.raises(
        FgvcError, match=r"dynamo exporter writes opset 18 to 26; set export\.exporter=torchscript; .* --exporter"
    ):
        export_onnx(trained(), size=(32, 32), exporter="dynamo", opset=17)
    with pytest.raises(FgvcError, match=r"torchscript exporter writes opset 7 to 23; set export\.exporter=dynamo"):
        export_onnx(trained(), size=(32, 32), exporter="torchscript", opset=24)
    with pytest.raises(ValueError, match="eval"):
        export_onnx(trained().train(), size=(32, 32), exporter="dynamo", opset=20)
    with pytest.raises(ValidationError):
        Export(exporter="other")


SCRIPTED = [("torchscript", opset) for opset in range(11, 24)]
BY_DYNAMO = [pytest.param("dynamo", opset, marks=pytest.mark.slow) for opset in (18, 22, 26)]  # some 10 s each


@pytest.mark.parametrize(("exporter", "opset"), [*SCRIPTED, *BY_DYNAMO])
def test_every_opset_that_may_be_asked_for_has_both_files(exporter: str, opset: int) -> None:
    """Which operators there are depends on the opset: the maps are made by one that all have."""
    net = trained("test_resnet" if opset % 2 else "test_efficientnet")
    explain, _ = explain_model(net, size=(32, 32))
    assert explain is not None
    proto = export_onnx(net, size=(32, 32), exporter=exporter, opset=opset)
    beside = export_onnx(explain, size=(32, 32), exporter=exporter, opset=opset, output_names=("logits", "maps"))
    assert [each.opset_import[0].version for each in (proto, beside)] == [opset, opset]
    z = OnnxSession(serialised(proto)).logits(IMAGES)
    logits, maps = OnnxSession(serialised(beside)).run(IMAGES)
    np.testing.assert_allclose(logits, z, rtol=1e-4, atol=1e-4 * np.abs(z).max())
    whole = maps.mean((2, 3)) + explain.bias.numpy()
    np.testing.assert_allclose(whole, z, rtol=1e-3, atol=1e-3 * np.abs(z).max())


def test_every_opset_of_a_recipe_is_one_that_an_exporter_writes() -> None:
    limits = Export.model_json_schema()["properties"]["opset"]
    for opset in range(limits["minimum"], limits["maximum"] + 1):
        assert any(opset in known for known in OPSETS.values())


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet", "repvgg_a0"])
def test_maps_add_up_to_the_logits(backbone: str) -> None:
    net = trained(backbone)
    explain, _ = explain_model(net, size=(64, 64))
    assert explain is not None
    with torch.no_grad():
        x = torch.rand(2, 3, 64, 64)
        logits, maps = explain(x)
        assert torch.equal(logits, net(x))
        assert maps.ndim == 4
        assert maps.shape[1] == 5
        torch.testing.assert_close(maps.mean((2, 3)) + net.get_classifier().bias, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "kwargs", "reason"),
    [
        ("test_convnext", {}, "more than"),  # a norm after the pool
        ("mobilenetv3_small_050", {}, "reads 1024 values"),  # a convolution after the pool
        ("test_vit", {"img_size": 64}, "more than"),  # the class token
        ("test_resnet", {"global_pool": "max"}, "more than"),
        ("test_resnet", {"global_pool": "avgmax"}, "more than"),
    ],
)
def test_other_heads_have_no_closed_form(backbone: str, kwargs: dict, reason: str) -> None:
    explain, why = explain_model(trained(backbone, **kwargs), size=(64, 64))
    assert explain is None
    assert reason in why


def classifier(shape: list, outputs: int = 1, classes: int | None = 5, inputs: int = 1) -> onnx.ModelProto:
    ins = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, shape) for k in range(inputs)]
    outs = [helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, [shape[0], classes]) for k in range(outputs)]
    nodes = [helper.make_node("Flatten", ["x0"], [out.name]) for out in outs]
    graph = helper.make_graph(nodes, "g", ins, outs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])


def test_dynamic_axes_are_read_from_a_deployed_file() -> None:
    interface, _, exporters = interface_of(classifier([None, 3, "h", 4]), where="a file")
    assert dict(interface.axes) == {0: "batch", 2: "h"}
    assert interface.size == (0, 4)
    assert exporters == ("torchscript",)


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (classifier(["n", 3, 4, 4], outputs=2), "2 outputs"),
        (classifier(["n", 3, 4, 4], inputs=2), "2 inputs"),
        (classifier(["n", 1, 4, 4]), r"not float32 of shape \(B,3,H,W\)"),
        (classifier(["n", 3, 4, 4], classes=None), "with K fixed"),
    ],
)
def test_what_is_no_classifier_is_refused(proto: onnx.ModelProto, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        interface_of(proto, where="a file")


def test_files_that_are_no_onnx_or_keep_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(FgvcError, match="can't read"):
        load_onnx(path)
    for content in (b"", b"hello, this is text", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FgvcError, match="is not an ONNX file"):
            load_onnx(path)
    proto = classifier(["n", 3, 4, 4])
    tensor = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(FgvcError, match="keeps 'w' in another file"):
        load_onnx(path)
