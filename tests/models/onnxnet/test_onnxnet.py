"""Files of other programs as nets: their answers are onnxruntime's, every weight learns, and only payloads are written."""

from __future__ import annotations

import json
import operator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from fgvc.cli.app import main
from fgvc.errors import FgvcError
from fgvc.exporting.inspect import inspect_file
from fgvc.exporting.into import differences_outside, payload_spans, skeleton, write_into
from fgvc.models.onnxnet.net import OnnxNet, open_onnx
from fgvc.models.onnxnet.payload import stored_tensors
from tests.models.onnxnet import small

DEPLOYED = (
    "birds-tf_efficientnet_lite0-torch1.13-opset11", "keras-MobileNetV2-tf2onnx-opset13-nhwc",
    "timm-mobilenetv2_100-opset13-onnxsim", "timm-mobilenetv2_100-opset13-ort-extended",
    "timm-mobilenetv2_100-torch2.4-opset17-bn-kept", "timm-mobilenetv2_100-torch2.9-opset18-dynamo",
    "torchvision-mobilenet_v2-torch1.13-opset13",
)  # fmt: skip
KINDS = {"float32": np.float32, "float16": np.float16, "uint8": np.uint8}


@pytest.fixture(params=sorted(small.FILES))
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return small.saved(small.FILES[request.param](), tmp_path)


def pictures(net: OnnxNet, count: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if net.dtype == "uint8":
        return torch.randint(0, 256, (count, 3, *net.size), generator=generator).float()
    return torch.randn(count, 3, *net.size, generator=generator).half().float()


def by_onnxruntime(file: Path, net: OnnxNet, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = (x if net.layout == "NCHW" else x.permute(0, 2, 3, 1)).numpy().astype(KINDS[net.dtype])
    step = net.batch or len(x)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images[at : at + step]})[0] for at in range(0, len(x), step)]).astype(
        np.float64
    )


def agrees(file: Path, net: OnnxNet, tolerance: float = 1e-5) -> None:
    x = pictures(net)
    with torch.no_grad():
        probabilities = net.probabilities(net.eval()(x)).double().numpy()
    expected = by_onnxruntime(file, net, x).reshape(len(x), -1)
    assert np.abs(probabilities - expected).max() <= tolerance * np.abs(expected).max()


