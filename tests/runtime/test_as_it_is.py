"""Files of other programs, used as they are: each reader's answers beside onnxruntime's, called by hand on images that numpy
alone has prepared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fgvc import api
from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.exporting.triton import config
from fgvc.runtime.bundle import load_bundle, write_bundle
from fgvc.runtime.description import describe
from fgvc.runtime.engine import Engine, OnnxSession, as_logits, probabilities, sigmoid, softmax
from fgvc.runtime.explain import BundleExplainer
from fgvc.runtime.predict import predict_files
from fgvc.serving.models import LoadedModel
from fgvc.serving.protocol import infer, model_metadata
from tests.models.onnxnet import small

LABELS = ("wren", "robin", "tit", "jay", "crow")
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
node = helper.make_node


def with_end(*steps: onnx.NodeProto, **options: Any) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in small.weights().items()]
    return small.model([*small.layers("z"), *steps], tensors, **options)


def channels_last() -> onnx.ModelProto:
    """A net as Keras has it: floats up to 255, channels last, normalised in the graph, a softmax."""
    after = small.layers("z")
    after[0].input[0] = "x"
    tensors = small.weights() | {"half": np.float32(1 / 127.5), "one": np.float32(1)}
    steps = [
        node("Mul", ["image", "half"], ["m"]), node("Sub", ["m", "one"], ["s"]),
        node("Transpose", ["s"], ["x"], perm=[0, 3, 1, 2]),
    ]  # fmt: skip
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    return small.model([*steps, *after, node("Softmax", ["z"], ["scores"], axis=-1)], stored, shape=("n", 8, 8, 3))


def half_with_a_sigmoid() -> onnx.ModelProto:
    model = small.half()
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(node("Sigmoid", ["z"], ["scores"]))
    return model


def cells_of_one() -> onnx.ModelProto:
    """A net whose output is (B,K,1,1), as a last convolution leaves it."""
    steps = [node("Unsqueeze", ["z", "axes"], ["scores"])]
    model = with_end(*steps, output=("n", small.CLASSES, 1, 1))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    return model


def several() -> onnx.ModelProto:
    """A net with two outputs of as many axes: features before the classes."""
    model = with_end(node("Softmax", ["z"], ["scores"], axis=1))
    model.graph.output.insert(0, helper.make_tensor_value_info("d", TensorProto.FLOAT, ("n", small.WIDTH)))
    return model


@dataclass(frozen=True)
class File:
    make: Callable[[], onnx.ModelProto]
    layout: str = "NCHW"
    dtype: type = np.float32
    raw: bool = False  # the graph normalises: pixels from 0 to 255
    ending: str | None = None


FILES = {
    "plain": File(small.plain),
    "half": File(small.half, dtype=np.float16),
    "one image at a time": File(small.fixed_batch),
    "four images at a time": File(lambda: small.plain(shape=(4, 3, 8, 8), output=(4, small.CLASSES))),
    "bytes, channels last, softmax": File(small.bytes_in, "NHWC", np.uint8, raw=True, ending="softmax"),
    "channels last, softmax": File(channels_last, "NHWC", raw=True, ending="softmax"),
    "log_softmax": File(lambda: with_end(node("LogSoftmax", ["z"], ["scores"], axis=1)), ending="log_softmax"),
    "sigmoid": File(lambda: with_end(node("Sigmoid", ["z"], ["scores"])), ending="sigmoid"),
    "half, sigmoid": File(half_with_a_sigmoid, dtype=np.float16, ending="sigmoid"),
    "cells of one": File(cells_of_one),
    "several outputs": File(several, ending="softmax"),
}


@pytest.fixture(params=FILES)
def file(request: pytest.FixtureRequest) -> File:
    return FILES[request.param]


def spec_of(file: File, **options: Any) -> Preprocess:
    normalisation = (
        {"input_range": 255, "mean": (0, 0, 0), "std": (1, 1, 1)} if file.raw else {"mean": MEAN, "std": STD}
    )
    tree = {"size": (8, 8), "resize": "squash", "crop_pct": 1, "interpolation": "bilinear"} | normalisation
    return Preprocess.model_validate(tree | options)


def pictures(folder: Path, count: int = 6) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def by_hand(file: File, model: bytes, pixels: list[np.ndarray]) -> np.ndarray:
    """onnxruntime's output (B,K) for images (H,W,3) that are fed as the file's program would feed them."""
    x = np.stack(pixels).astype(np.float32)
    x = x if file.raw else (x / 255 - np.float32(MEAN)) / np.float32(STD)
    x = (x if file.layout == "NHWC" else x.transpose(0, 3, 1, 2)).astype(file.dtype)
    session = onnxruntime.InferenceSession(model)
    batch = session.get_inputs()[0].shape[0]
    step = batch if isinstance(batch, int) else len(x)
    rows = []
    for at in range(0, len(x), step):
        piece = x[at : at + step]
        full = np.concatenate([piece, np.repeat(piece[:1], step - len(piece), axis=0)])
        rows.append(session.run(["scores"], {"image": full})[0][: len(piece)])
    return np.concatenate(rows).reshape(len(x), -1).astype(np.float64)


def expected(file: File, scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The probabilities by formula."""
    if file.ending == "sigmoid":
        odds = scores / (1 - scores)
        return odds ** (1 / temperature) / (1 + odds ** (1 / temperature))
    powers = {"softmax": scores, "log_softmax": np.exp(scores), None: np.exp(scores)}[file.ending] ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


