"""A deployed file that a run is written into has the temperature in its last layer: same answers, calibrated probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image

from fgvc import api
from fgvc.cli import show
from fgvc.cli.app import main
from fgvc.config.recipe import Recipe
from fgvc.evaluation.paired import Gate
from fgvc.exporting.temperature import divide_last
from fgvc.models.onnxnet.net import open_onnx
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from tests.e2e.test_deployed_file import SPEC, outside, saved, sigmoid, tree
from tests.evaluation.test_judging import COLOURS, draw
from tests.models.onnxnet import small
from tests.trained import Once


def softmaxed() -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in small.weights().items()]
    return small.model([*small.layers("logits"), helper.make_node("Softmax", ["logits"], ["scores"], axis=1)], tensors)


@pytest.fixture(scope="module", params=["logits", "softmax"])
def run(request: pytest.FixtureRequest, once: Once) -> Path:
    """A run of a file that ends in logits or softmax, with 210 unseen pictures, of which half choose and fit a temperature."""

    def make(folder: Path) -> None:
        draw(folder / "train", COLOURS, 4, 5000)
        draw(folder / "test", COLOURS, 70, 0)

    pictures = once.made("divided pictures", make)
    model = small.plain() if request.param == "logits" else softmaxed()
    folder = once.made(f"deployed/divided {request.param}", lambda folder: saved(model, folder))
    (folder / "preprocess.json").write_text(json.dumps(SPEC))
    settings = tree(folder / "deployed.onnx", pictures, train={"epochs": 6, "max_steps": None})
    return once.run(Recipe.model_validate(settings), name=f"divided-{request.param}")


def answers(model: Path, index: object, rows: np.ndarray) -> np.ndarray:
    """By onnxruntime itself."""
    images = [Image.open(index.path(row)).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR) for row in rows]  # type: ignore[attr-defined]
    x = ((np.stack([np.asarray(image) for image in images]) / 255 - 0.5) / 0.5).astype(np.float32).transpose(0, 3, 1, 2)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": x})[0].astype(np.float64)


def test_the_temperature_is_in_the_payload_of_the_last_layer(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show.console.width = 300
    for name, options in (("with", ["--stack-threshold", "0.5"]), ("without", ["--no-temperature"])):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(run), "-o", str(tmp_path / name), *options])
        assert ended.value.code == 0
    output = capsys.readouterr().out
    divided, plain = load_bundle(tmp_path / "with"), load_bundle(tmp_path / "without")
    t = divided.contract["temperature"]["divided_by"]
    assert t != 1
    assert f"its last layer is divided by {t:.3f}: fitted on" in output
    assert plain.contract["temperature"]["divided_by"] == 1
    file = next((run / "deployed").glob("*.onnx"))
    assert outside(divided.model) == outside(plain.model) == outside(file), "payloads alone differ"
    assert api.verify(divided.folder).passed
    assert api.verify(divided.folder, into=file).passed
    tensors = [{each.name: numpy_helper.to_array(each) for each in onnx.load(str(bundle.model)).graph.initializer}
               for bundle in (divided, plain)]  # fmt: skip
    for name, value in tensors[1].items():
        expected = value.astype(np.float64) / t if name.startswith("head") else value
        np.testing.assert_allclose(tensors[0][name], expected, rtol=2e-7)
    index = load_run(run).index
    rows = index.rows("test")
    ours, theirs = (answers(bundle.model, index, rows) for bundle in (divided, plain))
    assert np.array_equal(ours.argmax(1), theirs.argmax(1)), "the same answers"
    assert divided.calibration is not None
    assert plain.calibration is not None
    assert (divided.calibration.temperature, plain.calibration.temperature) == (1, pytest.approx(t))
    assert divided.calibration.calibrated
    assert divided.calibration.threshold == plain.calibration.threshold
    pair = api.compare(divided.folder, plain.folder, data=str(index.root))
    np.testing.assert_allclose(*pair.confidence, atol=1e-5)  # what fgvc says of either is the same
    page = api.report([run], tmp_path / "page.html", bundles=[divided.folder], images=1).read_text()
    assert "These are this run's weights" in page


def test_what_a_threshold_of_the_stack_accepts_is_on_the_page(run: Path, tmp_path: Path) -> None:
    exported = api.export(run, tmp_path / "bundle", stack_threshold=0.4)
    assert exported.stack is not None
    index, t = load_run(run).index, exported.proven.divided_by
    rows = index.rows("test")
    file, bundle = next((run / "deployed").glob("*.onnx")), load_bundle(tmp_path / "bundle")
    softmax = "softmax" in run.name

    def probabilities(model: Path, temperature: float = 1.0) -> np.ndarray:
        z = answers(model, index, rows)
        z = (np.log(z) if softmax else z) / temperature
        p = np.exp(z - z.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True)

    for name, p in (
        ("before", probabilities(file)),
        ("after, without the temperature", probabilities(bundle.model, 1 / t)),
        ("after", probabilities(bundle.model)),
    ):
        accepted = p.max(1) >= 0.4
        row = exported.stack.files[name]
        assert row.coverage == pytest.approx(accepted.mean())
        if accepted.any():
            assert row.precision == pytest.approx((p.argmax(1) == index.labels[rows])[accepted].mean())
    numbers = bundle.metrics["stack_threshold"]
    assert numbers["images"] == len(rows)
    assert numbers["which"] == f"judged on {len(rows)} unseen images of test (half of them)"
    page = (run / "reports" / "export.html").read_text()
    assert numbers["which"] in page
    assert "after, without the temperature" in page
    pair = api.compare(file, bundle.folder, data=str(index.root))
    assert [row.coverage for row in pair.accepted(0.4)] == [
        pytest.approx(exported.stack.files[name].coverage) for name in ("before", "after")
    ]


def test_a_sigmoid_is_not_divided_and_what_does_not_scale_stays(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
    net = open_onnx(saved(sigmoid(), tmp_path / "a")).double()
    assert "sigmoid" in divide_last(net, 2.0, x)
    tensors = [numpy_helper.from_array(value, name) for name, value in small.weights().items()]
    tensors.append(numpy_helper.from_array(np.ones(small.CLASSES, np.float32), "more"))
    shifted = small.model([*small.layers("logits"), helper.make_node("Add", ["logits", "more"], ["scores"])], tensors)
    net = open_onnx(saved(shifted, tmp_path / "b")).double()
    before = net(torch.from_numpy(x).double())
    assert "does not scale" in divide_last(net, 2.0, x)
    assert torch.equal(net(torch.from_numpy(x).double()), before)
    net = open_onnx(saved(small.in_constants(), tmp_path / "c")).double()
    before = net(torch.from_numpy(x).double())
    assert divide_last(net, 2.0, x) == ""
    torch.testing.assert_close(net(torch.from_numpy(x).double()), before / 2)


def test_the_ways_to_break_fewer_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show.console.width = 400
    answers = api.compare(next((run / "deployed").glob("*.onnx")), run, preprocess=run / "preprocess.json")
    show.comparison(answers, Gate(max_negative_flips="0").failures(answers.paired) or ["3 negative flips"], 0.5)
    output = capsys.readouterr().out
    assert f"fgvc interpolate {run} --out BETWEEN --share 0.5" in output
    assert f"techniques.distill.teachers='[{{kind: bundle, path: {answers.a.path}}}]'" in output
    assert "accepted from 0.5 on" in output