def learns(net: OnnxNet) -> set[str]:
    """The parameters that moved in two steps with frozen norms, each of which must get a gradient."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-30)  # in proportion to no gradient, however small
    x = pictures(net, 6, seed=1)
    for _ in range(2):
        loss = F.cross_entropy(net(x), torch.arange(6) % net.num_classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert moved == before.keys()
    return moved


def written(net: OnnxNet) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in net.stored()}


def test_answers_are_onnxruntimes(file: Path) -> None:
    net = open_onnx(file)
    agrees(file, net, 3e-3 if net.dtype == "float16" else 1e-5)
    x = pictures(net)
    torch.testing.assert_close(net(x), net.forward_head(net.forward_features(x)))
    pooled = net.forward_head(net.forward_features(x), pre_logits=True)
    assert pooled.shape == (3, net.num_features)
    if net.pool(net.forward_features(x)).dim() == 2:  # else it works in each place, with an activation and a mean behind it
        torch.testing.assert_close(net.get_classifier()(pooled), net(x))
    one = torch.cat([net(x[at : at + 1]) for at in range(3)])  # any batch, also where the file's own is fixed
    torch.testing.assert_close(one, net(x), rtol=1e-4, atol=1e-6)


def test_what_is_written_is_the_net_and_nothing_else_moves(file: Path, tmp_path: Path) -> None:
    net = open_onnx(file)
    untouched = write_into(file, written(net), tmp_path / "same" / "deployed.onnx")
    assert untouched.path.read_bytes() == file.read_bytes()
    assert untouched.moved == ()
    learns(net.train())
    copy = write_into(file, written(net), tmp_path / "new" / "deployed.onnx")
    assert copy.moved
    assert set(copy.moved) | set(copy.kept) == set(net.slots)
    assert differences_outside(copy.path, file) == []
    half = net.dtype == "float16"
    assert copy.reencoded is False or half
    if not copy.reencoded:
        assert skeleton(copy.path) == skeleton(file)
        old, new = file.read_bytes(), copy.path.read_bytes()
        inside = np.zeros(len(old), bool)
        for start, end in payload_spans(old).values():
            inside[start:end] = True
        differ = np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8)
        assert differ.any()
        assert not differ[~inside].any()
    agrees(copy.path, net, 3e-3 if half else 1e-5)
    again = open_onnx(copy.path)
    for (name, mine), (other, read) in zip(net.stored(), again.stored(), strict=True):
        assert name == other
        torch.testing.assert_close(mine, read, rtol=1e-3 if half else 0, atol=1e-6 if half else 0)


@pytest.mark.parametrize("name", DEPLOYED)
def test_files_of_other_programs(name: str, shared: Path, tmp_path: Path) -> None:
    file = shared / "deployed" / f"{name}.onnx"
    net = open_onnx(file)
    agrees(file, net)
    assert write_into(file, written(net), tmp_path / "same.onnx").path.read_bytes() == file.read_bytes()
    learns(net.train())
    copy = write_into(file, written(net), tmp_path / "new.onnx")
    assert differences_outside(copy.path, file) == []
    assert [info["reduction"] for info in net.feature_info] == [2, 4, 8, 16, 32]
    agrees(copy.path, net)


def test_external_data_are_copied_and_written(tmp_path: Path) -> None:
    file = small.saved(small.plain(), tmp_path / "a", external=True)
    net = open_onnx(file)
    agrees(file, net)
    with pytest.raises(FgvcError, match="choose another folder"):
        write_into(file, written(net), file.with_name("other.onnx"))
    learns(net)
    copy = write_into(file, written(net), tmp_path / "b" / "deployed.onnx")
    assert copy.files == ("deployed.onnx.data",)
    assert copy.path.read_bytes() == file.read_bytes(), "the model itself holds names and places alone"
    assert differences_outside(copy.path, file) == []
    agrees(copy.path, net)
    model = onnx.load(str(file), load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../a/deployed.onnx.data"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(FgvcError, match="a plain file beside the model"):
        open_onnx(file)


def test_a_tensor_that_is_read_twice_is_one_parameter(tmp_path: Path) -> None:
    net = open_onnx(small.saved(small.shared(), tmp_path))
    assert len(net.slots["mix"]) == 2
    first, second = (
        net.get_parameter(slot.target) if slot.target in dict(net.named_parameters()) else None for slot in net.slots["mix"]
    )
    assert first is not None
    assert second is None or second is first
    assert sum(value.numel() for value in net.parameters()) == sum(
        int(np.prod(tensor.dims)) for tensor in stored_tensors(small.shared()).values()
    )


def test_a_tensor_that_a_number_is_computed_from_too_is_left_as_it_is(tmp_path: Path) -> None:
    """The file computes the number anew: it would change with the weights, and the net's would not."""
    model = small.plain()
    model.graph.node.insert(0, helper.make_node("ReduceSum", ["stem.bias"], ["sum"]))
    model.graph.node.insert(2, helper.make_node("Add", ["a", "sum"], ["more"]))
    model.graph.node[3].input[0] = "more"
    file = small.saved(model, tmp_path / "a")
    net = open_onnx(file)
    agrees(file, net)
    assert net.untouched["stem.bias"] == "read in two ways"
    before = net.get_parameter(net.slots["stem.bias"][0].target).clone()
    optimizer = torch.optim.SGD([value for value in net.parameters() if value.requires_grad], lr=0.1)
    F.cross_entropy(net(pictures(net)), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    torch.testing.assert_close(net.get_parameter(net.slots["stem.bias"][0].target), before, rtol=0, atol=0)
    copy = write_into(file, written(net), tmp_path / "b" / "deployed.onnx")
    assert "stem.bias" in copy.kept
    agrees(copy.path, net)


def test_a_gate_of_the_value_itself_is_its_activation(tmp_path: Path) -> None:
    """torch's own, whose derivatives in float64 are exact: those of hardsigmoid are not."""
    net = open_onnx(small.saved(small.gated(), tmp_path)).double()
    called = [node.target for node in net.body.graph.nodes if node.op == "call_function"]
    assert called == [F.hardswish, F.silu, torch.sigmoid, operator.mul]
    x = pictures(net).double()
    net(x).sum().backward()
    a = net.body.get_submodule("stem")(x).detach().requires_grad_()
    c = a * ((a + 3).clamp(0, 6) / 6)
    gate = torch.sigmoid(c * torch.sigmoid(c))
    F.linear((a * gate).mean((2, 3)), net.classifier.weight.detach()).sum().backward()
    assert a.grad is not None
    expected = a.grad.sum((0, 2, 3))
    torch.testing.assert_close(net.get_parameter("body.stem.bias").grad, expected, rtol=1e-12, atol=0)


def test_heads_of_attention_are_no_stage(tmp_path: Path) -> None:
    net = open_onnx(small.saved(small.fixed_batch(), tmp_path))
    assert [stage["reduction"] for stage in net.feature_info] == [2]


def test_the_mean_of_two_heads_is_one_layer_of_both_features(tmp_path: Path) -> None:
    file = small.saved(small.two_heads(), tmp_path / "a")
    net = open_onnx(file)
    assert (net.ending, net.num_features) == ("softmax", 2 * small.WIDTH)
    pooled = net.forward_head(net.forward_features(pictures(net)), pre_logits=True)
    torch.testing.assert_close(F.linear(pooled, net.classifier.weight, net.classifier.bias), net(pictures(net)))
    assert net.untouched["other.bias"] == "of two biases that are added the other is trained"
    with torch.no_grad():  # a fitted head
        net.classifier.weight.copy_(torch.randn(net.classifier.weight.shape))
        net.classifier.bias.copy_(torch.randn(small.CLASSES))
    copy = write_into(file, written(net), tmp_path / "b" / "deployed.onnx")
    assert set(copy.moved) == {"head.weight", "head.bias", "other.weight"}
    agrees(copy.path, net)


def test_what_is_never_trained(tmp_path: Path) -> None:
    net = open_onnx(small.saved(small.bytes_in(), tmp_path))
    assert net.ending == "softmax"
    assert {net.untouched[name] for name in ("mean", "std")} == {"preprocessing: before the first layer"}
    standardised = open_onnx(small.saved(small.standardised_by_a_norm(), tmp_path / "c"))
    assert standardised.untouched == {"copy": "the output does not depend on it"}
    assert all(slot.trained for slots in standardised.slots.values() for slot in slots), "the first layer's kernel, too"
    assert open_onnx(small.saved(small.kept_norm(), tmp_path / "b")).untouched == {
        "norm.mean": "running statistics", "norm.var": "running statistics",
    }  # fmt: skip


def test_a_graph_that_differs_is_no_copy(tmp_path: Path) -> None:
    file = small.saved(small.plain(), tmp_path / "a")
    other = small.plain()
    other.graph.node[0].attribute[0].ints[0] = 0
    assert differences_outside(small.saved(other, tmp_path / "b"), file)
    smaller = small.plain()
    del smaller.graph.node[1]
    smaller.graph.node[1].input[0] = "a"
    assert differences_outside(small.saved(smaller, tmp_path / "c"), file)


def test_a_value_out_of_range_is_refused(tmp_path: Path) -> None:
    file = small.saved(small.half(), tmp_path / "a")
    values = written(open_onnx(file))
    values["stem.bias"][0] = 1e6
    with pytest.raises(FgvcError, match=r"'stem\.bias': a value is out of the range"):
        write_into(file, values, tmp_path / "b" / "deployed.onnx")
    assert not (tmp_path / "b").exists()


def two_inputs() -> onnx.ModelProto:
    model = small.plain()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ("n", 1)))
    return model


