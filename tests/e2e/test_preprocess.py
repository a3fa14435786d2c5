"""`fgvc preprocess` names what was planted, and writes nothing where the images do not decide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fgvc.cli.app import main
from fgvc.config.images import Preprocess
from fgvc.data.recipe import load_recipe
from fgvc.images.preprocess import preprocess
from fgvc.runtime.bundle import read_preprocess
from tests.evaluation.test_preprocessing import CLASSES, SIZE, pictures, planted


def write_images(folder: Path, *, square: bool = False) -> Path:
    images, labels = pictures()
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / CLASSES[label] / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.crop((11, 0, 55, 44)) if square else image).save(path)
    return folder


def write_file(
    path: Path, spec: Preprocess, order: tuple[int, ...] = (0, 1, 2, 3, 4), *, nhwc: bool = False, bytes_: bool = False
) -> Path:
    """A file that has the pictures by heart, as `spec` makes them: an output is high where an image is near one of its class."""
    images, labels = pictures()
    x = np.stack([preprocess(image, spec) for image in images]).reshape(len(images), -1)
    each = len(images) // len(order)
    templates = np.concatenate([x[labels == k] for k in order]).astype(np.float64)
    scale = float(np.abs(templates).mean())
    templates /= scale
    constants = {
        "scale": np.array(scale), "flat": np.array([-1, x.shape[1]]), "templates": templates.T, "minus": np.array(-2.0),
        "squares": np.square(templates).sum(1), "axis": np.array([1]), "none": np.array(0.0), "last": np.array([2]),
        "by_class": np.array([-1, len(order), each]), "width": np.array(-12.0), "height": np.array(6.0),
    }  # fmt: skip
    steps = [
        ("Div", ["image", "scale"], "scaled", {}), ("Reshape", ["scaled", "flat"], "v", {}),
        ("Mul", ["v", "v"], "vv", {}), ("ReduceSum", ["vv", "axis"], "norm", {}), ("MatMul", ["v", "templates"], "p", {}),
        ("Mul", ["p", "minus"], "cross", {}), ("Add", ["cross", "squares"], "part", {}), ("Add", ["part", "norm"], "raw", {}),
        ("Max", ["raw", "none"], "d", {}), ("Sqrt", ["d"], "r", {}), ("Div", ["r", "width"], "e", {}), ("Exp", ["e"], "near", {}),
        ("Reshape", ["near", "by_class"], "grouped", {}), ("ReduceMax", ["grouped", "last"], "best", {"keepdims": 0}),
        ("Mul", ["best", "height"], "scores", {}),
    ]  # fmt: skip
    kind, shape = TensorProto.FLOAT, ["n", 3, *SIZE]
    if nhwc:
        shape = ["n", *SIZE, 3]
    source = "image"
    front = []
    if bytes_:
        kind = TensorProto.UINT8
        front.append(helper.make_node("Cast", [source], ["floats"], to=TensorProto.FLOAT))
        source = "floats"
    if nhwc:
        front.append(helper.make_node("Transpose", [source], ["channels_first"], perm=[0, 3, 1, 2]))
        source = "channels_first"
    nodes = [
        helper.make_node(op, [source if name == "image" else name for name in inputs], [out], **more)
        for op, inputs, out, more in steps
    ]
    stored = [
        numpy_helper.from_array(value.astype(np.int64 if value.dtype.kind == "i" else np.float32), name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(
        [*front, *nodes], "heart", [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", len(order)])], stored,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["preprocess", *map(str, arguments)])
    return int(stop.value.code or 0)


KEYS = {"resize", "crop_pct", "interpolation", "antialias", "channel_order", "input_range", "mean", "std", "fill"}
SPEC = planted(
    "0 to 255 less ImageNet's mean (Caffe's)", "bgr", resize="squash", crop_pct=1.0, interpolation="bilinear"
)


def test_what_was_planted_is_written_as_a_bundle_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file, out = (
        write_images(tmp_path / "set"),
        write_file(tmp_path / "net.onnx", SPEC),
        tmp_path / "preprocess.json",
    )
    assert run(file, images, "-o", out) == 0
    spec = read_preprocess(out)
    assert spec.model_copy(update={"network": None}) == SPEC
    assert spec.network is not None
    assert (spec.network.input, spec.network.layout) == ("image", "NCHW")
    text = capsys.readouterr().out
    assert "100.0 % right" in text
    assert f"labels: in the order of the classes of {images}" in text
    assert not (tmp_path / "labels.found.txt").exists()


def test_bytes_and_channels_last_are_fed_as_the_file_takes_them(tmp_path: Path) -> None:
    spec = planted("0 to 255", resize="crop", crop_pct=0.875, interpolation="bicubic", antialias=False)
    images, out = write_images(tmp_path / "set"), tmp_path / "preprocess.json"
    assert run(write_file(tmp_path / "net.onnx", spec, nhwc=True, bytes_=True), images, "-o", out) == 0
    read = read_preprocess(out)
    assert read.model_copy(update={"network": None}) == spec
    assert read.network is not None
    assert (read.network.layout, read.network.dtype) == ("NHWC", "uint8")


def test_a_wrong_order_of_labels_stops_and_is_written_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = (2, 1, 0, 3, 4)
    images, file, out = (
        write_images(tmp_path / "set"),
        write_file(tmp_path / "net.onnx", SPEC, order),
        tmp_path / "preprocess.json",
    )
    assert run(file, images, "-o", out) == 2
    assert (tmp_path / "labels.found.txt").read_text().splitlines() == [CLASSES[k] for k in order]
    assert "2 are others: ash (0 to 2), cherry (2 to 0)" in capsys.readouterr().out
    (tmp_path / "labels.found.txt").rename(tmp_path / "labels.txt")  # looked at, and stated
    out.unlink()
    assert run(file, images, "-o", out) == 0


def test_images_that_do_not_decide_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = write_images(tmp_path / "set", square=True), tmp_path / "preprocess.json"
    spec = planted("0 to 1", crop_pct=1.0, interpolation="bilinear")
    assert run(write_file(tmp_path / "net.onnx", spec), images, "-o", out, "--json") == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out)["decided"] is False
    assert "resize: squash may be right as well" in captured.err
    assert not out.exists()


def test_what_is_asked_of_the_wrong_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = write_images(tmp_path / "set"), write_file(tmp_path / "net.onnx", SPEC)
    assert run(file, images, "--size", "32") == 2
    assert "takes images of 24 x 24 pixels alone" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("ash\nbeech\ncherry\noak\nrowen\n")
    assert run(file, images) == 2
    assert "did you mean 'rowen'?" in capsys.readouterr().err
    (tmp_path / "labels.txt").write_text("ash\nbeech\n")
    assert run(file, images) == 2
    assert "names 2 classes" in capsys.readouterr().err


def split_images(folder: Path) -> Path:
    """The pictures in train/ and test/ folders, every third one in test."""
    images, labels = pictures()
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / ("test" if n // len(CLASSES) % 3 == 2 else "train") / CLASSES[label] / f"{n:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


def init(*arguments: object) -> int:
    try:
        main(["init", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_init_writes_down_what_a_deployed_file_and_images_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file, out = split_images(tmp_path / "set"), write_file(tmp_path / "net.onnx", SPEC), tmp_path / "my.yaml"
    assert init("--deployed", file, "--data", images, out) == 0
    recipe = load_recipe(out)
    assert recipe.model.onnx == file
    assert (recipe.model.backbone, recipe.model.weights, recipe.model.head) == (None, "deployed", "timm")
    assert recipe.image.size == SIZE
    assert Preprocess(size=SIZE, **{key: getattr(recipe.deploy, key) for key in Preprocess.model_fields if key in KEYS}) == SPEC
    assert recipe.deploy.labels == tmp_path / "my.labels.txt"
    assert (tmp_path / "my.labels.txt").read_text().split() == list(CLASSES)
    assert recipe.data.root == images
    text = out.read_text()
    assert "# a deployed classifier's .onnx file" in text, "every key has its description"
    assert "likeliest: size" in capsys.readouterr().out
    assert init("--deployed", file, "--data", images, out) == 2, "nothing is overwritten"


def test_init_asks_which_images_a_file_has_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file, out = write_images(tmp_path / "set"), write_file(tmp_path / "net.onnx", SPEC), tmp_path / "my.yaml"
    assert init("--deployed", file, "--data", images, out) == 4
    error = capsys.readouterr().err
    assert "it names 100.0 % of these rightly" in error
    assert "it has most likely seen them" in error
    assert "--seen none" in error
    assert not out.exists()
    assert not (tmp_path / "my.labels.txt").exists()
    assert init("--deployed", file, "--data", images, "--seen", "none", out) == 0
    assert load_recipe(out).deploy.seen == "none"
    new = write_images(tmp_path / "new")
    assert init("--deployed", file, "--data", images, "--unseen", new, tmp_path / "beside.yaml") == 0
    assert load_recipe(tmp_path / "beside.yaml").deploy.unseen == new
    assert init("any/plain", "--unseen", new, tmp_path / "other.yaml") == 2


def test_init_of_a_recipe_takes_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "set")
    assert init("any/plain", "--data", images, tmp_path / "my.yaml") == 0
    assert load_recipe(tmp_path / "my.yaml").data.root == images
    assert init("any/plain") == 2
    assert "fgvc init RECIPE FILE" in capsys.readouterr().err
    assert init("--deployed", "net.onnx", tmp_path / "other.yaml") == 2
    assert "--data" in capsys.readouterr().err


def test_init_asks_for_the_labels_of_outputs_that_no_image_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file, out = split_images(tmp_path / "set"), write_file(tmp_path / "net.onnx", SPEC), tmp_path / "my.yaml"
    for split in ("train", "test"):
        shutil.rmtree(images / split / "oak")
    assert init("--deployed", file, "--data", images, out) == 2
    assert "has 5 outputs, and the images are of 4 classes" in capsys.readouterr().err
    assert not list(tmp_path.glob("my.*"))
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    assert init("--deployed", file, "--data", images, out) == 0
