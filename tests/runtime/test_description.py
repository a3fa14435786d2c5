"""What a file takes, does and gives is read from its graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fgvc.errors import FgvcError
from fgvc.runtime.description import Description, describe
from tests.models.onnxnet import small

node = helper.make_node


def read(model: onnx.ModelProto, **options: Any) -> Description:
    return describe(model.SerializeToString(), **options)


def begun(steps: list[onnx.NodeProto], tensors: dict[str, np.ndarray] | None = None, **options: Any) -> onnx.ModelProto:
    """A small net behind `steps`, the last of which gives `x`."""
    after = small.layers()
    after[0].input[0] = "x"
    stored = small.weights() | {name: np.asarray(value) for name, value in (tensors or {}).items()}
    return small.model(
        [*steps, *after], [numpy_helper.from_array(value, name) for name, value in stored.items()], **options
    )


def ended(steps: list[onnx.NodeProto], **options: Any) -> onnx.ModelProto:
    """A small net before `steps`, which take `z` and give `scores`."""
    tensors = [numpy_helper.from_array(value, name) for name, value in small.weights().items()]
    return small.model([*small.layers("z"), *steps], tensors, **options)


def test_a_plain_file() -> None:
    description = read(small.plain())
    assert (description.input, description.layout, description.dtype) == ("image", "NCHW", "float32")
    assert (description.batch, description.height, description.width) == (None, small.SIZE, small.SIZE)
    assert (description.in_graph, description.mean, description.std, description.white) == ((), None, None, None)
    assert (description.output, description.others, description.classes) == ("scores", (), small.CLASSES)
    assert (description.ending, description.logits) == (None, "scores")


def test_bytes_channels_last_and_a_softmax() -> None:
    file = read(small.bytes_in())
    assert (file.layout, file.dtype, file.white) == ("NHWC", "uint8", 255)
    assert file.in_graph == ("cast to float32", "channels first", "subtract 120, 110, 100", "divide by 60, 58, 57")
    assert (file.mean, file.std) == ((120.0, 110.0, 100.0), (60.0, 58.0, 57.0))
    assert (file.ending, file.logits) == ("softmax", "logits")
    record = file.record.model_dump(mode="json")
    assert record == {
        "input": "image", "layout": "NHWC", "dtype": "uint8", "in_graph": list(file.in_graph), "output": "scores",
        "ending": "softmax",
    }  # fmt: skip


def test_half_floats_and_a_fixed_batch() -> None:
    assert read(small.half()).dtype == "float16"
    assert read(small.fixed_batch()).batch == 1


RGB = np.float32([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = np.float32([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
STARTS = {
    "a division and a subtraction": (
        [
            node("Div", ["image", "white"], ["s1"]),
            node("Sub", ["s1", "mean"], ["s2"]),
            node("Div", ["s2", "std"], ["x"]),
        ],
        {"white": np.float32(255), "mean": RGB, "std": STD},
        255,
    ),
    "a product and a sum": (
        [node("Mul", ["share", "image"], ["s1"]), node("Add", ["s1", "less"], ["x"])],
        {"share": np.float32(1 / 127.5), "less": np.float32([-1])},
        255,
    ),
    "shares to -1..1": (
        [node("Mul", ["image", "two"], ["s1"]), node("Sub", ["s1", "one"], ["x"])],
        {"two": np.float32(2), "one": np.float32(1)},
        1,
    ),
    "upside down": ([node("Sub", ["one", "image"], ["x"])], {"one": np.float32(1)}, 1),
    "channels turned round before": (
        [node("Gather", ["image", "order"], ["s1"], axis=1), node("Sub", ["s1", "mean"], ["x"])],
        {"order": np.array([2, 1, 0]), "mean": RGB},
        1,
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_the_start_does_is_one_mean_and_std(name: str) -> None:
    """Beside onnxruntime: the start's last value is (pixel - mean) / std, a channel each."""
    steps, tensors, white = STARTS[name]
    description = read(begun(steps, tensors))
    assert description.white == white
    assert description.mean is not None
    assert description.std is not None
    assert len(description.in_graph) == len(steps)
    model = begun(steps, tensors)
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    x = np.random.default_rng(0).uniform(0, white, (2, 3, small.SIZE, small.SIZE)).astype(np.float32)
    by_onnxruntime = onnxruntime.InferenceSession(model.SerializeToString()).run(["x"], {"image": x})[0]
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (description.mean, description.std))
    by_hand = (x - mean) / std
    by_hand = by_hand[:, ::-1] if "turned" in name else by_hand
    np.testing.assert_allclose(by_onnxruntime, by_hand, rtol=1e-4, atol=1e-5)


