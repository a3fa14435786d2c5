"""What fgvc says of a deployed file is what onnxruntime says of the same pictures, to the last one: a loop of PIL and numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.recipe import Recipe
from fgvc.errors import NoUnseenImagesError
from fgvc.runs.loaded import load_run
from tests.e2e.test_deployed_file import NAMES, tree
from tests.models.onnxnet import small

USED = NAMES[:3]
TINTS = ((120, 110, 100), (100, 120, 110), (110, 100, 120))
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
FED: dict[str, dict[str, Any]] = {
    "crop": {
        "resize": "crop", "crop_pct": 0.5, "interpolation": "bicubic", "mean": [0.485, 0.456, 0.406], "std": [0.2, 0.3, 0.25],
    },
    "squash": {"resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", **HALF},
    "pad": {
        "resize": "pad", "crop_pct": 1.0, "interpolation": "lanczos", "mean": [0, 0, 0], "std": [1, 1, 1], "channel_order": "bgr",
    },
}  # fmt: skip


def prepared(path: Path, spec: dict[str, Any], size: int) -> np.ndarray:
    """A picture as the stack makes it, by PIL."""
    image = Image.open(path).convert("RGB")
    method = Image.Resampling[spec["interpolation"].upper()]
    if spec["resize"] == "squash":
        image = image.resize((size, size), method)
    elif spec["resize"] == "crop":
        canvas, (width, height) = int(size / spec["crop_pct"]), image.size
        short = min(width, height)
        image = image.resize((int(canvas * width / short), int(canvas * height / short)), method)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    else:
        scale = size / max(image.size)
        inner = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), method)
        image = Image.new("RGB", (size, size), (114, 114, 114))
        image.paste(inner, ((size - inner.width) // 2, (size - inner.height) // 2))
    x = np.asarray(image, np.float32) / 255
    x = x[:, :, ::-1] if spec.get("channel_order") == "bgr" else x
    return ((x - np.array(spec["mean"], np.float32)) / np.array(spec["std"], np.float32)).transpose(2, 0, 1)


def answered(file: Path, paths: list[Path], spec: dict[str, Any], size: int) -> np.ndarray:
    """The file's numbers (N,K), a picture at a time, by onnxruntime."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: prepared(path, spec, size)[None]})[0] for path in paths])


def pictures(root: Path) -> list[Path]:
    """Pictures of many sizes and shapes, in colour and grey, as PNG and JPEG."""
    rng, paths = np.random.default_rng(0), []
    for number, name in enumerate(USED):
        for n in range(30):
            path = root / name / f"{n:02d}.{'png' if n % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            colour, sides = TINTS[number], rng.integers(9, 60, 2)
            image = Image.fromarray(np.clip(rng.normal(colour, 60, (*sides, 3)), 0, 255).astype(np.uint8))
            (image.convert("L") if n % 5 == 0 else image).save(path, quality=95)
            paths.append(path)
    return paths


def write_net(folder: Path, spec: dict[str, Any], ending: str | None, paths: list[Path]) -> Path:
    """A net that is right about some of the pictures: its last layer is a least-squares fit to them."""
    folder.mkdir(parents=True, exist_ok=True)
    values, file = small.weights(), folder / "deployed.onnx"
    full = {"size": [8, 8], "channel_order": "rgb", "input_range": 1, "fill": [114, 114, 114], **spec}
    (folder / "preprocess.json").write_text(json.dumps(full))
    (folder / "labels.txt").write_text("\n".join(NAMES))

    def save(nodes: list[onnx.NodeProto]) -> None:
        tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
        onnx.save(small.model(nodes, tensors), str(file))

    values["head.weight"], values["head.bias"] = np.eye(len(NAMES), small.WIDTH), np.zeros(len(NAMES))
    save(small.layers())
    features = answered(file, paths, spec, 8)
    labels = np.repeat(np.arange(len(USED)), 30)
    columns = np.column_stack([features, np.ones(len(features))]).astype(np.float64)
    fitted = np.linalg.lstsq(columns, 8 * np.eye(len(USED))[labels], rcond=None)[0].T
    values["head.weight"][: len(USED), : len(NAMES)], values["head.bias"][: len(USED)] = fitted[:, :-1], fitted[:, -1]
    values["head.weight"][len(USED) :], values["head.bias"][len(USED) :] = 0, -20
    last = [] if ending is None else [helper.make_node("Softmax", ["logits"], ["scores"], axis=1)]
    save([*small.layers("scores" if ending is None else "logits"), *last])
    return file


