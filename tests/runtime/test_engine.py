import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fgvc.cli.app import main
from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.runtime.bundle import Bundle, load_bundle, write_bundle
from fgvc.runtime.engine import Engine, OnnxSession, available_cpus, softmax
from fgvc.runtime.predict import predict_files

SIZE = 8
# Logits are the mean red, green and blue of the image, times ten.
WEIGHT = (10 * np.eye(3)).astype(np.float32)


def network(batch: int | str = "batch", size: int = SIZE, classes: int = 3) -> bytes:
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [numpy_helper.from_array(WEIGHT[:, :classes], "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def bundle(folder: Path, model: bytes, calibration: Calibration | None = None) -> Bundle:
    plain = Preprocess(size=(SIZE, SIZE), resize="squash", crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    files = {
        "model.onnx": model,
        "labels.json": ["red", "green", "blue"],
        "preprocess.json": plain,
        "contract.json": {"num_classes": 3},
        "metrics.json": {},
    } | ({"calibration.json": calibration} if calibration else {})
    write_bundle(folder, files=files)
    return load_bundle(folder)


@pytest.mark.parametrize("batch", ["batch", 1, 2, 4])
def test_colours_get_their_names_and_the_probabilities_worked_by_hand(tmp_path: Path, batch: int | str) -> None:
    engine = Engine(bundle(tmp_path / "b", network(batch)), threads=1)
    images = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (0, 51, 255), (0, 0, 0))]
    answers = engine.classify(images, top_k=2)
    assert not any(answer.rejected for answer in answers)
    red, blue, black = (answer.predictions for answer in answers)
    assert [(p.label, p.index) for p in red] == [("red", 0), ("green", 1)]  # equal ones in the labels' order
    assert red[0].probability == pytest.approx(np.e**10 / (np.e**10 + 2))
    assert [(p.label, p.index) for p in blue] == [("blue", 2), ("green", 1)]
    assert blue[1].probability == pytest.approx(np.e**2 / (1 + np.e**2 + np.e**10), rel=1e-5)  # 51/255 * 10 = 2
    assert [p.probability for p in black] == pytest.approx([1 / 3, 1 / 3])
    assert engine.classify([]) == []
    assert engine.session.threads == 1


CALIBRATION = Calibration(
    temperature=2.0, threshold=0.5, keep=0.95, fitted_on="val", images=80, nll_before=1, nll_after=1, ece_before=0.2,
    ece_after=0.1, kept=0.95, coverage=0.9, accuracy=0.8,
)  # fmt: skip


def test_temperature_and_threshold_of_the_bundle_worked_by_hand(tmp_path: Path) -> None:
    engine = Engine(bundle(tmp_path / "b", network(), CALIBRATION), threads=1)
    images = [Image.new("RGB", (20, 10), colour) for colour in ((255, 0, 0), (51, 0, 0), (0, 0, 0))]
    red, dim, black = engine.classify(images, top_k=3)
    assert red.predictions[0].probability == pytest.approx(np.e**5 / (np.e**5 + 2))  # logits 10, 0, 0 at temperature 2
    assert dim.predictions[0].probability == pytest.approx(np.e / (np.e + 2), rel=1e-5)  # 51/255 * 10 / 2 = 1
    assert [answer.rejected for answer in (red, dim, black)] == [False, False, True]
    assert [p.label for p in black.predictions] == ["red", "green", "blue"]  # the nearest are named all the same
    np.testing.assert_allclose(engine.logits(np.ones((1, 3, SIZE, SIZE), np.float32)), [[10, 10, 10]])  # as exported


def test_predict_says_none_of_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, colour in (("black", (0, 0, 0)), ("red", (255, 0, 0))):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{name}.png")
    pictures = [tmp_path / "black.png", tmp_path / "red.png"]
    bundle(tmp_path / "with", network(), CALIBRATION)
    bundle(tmp_path / "without", network())
    assert predict_files(tmp_path / "with", pictures, top_k=2) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{pictures[0]}\tnone of these (red 33.3 %, green 33.3 %)\tcalibrated",
        f"{pictures[1]}\tred 98.7 %\tgreen 0.7 %\tcalibrated",
    ]
    predict_files(tmp_path / "without", pictures)
    assert capsys.readouterr().out.splitlines() == [
        f"{pictures[0]}\tred 33.3 %\tnot calibrated", f"{pictures[1]}\tred 100.0 %\tnot calibrated"
    ]  # fmt: skip
    for name, expected in (("with", [True, False]), ("without", [False, False])):
        predict_files(tmp_path / name, pictures, as_json=True)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["rejected"] for row in rows] == expected
        assert [row["calibrated"] for row in rows] == [name == "with"] * 2
        assert [row["predictions"][0]["label"] for row in rows] == ["red", "red"]