def test_constants_in_nodes_are_read_through_what_moves_them() -> None:
    steps = [
        node("Constant", [], ["m"], value=numpy_helper.from_array(RGB.reshape(3), "")),
        node("Constant", [], ["axes"], value_ints=[0, 2, 3]),
        node("Unsqueeze", ["m", "axes"], ["mean"]),
        node("Constant", [], ["two"], value_float=2.0),
        node("Sub", ["image", "mean"], ["s1"]),
        node("Mul", ["s1", "two"], ["x"]),
    ]
    description = read(begun(steps))
    assert description.in_graph == ("subtract 0.485, 0.456, 0.406", "multiply by 2")
    assert description.std == (0.5, 0.5, 0.5)


def test_numbers_in_typed_fields_are_read() -> None:
    model = begun([node("Sub", ["image", "mean"], ["x"])])
    for kind, values in ((TensorProto.FLOAT, [0.5, 0.25, 0.125]), (TensorProto.DOUBLE, [0.5, 0.25, 0.125])):
        with_mean = onnx.ModelProto()
        with_mean.CopyFrom(model)
        with_mean.graph.initializer.append(helper.make_tensor("mean", kind, (1, 3, 1, 1), values))
        assert read(with_mean).mean == (0.5, 0.25, 0.125)
    half = onnx.ModelProto()
    half.CopyFrom(model)
    half.graph.initializer.append(helper.make_tensor("mean", TensorProto.FLOAT16, (1, 3, 1, 1), [0.5, 0.25, 0.125]))
    assert read(half).mean == (0.5, 0.25, 0.125)


def test_a_resize_in_the_graph_leaves_height_and_width_open() -> None:
    steps = [
        node("Shape", ["image"], ["all"]),  # reads no pixel
        node("Resize", ["image", "", "", "sizes"], ["s1"], mode="linear"),
        node("Clip", ["s1", "low", "high"], ["x"]),
    ]
    tensors = {"sizes": np.array([1, 3, 8, 8]), "low": np.float32(0), "high": np.float32(1)}
    description = read(begun(steps, tensors, shape=("n", 3, "h", "w")))
    assert (description.height, description.width) == (None, None)
    assert description.in_graph == ("resize (bilinear) to 8 x 8", "clip to 0 to 1")


def test_the_padding_of_a_layer_and_its_weights_are_not_the_start() -> None:
    pad = node("Pad", ["image", "pads"], ["x"])
    assert read(begun([pad], {"pads": np.array([0, 0, 0, 0, 0, 0, 1, 1])})).in_graph == ()
    assert read(small.arithmetic_norm()).in_graph == ()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [(("n", 3, 8, 8), "NCHW"), (("n", 8, 8, 3), "NHWC"), (("n", None, None, 3), "NHWC"), (("n", 3, None, None), "NCHW"),
     ((1, "a", "b", "c"), "NHWC"), ((1, 3, 8, 3), "NHWC")],
)  # fmt: skip
def test_the_layout_is_that_of_three_channels_else_of_the_first_layer(shape: tuple[Any, ...], layout: str) -> None:
    turned = begun([node("Transpose", ["image"], ["x"], perm=[0, 3, 1, 2])], shape=shape)
    straight = begun([node("Identity", ["image"], ["x"])], shape=shape)
    if shape[1] == 8 or shape[1:] == (None, None, 3) or shape == ("n", 3, 8, 8) or shape == ("n", 3, None, None):
        assert read(straight).layout == layout
    else:  # the shape tells nothing
        assert read(turned).layout == layout
        assert read(straight).layout == "NCHW"