def text() -> onnx.ModelProto:
    return small.plain(shape=("n", 128))


def boxes() -> onnx.ModelProto:
    model = small.plain()
    model.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, None))
    return model


def custom() -> onnx.ModelProto:
    model = small.plain(domains=("my.own",))
    model.graph.node[1].op_type, model.graph.node[1].domain, model.graph.node[1].name = "Sharpen", "my.own", "sharpen_1"
    return model


def quantised() -> onnx.ModelProto:
    model = small.plain()
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["image", "s"], ["q"]))
    return model


def maps() -> onnx.ModelProto:
    model = small.plain(output=("n", small.WIDTH, 4, 4))
    del model.graph.node[2:]
    model.graph.node[1].output[0] = "scores"
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (two_inputs, r"has one input, this has 2 \(image, mask\)"),
        (text, "has 2 axes; images have four"),
        (boxes, r"has 2 outputs \(scores, b\); say which are the classes: model\.output"),
        (custom, r"node 'sharpen_1' \(my\.own\.Sharpen\): this operator is not known here"),
        (quantised, "an int8 file can't be trained; give the float file"),
        (maps, r"a classifier gives one number a class and image"),
    ],
)
def test_what_is_no_classifier_is_refused_with_the_reason(make, reason, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FgvcError, match=reason):
        open_onnx(small.saved(make(), tmp_path))


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    file = small.saved(small.plain(), tmp_path)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not an onnx file", b"\x00" * 100):
        file.write_bytes(content)
        with pytest.raises(FgvcError, match="deployed.onnx"):
            open_onnx(file)
    with pytest.raises(FgvcError, match="no such file"):
        open_onnx(tmp_path / "gone.onnx")