def bad_network(value: float) -> bytes:
    """NaN for all classes of an image whose red is full, and infinite where `value` is: of others as `network`."""
    model = onnx.load_from_string(network())
    model.graph.node[-1].output[0] = "plain"
    limit, loss = np.array([9.99, 99, 99], np.float32), np.array(value, np.float32)
    model.graph.initializer.extend([numpy_helper.from_array(limit, "limit"), numpy_helper.from_array(loss, "loss")])
    model.graph.node.extend([
        helper.make_node("Greater", ["plain", "limit"], ["full"]),
        helper.make_node("Where", ["full", "loss", "plain"], ["logits"]),
    ])  # fmt: skip
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("calibration", [None, CALIBRATION])
def test_logits_that_are_no_numbers_are_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, calibration: Calibration | None
) -> None:
    engine = Engine(bundle(tmp_path / "bad", bad_network(value), calibration), threads=1)
    dark, red = Image.new("RGB", (20, 10), (0, 0, 51)), Image.new("RGB", (20, 10), (255, 0, 0))
    assert engine.classify([dark])[0].predictions[0].label == "blue"
    with pytest.raises(FgvcError, match=r"bad: gives logits that are no numbers"):
        engine.classify([dark, red])
    red.save(tmp_path / "red.png")
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(tmp_path / "bad"), str(tmp_path / "red.png"), *options])
        captured = capsys.readouterr()
        assert (ended.value.code, captured.out) == (2, "")
        assert "bad: gives logits that are no numbers" in captured.err


def test_a_file_named_twice_is_answered_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle(tmp_path / "b", network())
    red, blue, broken = (tmp_path / name for name in ("red.png", "blue.png", "broken.png"))
    Image.new("RGB", (20, 10), (255, 0, 0)).save(red)
    Image.new("RGB", (20, 10), (0, 0, 255)).save(blue)
    broken.write_bytes(b"no picture")
    assert predict_files(tmp_path / "b", [red, broken, blue, red, broken]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"{path}\t{name} 100.0 %\tnot calibrated" for path, name in ((red, "red"), (blue, "blue"), (red, "red"))
    ]
    assert captured.err.count("broken.png") == 2


def test_a_fixed_batch_gives_the_same_rows_as_a_dynamic_one() -> None:
    x = np.random.default_rng(0).random((7, 3, SIZE, SIZE), dtype=np.float32)
    np.testing.assert_allclose(OnnxSession(network(4)).logits(x), 10 * x.mean((2, 3)), rtol=1e-5)
    assert OnnxSession(network(4)).logits(x).shape == (7, 3)


def test_a_model_that_does_not_fit_the_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match=r"takes images of .*16.*makes .*8"):
        Engine(bundle(tmp_path / "size", network(size=16)))
    with pytest.raises(FgvcError, match=r"gives \(2,\) logits for 3 labels"):
        Engine(bundle(tmp_path / "classes", network(classes=2)))
    with pytest.raises(FgvcError, match="onnxruntime can't load it"):
        Engine(bundle(tmp_path / "broken", b"not a model"))
    with pytest.raises(FgvcError, match=r"takes images of shape \(3, 8, 8\), not \(3, 8, 9\)"):
        OnnxSession(network()).logits(np.zeros((1, 3, 8, 9), np.float32))


def test_softmax_survives_large_logits() -> None:
    p = softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], np.float32))
    np.testing.assert_allclose(p, [[0.5, 0.5], [0.0, 1.0]])


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
def test_cpus_without_control_groups_are_the_affinity(tmp_path: Path) -> None:
    assert available_cpus(root=tmp_path) == 8
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    assert available_cpus(root=tmp_path) == 8


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("max 100000", 8),
        ("9900000 100000", 8),
        ("junk", 8),
        ("1 0", 8),
    ],
)
def test_cpus_by_the_quota_of_version_2(tmp_path: Path, text: str, cpus: int) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", text + "\n")
    assert available_cpus(root=tmp_path) == cpus


@pytest.mark.usefixtures("eight")
def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/kube/pod/box\n")
    write(tmp_path, "sys/fs/cgroup/kube/pod/box/cpu.max", "max 100000")
    write(tmp_path, "sys/fs/cgroup/kube/pod/cpu.max", "300000 100000")
    write(tmp_path, "sys/fs/cgroup/kube/cpu.max", "600000 100000")
    assert available_cpus(root=tmp_path) == 3


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("place", ["cpu,cpuacct/docker/abc", "cpu,cpuacct", "cpu"])
def test_cpus_by_the_quota_of_version_1(tmp_path: Path, place: str) -> None:
    groups = ["12:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc", "3:cpuset:/docker/abc", "0::/x"]
    write(tmp_path, "proc/self/cgroup", "\n".join(groups))
    write(tmp_path, f"sys/fs/cgroup/{place}/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, f"sys/fs/cgroup/{place}/cpu.cfs_period_us", "100000\n")
    assert available_cpus(root=tmp_path) == 8
    write(tmp_path, f"sys/fs/cgroup/{place}/cpu.cfs_quota_us", "400000\n")
    assert available_cpus(root=tmp_path) == 4


@pytest.mark.usefixtures("eight")
def test_the_session_takes_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.runtime.engine.available_cpus", lambda: 3)
    assert OnnxSession(network()).threads == 3


def test_serving_imports_nothing_of_training() -> None:
    heavy = {"torch", "torchvision", "timm", "albumentations", "cv2", "matplotlib", "onnx"}
    code = f"import sys, fgvc.runtime.engine, fgvc.runtime.bundle; print({heavy} & set(sys.modules))"
    home = str(Path(__file__).resolve().parents[2])
    process = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=False)
    assert (process.stdout.strip(), process.stderr) == ("set()", "")