ENDINGS = {
    "softmax": ([node("Softmax", ["z"], ["scores"], axis=-1)], "softmax"),
    "softmax, renamed and reshaped": (
        [node("Softmax", ["z"], ["p"], axis=1), node("Flatten", ["p"], ["q"]), node("Identity", ["q"], ["scores"])],
        "softmax",
    ),
    "log_softmax": ([node("LogSoftmax", ["z"], ["scores"], axis=1)], "log_softmax"),
    "log of softmax": ([node("Softmax", ["z"], ["p"], axis=1), node("Log", ["p"], ["scores"])], "log_softmax"),
    "sigmoid": ([node("Sigmoid", ["z"], ["scores"])], "sigmoid"),
    "over the batch": ([node("Softmax", ["z"], ["scores"], axis=0)], None),
    "relu": ([node("Relu", ["z"], ["scores"])], None),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_ending(name: str) -> None:
    steps, ending = ENDINGS[name]
    description = read(ended(steps))
    assert description.ending == ending
    assert description.logits == ("z" if ending else "scores")


def test_an_ending_within_a_function_of_the_file() -> None:
    opset = [helper.make_opsetid("", 17)]
    inner = helper.make_function("own", "Tail", ["a"], ["b"], [node("Softmax", ["a"], ["b"], axis=1)], opset)
    outer = helper.make_function(
        "own", "Last", ["i"], ["o"], [node("Identity", ["i"], ["t"]), node("Tail", ["t"], ["o"], domain="own")],
        [*opset, helper.make_opsetid("own", 1)],
    )  # fmt: skip
    model = ended([node("Last", ["z"], ["scores"], domain="own")], domains=("own",))
    model.functions.extend([inner, outer])
    onnx.checker.check_model(model)
    assert read(model).ending == "softmax"


def with_outputs(*shapes: tuple[Any, ...] | None) -> onnx.ModelProto:
    model = small.plain()
    for number, shape in enumerate(shapes):
        model.graph.node.append(node("Identity", ["b"], [f"more {number}"]))
        model.graph.output.append(helper.make_tensor_value_info(f"more {number}", TensorProto.FLOAT, shape))
    return model


def test_which_of_several_outputs() -> None:
    maps = read(with_outputs(("n", 5, 4, 4)))
    assert (maps.output, maps.others) == ("scores", ("more 0",))
    assert read(with_outputs(("n", 5, 1, 1))).output == "scores"  # maps of a single cell
    two = with_outputs(("n", 7), ("n", 5, 4, 4))
    with pytest.raises(
        FgvcError, match=r"has 3 outputs \(scores, more 0, more 1\); say which are the classes: model\.output"
    ):
        read(two)
    assert read(two, classes=5).output == "scores"
    assert read(two, classes=7).output == "more 0"
    assert read(two, output="more 0").output == "more 0"
    with pytest.raises(FgvcError, match=r"has no output 'probs'; it has scores, more 0, more 1"):
        read(two, output="probs")
    with pytest.raises(FgvcError, match="has 2 outputs"):  # undeclared, it may be anything
        read(with_outputs(None))


def test_a_file_that_is_no_classifier_of_images_is_refused(tmp_path: Path) -> None:
    whole = small.plain().SerializeToString()
    file = tmp_path / "cut.onnx"
    for cut in (whole[: len(whole) // 2], b"", b"not an onnx file at all", os.urandom(0), whole[:-1]):
        file.write_bytes(cut)
        with pytest.raises(FgvcError, match=r"cut\.onnx: not an ONNX file, or cut short"):
            describe(file)
    with pytest.raises(FgvcError, match=r"gone\.onnx: no such file"):
        describe(tmp_path / "gone.onnx")
    with pytest.raises(
        FgvcError, match=r"the input 'image' is of int64; images are of float32, float16, float64 or uint8"
    ):
        read(begun([node("Cast", ["image"], ["x"], to=1)], kind=TensorProto.INT64))
    with pytest.raises(FgvcError, match=r"no axis of three channels"):
        read(small.plain(shape=("n", 1, 8, 8)))


def test_deployed_files() -> None:
    if "FGVC_SHARED" not in os.environ:
        pytest.skip("FGVC_SHARED is not set")
    folder = Path(os.environ["FGVC_SHARED"]) / "deployed"
    descriptions = {file.name: describe(file) for file in sorted(folder.glob("*.onnx"))}
    keras = descriptions.pop("keras-MobileNetV2-tf2onnx-opset13-nhwc.onnx")
    assert (keras.layout, keras.ending, keras.in_graph) == ("NHWC", "softmax", ("channels first",))
    for file, each in descriptions.items():
        session = onnxruntime.InferenceSession(str(folder / file))
        assert each.input == session.get_inputs()[0].name
        assert (each.output, each.classes, each.ending) == (session.get_outputs()[0].name, 50, None)
        shape = session.get_inputs()[0].shape
        assert [each.height, each.width] == shape[2:]
        assert (each.layout, each.dtype, each.in_graph) == ("NCHW", "float32", ())
