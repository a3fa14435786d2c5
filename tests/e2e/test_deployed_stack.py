"""A run from a deployed file whose stack is OpenCV's: how it is fed is recorded, and run and bundle answer alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.evaluation.calibration import reliability
from fgvc.images.preprocess import described, fit
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.engine import Engine
from fgvc.training import trainer
from tests.e2e.test_deployed_file import saved, sigmoid, tree
from tests.models.onnxnet import small

STACK = {
    "resize": "pad", "fill": 114, "interpolation": "bilinear", "antialias": False, "channel_order": "bgr", "input_range": 255,
    "crop_pct": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("ending", ["sigmoid", "softmax"])
def test_run_and_bundle_are_fed_and_read_alike(ending: str, colours: Path, tmp_path: Path) -> None:
    file = saved(sigmoid() if ending == "sigmoid" else small.bytes_in(), tmp_path / "given")
    settings = tree(file, colours, cache="disk", cache_dir=str(tmp_path / "cache"))
    settings["deploy"] = STACK | ({"mean": [104, 117, 123], "std": [58, 58, 58]} if ending == "sigmoid" else {})
    settings["loss"] = {"kind": "bce"} if ending == "sigmoid" else {}
    run = trainer.train(Recipe.model_validate(settings), tmp_path / "run")
    api.export(run, tmp_path / "bundle")
    loaded, bundle = load_run(run), load_bundle(tmp_path / "bundle")
    for folder in (run, bundle.folder):
        recorded = json.loads((folder / "preprocess.json").read_text())
        assert (recorded["antialias"], recorded["fill"], recorded["channel_order"]) == (False, [114, 114, 114], "bgr")
        assert recorded["network"]["ending"] == ending
        assert recorded["network"]["layout"] == ("NCHW" if ending == "sigmoid" else "NHWC")
    assert "antialias False" in described(bundle.preprocess)

    pair = api.compare(run, bundle.folder, split="test")
    assert np.array_equal(*pair.predicted)
    np.testing.assert_allclose(pair.confidence[0], pair.confidence[1], atol=1e-5)
    assert pair.differences == ()

    image = Image.open(pair.paths[0])
    x = fit(image.convert("RGB"), bundle.preprocess)[..., ::-1].astype(np.float32)
    x = (x - [104, 117, 123]) / 58 if ending == "sigmoid" else x
    session = onnxruntime.InferenceSession(str(bundle.model))
    fed = x.transpose(2, 0, 1).astype(np.float32) if ending == "sigmoid" else x.astype(np.uint8)
    p = session.run(None, {"image": np.ascontiguousarray(fed)[None]})[0][0].astype(np.float64)
    if bundle.calibration is not None:
        z = np.log(p) - np.log1p(-p) * (ending == "sigmoid")
        z = z / bundle.calibration.temperature
        p = 1 / (1 + np.exp(-z)) if ending == "sigmoid" else np.exp(z) / np.exp(z).sum()
    (answer,) = Engine(bundle).classify([image.convert("RGB")], top_k=5)
    probabilities = {each.index: each.probability for each in answer.predictions}
    np.testing.assert_allclose([probabilities[k] for k in range(5)], p, atol=1e-5)

    measured = api.evaluate(run, split="test")
    answers = loaded.answers(loaded.rows("test"))
    assert answers.ending == ending
    z = answers.logits.astype(np.float64)
    confidence = (1 / (1 + np.exp(-z)) if ending == "sigmoid" else np.exp(z) / np.exp(z).sum(1, keepdims=True)).max(1)
    right = z.argmax(1) == answers.labels
    assert measured.scores.top1 == pytest.approx(right.mean())
    assert measured.scores.ece == pytest.approx(reliability(confidence, right).ece, abs=1e-5)