def test_open_height_and_width_are_asked_for(tmp_path: Path) -> None:
    file = small.saved(small.plain(shape=("n", 3, "h", "w")), tmp_path)
    with pytest.raises(FgvcError, match=r"leaves height and width open.*image\.size"):
        open_onnx(file)
    agrees(file, open_onnx(file, (12, 10)))
    with pytest.raises(FgvcError, match="8 x 8 pixels alone, not 12 x 10"):
        open_onnx(small.saved(small.plain(), tmp_path / "b"), (12, 10))


def test_float64_gradients_are_those_of_the_same_net_by_hand(tmp_path: Path) -> None:
    """The kept-norm file beside modules that are written out, in float64."""
    file = small.saved(small.kept_norm(), tmp_path)
    net = open_onnx(file).double()
    value = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()).double()
        for tensor in onnx.load(str(file)).graph.initializer
    }
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"):
        value[name].requires_grad_()
    x, y = pictures(net).double(), torch.tensor([0, 1, 2])
    a = F.conv2d(F.pad(x, [0, 1, 0, 1]), value["stem.weight"], value["stem.bias"], stride=2)
    b = F.hardswish(
        F.batch_norm(a, value["norm.mean"], value["norm.var"], value["norm.weight"], value["norm.bias"], eps=1e-3)
    )
    logits = b.mean((2, 3)) @ value["head.weight"].flatten(1).T + value["head.bias"]
    F.cross_entropy(logits, y).backward()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(logits, y), rtol=1e-9, atol=0)
    parameters = dict(net.named_parameters())
    for name, (slot, *_) in net.slots.items():
        if slot.trained:
            grad = parameters[slot.target].grad
            assert grad is not None
            torch.testing.assert_close(slot.to_file(grad), value[name].grad, rtol=1e-9, atol=1e-12)


def test_inspect_says_what_a_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small.saved(small.bytes_in(), tmp_path)
    facts = inspect_file(file)
    assert facts.agrees
    assert (facts.layout, facts.dtype, facts.size) == ("NHWC", "uint8", (8, 8))
    assert (facts.batch, facts.classes) == (None, small.CLASSES)
    assert (facts.ending, facts.features) == ("softmax", (small.WIDTH, 4, 4))
    assert facts.classifier == (small.WIDTH, small.CLASSES)
    assert facts.trainable == {name: value.shape for name, value in small.weights().items()}
    assert set(facts.untrained) == {"mean", "std"}
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(file)])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert "input: uint8 NHWC, 8 x 8 pixels, any batch" in output
    assert "5 classes, softmax at the end" in output
    assert "it can be trained as it is" in output
    with pytest.raises(SystemExit):
        main(["inspect", str(file), "--json"])
    assert json.loads(capsys.readouterr().out)["classes"] == small.CLASSES


def test_inspect_refuses_what_it_can_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_size = small.saved(small.plain(shape=("n", 3, "h", "w")), tmp_path / "a")
    for words, message in (
        ([str(open_size)], "leaves height and width open"),
        ([str(open_size), "--size", "axb"], "--size axb: HEIGHTxWIDTH in pixels"),
        ([str(small.saved(two_inputs(), tmp_path / "b"))], "has one input, this has 2"),
        ([str(tmp_path / "gone.onnx")], "gone.onnx: no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