@pytest.mark.parametrize(("kind", "ending"), [("crop", None), ("squash", "softmax"), ("pad", None)])
def test_every_answer_is_onnxruntimes(kind: str, ending: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = FED[kind]
    root = tmp_path / "leaves"
    paths = pictures(root)
    file = write_net(tmp_path / "net", spec, ending, paths)
    scores, labels = answered(file, paths, spec, 8), np.repeat(np.arange(len(USED)), 30)
    classes, right = scores.argmax(1), scores.argmax(1) == labels
    assert 0.4 < right.mean() < 0.97, "or little is shown"

    compared = api.compare(file, file, data=root, seen="none")
    order = {path.resolve(): n for n, path in enumerate(paths)}
    rows = [order[path.resolve()] for path in compared.paths]
    assert sorted(rows) == list(range(len(paths)))
    for predicted in compared.predicted:
        np.testing.assert_array_equal(predicted, classes[rows])
    assert int(compared.paired.a_right.sum()) == int(right.sum())

    evidence = f"it names {100 * right.mean():.1f} % of these rightly, mean loss {mean_loss(scores, labels, ending):.2f}"
    with pytest.raises(NoUnseenImagesError, match=evidence):
        api.compare(file, file, data=root)
    with pytest.raises(SystemExit) as ended:
        main(["init", "--deployed", str(file), "--data", str(root), str(tmp_path / "my.yaml")])
    assert ended.value.code == 4
    assert evidence in capsys.readouterr().err
    settings = tree(file, root, train={"max_steps": 1})
    del settings["deploy"]
    with pytest.raises(NoUnseenImagesError, match=evidence):
        api.train(Recipe.model_validate(settings), tmp_path / "run")

    settings["deploy"] = {"seen": "none"}
    api.train(Recipe.model_validate(settings), tmp_path / "run")
    start = load_run(tmp_path / "run", "start")
    judges = start.rows("test")
    at = [order[start.index.path(row).resolve()] for row in judges]
    torchs = start.answers(judges)
    close = np.sort(scores[at], axis=1)
    sure = close[:, -1] - close[:, -2] > 1e-5  # torch is as near to it as rounding lets it be
    np.testing.assert_array_equal(torchs.logits.argmax(1)[sure], classes[at][sure])
    pair = api.compare(file, tmp_path / "run")
    assert int(pair.paired.a_right.sum()) == int(right[at].sum())


def mean_loss(scores: np.ndarray, labels: np.ndarray, ending: str | None) -> float:
    p = scores.astype(np.float64)
    if ending is None:
        p = np.exp(p - p.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
    return float(-np.log(p[np.arange(len(labels)), labels]).mean())


def test_the_birds(shared: Path, tmp_path: Path) -> None:
    """A real file about pictures that it has not seen, under its preprocessing."""
    source, data = shared / "deployed" / "birds-tf_efficientnet_lite0-torch1.13-opset11.onnx", shared / "data" / "cub50"
    spec = {"resize": "crop", "crop_pct": 0.875, "interpolation": "bicubic", **HALF}
    full = {"size": [160, 160], "channel_order": "rgb", "input_range": 1, "fill": [0, 0, 0], **spec}
    file = tmp_path / "deployed.onnx"
    file.symlink_to(source)
    (tmp_path / "preprocess.json").write_text(json.dumps(full))
    labels = [line.split()[1] for line in (data / "classes.txt").read_text().splitlines()]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    names = [line.split()[1] for line in (data / "images.txt").read_text().splitlines()]
    train = [line.split()[1] == "1" for line in (data / "train_test_split.txt").read_text().splitlines()]
    unseen = [name for name, learned in zip(names, train, strict=True) if not learned]
    for name in unseen[:: len(unseen) // 40]:
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).symlink_to(data / "images" / name)
    paths = sorted((tmp_path / "new").rglob("*.jpg"))
    scores = answered(file, paths, spec, 160)
    compared = api.compare(file, file, unseen=tmp_path / "new")
    assert [path.resolve() for path in compared.paths] == [path.resolve() for path in paths]
    np.testing.assert_array_equal(compared.predicted[0], scores.argmax(1))
    assert 0.5 < compared.paired.a_right.mean() < 0.95