def bundled(folder: Path, file: File, model: onnx.ModelProto, temperature: float | None = None, **options: Any) -> Path:
    files: dict[str, Any] = {
        "model.onnx": model.SerializeToString(), "labels.json": list(LABELS), "preprocess.json": spec_of(file, **options),
        "contract.json": {"num_classes": 5}, "metrics.json": {},
    }  # fmt: skip
    if temperature is not None:
        files["calibration.json"] = Calibration(
            temperature=temperature, threshold=0, keep=1, fitted_on="val", images=60, nll_before=1, nll_after=0.9, ece_before=0.1,
            ece_after=0.1, kept=1, coverage=1, accuracy=1,
        )  # fmt: skip
    write_bundle(folder, files=files)
    return folder


def pixels_of(paths: list[Path]) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in paths]


def tolerance(file: File) -> float:
    return 5e-3 if file.dtype == np.float16 else 1e-6


@pytest.mark.parametrize("temperature", [None, 1.7])
def test_predict(file: File, temperature: float | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, paths = file.make(), pictures(tmp_path / "pictures")
    bundle = bundled(tmp_path / "bundle", file, model, temperature)
    assert predict_files(bundle, paths, as_json=True, top_k=5) == 0
    rows = [json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines()]
    p = np.array([[next(top["probability"] for top in row if top["index"] == k) for k in range(5)] for row in rows])
    expected_p = expected(file, by_hand(file, model.SerializeToString(), pixels_of(paths)), temperature or 1.0)
    np.testing.assert_allclose(p, expected_p, atol=tolerance(file))
    assert [row[0]["index"] for row in rows] == list(p.argmax(1))
    if file.dtype != np.float16:
        assert [row[0]["label"] for row in rows] == [LABELS[k] for k in expected_p.argmax(1)]


def served(bundle: Path) -> LoadedModel:
    return LoadedModel(name="m", engine=Engine(load_bundle(bundle), threads=1), explainer=None, digest="")


def test_serve_takes_and_gives_the_files_own_tensors(file: File, tmp_path: Path) -> None:
    model, paths = file.make(), pictures(tmp_path / "pictures", 3)
    loaded = served(bundled(tmp_path / "bundle", file, model, 2.0))
    pixels = pixels_of(paths)
    scores = by_hand(file, model.SerializeToString(), pixels)
    answers = loaded.engine.classify([Image.open(path) for path in paths], top_k=5)  # /v1/classify
    p = np.array([[next(one.probability for one in a.predictions if one.index == k) for k in range(5)] for a in answers])
    np.testing.assert_allclose(p, expected(file, scores, 2.0), atol=tolerance(file))

    about = model_metadata(loaded)
    datatype = {np.float32: "FP32", np.float16: "FP16", np.uint8: "UINT8"}[file.dtype]
    shape = [-1, 8, 8, 3] if file.layout == "NHWC" else [-1, 3, 8, 8]
    assert about["inputs"] == [{"name": "image", "datatype": datatype, "shape": shape}]
    gives = "FP16" if file.dtype == np.float16 else "FP32"
    assert about["outputs"] == [{"name": "scores", "datatype": gives, "shape": [-1, 5]}]

    x = np.stack(pixels).astype(np.float32)
    x = x if file.raw else (x / 255 - np.float32(MEAN)) / np.float32(STD)
    fed = np.ascontiguousarray(x if file.layout == "NHWC" else x.transpose(0, 3, 1, 2), dtype=file.dtype)
    tensor: dict[str, Any] = {"name": "image", "datatype": datatype, "shape": list(fed.shape)}
    body = json.dumps({"inputs": [tensor | {"data": fed.tolist()}]}).encode()
    content, length = infer(loaded, body, {}, batch=8, limit=1 << 20)
    assert length is None
    (output,) = json.loads(content)["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("scores", gives, [3, 5])
    np.testing.assert_allclose(np.reshape(output["data"], (3, 5)), scores, atol=tolerance(file))

    binary = tensor | {"parameters": {"binary_data_size": fed.nbytes}}
    head = json.dumps({"inputs": [binary], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    content, length = infer(loaded, head + fed.tobytes(), headers, batch=8, limit=1 << 20)
    assert length is not None
    values = np.frombuffer(content[length:], "<f2" if gives == "FP16" else "<f4").reshape(3, 5)
    np.testing.assert_allclose(values, scores, atol=tolerance(file))


def test_serve_refuses_bytes_that_are_none(tmp_path: Path) -> None:
    from fgvc.serving.limits import Refusal

    file = FILES["bytes, channels last, softmax"]
    loaded = served(bundled(tmp_path / "bundle", file, file.make()))
    for value, datatype, reason in (
        (0.5, "UINT8", "whole numbers from 0 to 255"),
        (256, "UINT8", "whole numbers from 0 to 255"),
        (1, "FP32", "datatype UINT8 is expected"),
    ):
        tensor = {"name": "image", "datatype": datatype, "shape": [1, 8, 8, 3], "data": [value] * 192}
        with pytest.raises(Refusal, match=reason):
            infer(loaded, json.dumps({"inputs": [tensor]}).encode(), {}, batch=8, limit=1 << 20)


def test_compare_reads_a_lone_file_as_it_is(file: File, tmp_path: Path) -> None:
    model = file.make()
    folder = tmp_path / "deployed"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    (folder / "labels.json").write_text(json.dumps(LABELS))
    (folder / "preprocess.json").write_text(spec_of(file).model_dump_json())
    for name in LABELS:
        pictures(tmp_path / "set" / name, 2)
    result = api.compare(folder / "net.onnx", bundled(tmp_path / "bundle", file, model), data=str(tmp_path / "set"), seen="none")
    p = expected(file, by_hand(file, model.SerializeToString(), pixels_of(list(result.paths))))
    np.testing.assert_array_equal(result.predicted[0], result.predicted[1])
    np.testing.assert_allclose(result.confidence[0], p.max(1), atol=tolerance(file))
    np.testing.assert_allclose(result.confidence[1], p.max(1), atol=tolerance(file))
    assert result.differences == ()
    if file.dtype != np.float16:
        np.testing.assert_array_equal(result.predicted[0], p.argmax(1))


def test_compare_says_that_files_are_fed_and_end_in_other_ways(tmp_path: Path) -> None:
    plain, other = FILES["plain"], FILES["bytes, channels last, softmax"]
    for name in LABELS:
        pictures(tmp_path / "set" / name, 1)
    a, b = bundled(tmp_path / "a", plain, plain.make()), bundled(tmp_path / "b", other, other.make())
    lines = api.compare(a, b, data=str(tmp_path / "set")).differences
    assert "network.layout: NCHW against NHWC" in lines
    assert "network.dtype: float32 against uint8" in lines
    assert "network.ending: None against softmax" in lines
    # A lone file of which nothing is known gets pixels that nothing has normalised before it does.
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "net.onnx").write_bytes(other.make().SerializeToString())
    (tmp_path / "lone" / "labels.json").write_text(json.dumps(LABELS))
    result = api.compare(a, tmp_path / "lone" / "net.onnx", data=str(tmp_path / "set"), seen="none")
    scores = by_hand(other, other.make().SerializeToString(), pixels_of(list(result.paths)))
    np.testing.assert_allclose(result.confidence[1], scores.max(1), atol=1e-6)
    assert any("input_range 255, mean (0, 0, 0), std (1, 1, 1)" in note for note in result.notes)


def test_tritons_configuration_is_the_files_own(file: File, tmp_path: Path) -> None:
    text = config(load_bundle(bundled(tmp_path / "b", file, file.make())), name="m", device="cpu", instances=1)
    kind = {np.float32: "FP32", np.float16: "FP16", np.uint8: "UINT8"}[file.dtype]
    dims = "8, 8, 3" if file.layout == "NHWC" else "3, 8, 8"
    batch = describe(file.make().SerializeToString(), classes=5).batch
    assert f"max_batch_size: {0 if batch else 16}\n" in text
    whole = f"{batch}, {dims}" if batch else dims
    assert f'input [ {{ name: "image", data_type: TYPE_{kind}, dims: [{whole}] }} ]' in text
    (labelled,) = (line for line in text.splitlines() if "labels.txt" in line)
    assert labelled.startswith('output [ { name: "scores"')


def test_explain_reads_the_written_file_with_maps(file: File, tmp_path: Path) -> None:
    """Maps are its last output, whatever else it has; the probabilities are predict's."""
    model = file.make()
    values = np.ones((1, 5, 2, 2), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "the maps"))
    model.graph.node.append(node("Identity", ["the maps"], ["maps"]))
    model.graph.output.append(helper.make_tensor_value_info("maps", TensorProto.FLOAT, (1, 5, 2, 2)))
    files: dict[str, Any] = {
        "model.onnx": file.make().SerializeToString(), "explain.onnx": model.SerializeToString(), "labels.json": list(LABELS),
        "preprocess.json": spec_of(file), "contract.json": {"num_classes": 5}, "metrics.json": {},
    }  # fmt: skip
    write_bundle(tmp_path / "b", files=files)
    (path,) = pictures(tmp_path / "pictures", 1)
    x = np.asarray(Image.open(path)).astype(np.float32)
    x = x if file.raw else (x / 255 - np.float32(MEAN)) / np.float32(STD)
    x = np.ascontiguousarray(x.transpose(2, 0, 1)[None], dtype=np.float32)
    (explanation,) = BundleExplainer(load_bundle(tmp_path / "b"))(x, None)
    expected_p = expected(file, by_hand(file, file.make().SerializeToString(), pixels_of([path])))[0]
    np.testing.assert_allclose(explanation.p, expected_p, atol=tolerance(file))


def test_nothing_is_normalised_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bytes_, floats = FILES["bytes, channels last, softmax"], FILES["channels last, softmax"]
    normalised = {"input_range": 1, "mean": MEAN, "std": STD}
    with pytest.raises(
        FgvcError, match=r"normalises pixels, but .*model\.onnx takes them as bytes.*subtract 120, 110, 100"
    ):
        Engine(load_bundle(bundled(tmp_path / "a", bytes_, bytes_.make(), **normalised)))
    bundle = bundled(tmp_path / "b", floats, floats.make(), **normalised)
    predict_files(bundle, pictures(tmp_path / "p", 1))
    message = capsys.readouterr().err
    assert "warning: " in message
    assert (
        "normalises by itself (multiply by 0.007843138, subtract 1, channels first), as for pixels from 0 to 255"
        in message
    )
    predict_files(bundled(tmp_path / "c", floats, floats.make()), pictures(tmp_path / "p", 1))
    assert "warning" not in capsys.readouterr().err


def test_a_bundle_states_what_its_file_does_and_another_file_is_refused(tmp_path: Path) -> None:
    file = FILES["bytes, channels last, softmax"]
    record = describe(file.make().SerializeToString()).record
    Engine(load_bundle(bundled(tmp_path / "a", file, file.make(), network=record.model_dump())))
    wrong = record.model_dump() | {"ending": None}
    with pytest.raises(
        FgvcError, match=r"preprocess\.json: network\.ending: says None, and the graph of .* has softmax"
    ):
        Engine(load_bundle(bundled(tmp_path / "b", file, file.make(), network=wrong)))


def test_several_outputs_of_which_none_has_the_labels_count(tmp_path: Path) -> None:
    model = with_end(node("Softmax", ["z"], ["scores"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", small.CLASSES)))
    file = FILES["several outputs"]
    with pytest.raises(FgvcError, match=r"has 2 outputs \(scores, z\); say which are the classes"):
        Engine(load_bundle(bundled(tmp_path / "a", file, model)))
    record = describe(model.SerializeToString(), output="z").record
    for number, network in enumerate((record.model_dump(), {"output": "z"})):
        engine = Engine(load_bundle(bundled(tmp_path / f"b{number}", file, model, network=network)))
        assert engine.session.file.ending is None
        assert engine.session.outputs == ["z", "scores"]
    engine = Engine(load_bundle(bundled(tmp_path / "c", file, model, network={"output": "scores"})))
    assert engine.session.file.ending == "softmax"


def test_probabilities_at_their_bounds_stay_numbers() -> None:
    for kind in (np.float16, np.float32):
        p = np.array([[0, 1, 0.25]], kind)
        for ending in ("softmax", "sigmoid"):
            z = as_logits(p, ending)  # type: ignore[arg-type]
            assert np.isfinite(z).all()
            p_float = probabilities(z, None, ending)[0]  # type: ignore[arg-type]
            p_exact = p[0] / p[0].sum() if ending == "softmax" else p[0]
            np.testing.assert_allclose(p_float, p_exact, atol=1e-3 if kind == np.float16 else 1e-6)
    assert np.isnan(as_logits(np.array([[np.nan, 1]], np.float32), "softmax")).any()
    np.testing.assert_allclose(sigmoid(np.array([-800.0, 0, 800])), [0, 0.5, 1])


def test_a_session_feeds_pieces_of_a_fixed_batch() -> None:
    x = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(np.float32)
    free, fixed = small.plain(), small.plain(shape=(4, 3, 8, 8), output=(4, 5))
    a, b = (OnnxSession(model.SerializeToString()).logits(x) for model in (free, fixed))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("FGVC_SHARED" not in os.environ, reason="FGVC_SHARED is not set")
@pytest.mark.parametrize("name", [
    "birds-tf_efficientnet_lite0-torch1.13-opset11", "keras-MobileNetV2-tf2onnx-opset13-nhwc",
    "timm-mobilenetv2_100-torch2.9-opset18-dynamo",
])  # fmt: skip
def test_real_files_answer_as_an_opencv_program_would_have_it(name: str, tmp_path: Path) -> None:
    model = (Path(os.environ["FGVC_SHARED"]) / "deployed" / f"{name}.onnx").read_bytes()
    session = onnxruntime.InferenceSession(model)
    source, keras = session.get_inputs()[0], name.startswith("keras")
    side = source.shape[2]
    spec = Preprocess(
        size=(side, side), resize="squash", crop_pct=1, interpolation="bilinear", antialias=False, channel_order="bgr",
        input_range=255, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5),
    )  # fmt: skip
    files = {
        "model.onnx": model, "labels.json": [f"c{k}" for k in range(50)], "preprocess.json": spec,
        "contract.json": {"num_classes": 50}, "metrics.json": {},
    }  # fmt: skip
    write_bundle(tmp_path / "b", files=files)
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    (answer,) = Engine(load_bundle(tmp_path / "b")).classify([Image.fromarray(pixels)], top_k=50)
    blob = (
        cv2.resize(pixels[..., ::-1], (side, side), interpolation=cv2.INTER_LINEAR).astype(np.float32) - 127.5
    ) / 127.5
    fed = blob[None] if keras else blob.transpose(2, 0, 1)[None]
    scores = session.run(None, {source.name: np.ascontiguousarray(fed)})[0].astype(np.float64)
    by_opencv = scores[0] if keras else softmax(scores)[0]
    p_bundle = np.array([next(p.probability for p in answer.predictions if p.index == k) for k in range(50)])
    np.testing.assert_allclose(p_bundle, by_opencv, atol=5e-3)  # OpenCV's bytes differ by a level here and there
