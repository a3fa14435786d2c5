"""A run with validation images enough, from eval to a bundle that can say none of these, and compared with that bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper
from PIL import Image

from fgvc import api
from fgvc.cli import show_export
from fgvc.errors import FgvcError
from fgvc.evaluation.calibration import calibrate
from fgvc.exporting.prove import PlainBackbone, ProvedExport
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.predict import predict_files
from fgvc.training import trainer

COLOURS = {"blue": (110, 110, 160), "green": (110, 150, 110), "red": (160, 110, 110)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three colours that are not easy to tell: 16 train, 24 val and 4 test pictures each."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for split, count in (("train", 16), ("val", 24), ("test", 4)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shade = np.array(colour) + rng.normal(0, 30, 3)
                pixels = np.clip(shade + rng.normal(0, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("run")
    tree = {
        "data": {"kind": "folder", "root": str(pictures)},
        "image": {"size": 32},
        "model": {"backbone": "test_efficientnet"},
        "train": {"epochs": 6, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.05, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }
    (place / "own.yaml").write_text(yaml.safe_dump(tree))
    return trainer.train(api.load_recipe(place / "own.yaml"), place / "run")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Exported:
    return api.export(run, tmp_path_factory.mktemp("bundle") / "bundle")


def test_eval_draws_and_tables_what_it_says(run: Path) -> None:
    evaluation = api.evaluate(run, "val")
    assert evaluation.calibrated is not None
    assert evaluation.calibrated.images == 72
    assert evaluation.calibrated.before.ece == pytest.approx(evaluation.scores.ece, abs=1e-5)
    assert evaluation.calibrated.nll == pytest.approx(evaluation.scores.loss, abs=1e-5)
    assert evaluation.calibrated.curve.risk[-1] == pytest.approx(1 - evaluation.scores.top1)
    for name in ("reliability-val", "risk-coverage-val"):
        assert (run / "plots" / f"{name}.png").is_file()
        assert len((run / "tables" / f"{name}.csv").read_text().splitlines()) > 15
    assert api.evaluate(run, "val", views="flip").calibrated is None
    other = api.evaluate(run, "test").calibrated
    assert other is not None
    assert (other.images, other.temperature) == (12, evaluation.calibrated.temperature)


def test_the_bundle_holds_what_validation_says(
    run: Path, exported: api.Exported, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_bundle(exported.bundle).calibration
    assert stored is not None
    answers = load_run(run).answers(load_run(run).index.rows("val"))
    by_torch = calibrate(answers.logits, answers.labels)
    assert stored.temperature == pytest.approx(by_torch.temperature, rel=1e-3)
    assert stored.threshold == pytest.approx(by_torch.threshold, abs=1e-4)
    assert (stored.images, stored.fitted_on, stored.keep) == (72, "val", 0.95)
    predict_files(exported.bundle, [pictures / "val"], as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = [row["predictions"][0]["label"] == Path(row["path"]).parent.name for row in rows]
    lost = sum(row["rejected"] for row, good in zip(rows, right, strict=True) if good)
    assert lost == max(0, math.floor(0.05 * (sum(right) + 1)) - 1)
    assert all(row["rejected"] == (row["predictions"][0]["probability"] < stored.threshold) for row in rows)


def test_what_ships_is_what_was_proved(
    run: Path, exported: api.Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (exported.bundle / "model.onnx").read_bytes() == exported.proven.model
    proven = dict(exported.proven.contract) | {"deployed": None}
    assert load_bundle(exported.bundle).contract == json.loads(json.dumps(proven))
    monkeypatch.setattr(PlainBackbone, "prove", lambda *_: exported.proven)  # the same once more takes long
    api.export(run, tmp_path / "b", keep=1)
    changed = {p.name for p in exported.bundle.iterdir() if p.read_bytes() != (tmp_path / "b" / p.name).read_bytes()}
    assert changed == {"calibration.json", "manifest.json"}
    again, first = load_bundle(tmp_path / "b").calibration, load_bundle(exported.bundle).calibration
    assert again is not None
    assert first is not None
    assert again.threshold == 0
    assert first.threshold > 0
    assert again.temperature == first.temperature
    with pytest.raises(FgvcError, match="--keep"):
        api.export(run, tmp_path / "c", keep=0)


def test_no_calibration_of_what_is_no_number_or_no_image(
    run: Path,
    exported: api.Exported,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sick = onnx.load_from_string(exported.proven.model)
    (last,) = (i for i in sick.graph.initializer if list(i.dims) == [3])
    last.CopyFrom(numpy_helper.from_array(np.full(3, np.nan, np.float32), last.name))
    proven = replace(exported.proven, model=sick.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr(PlainBackbone, "prove", lambda *_: proven)
        with pytest.raises(FgvcError, match="run: gives logits that are no numbers"):
            api.export(run, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    batches: list[np.ndarray] = []
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, symlinks=True)
    (bare / "calibration.json").unlink()

    def prove(contract: PlainBackbone, net: object, images: Iterable[np.ndarray]) -> ProvedExport:
        batches.extend(images)
        return exported.proven

    stored = {path: path.read_bytes() for path in (pictures / "val").rglob("*.png")}
    try:
        for path in stored:
            path.write_bytes(b"no picture".ljust(path.stat().st_size))  # of another size it would be refused
        monkeypatch.setattr(PlainBackbone, "prove", prove)
        without = api.export(bare, tmp_path / "c")
        with_one = api.export(run, tmp_path / "d")
        with pytest.raises(FgvcError, match="none of the 72 images"):
            api.export(run, tmp_path / "e", keep=0.5)
    finally:
        for path, content in stored.items():
            path.write_bytes(content)
    # The training images; what has no temperature is refused before the proof.
    assert sum(len(batch) for batch in batches) == 2 * 48
    assert without.calibration.calibration is None
    assert load_bundle(without.bundle).calibration is None
    show_export.contract(without)
    out = capsys.readouterr().out
    assert "not calibrated: none is kept, and the validation split can't be read (none of the 72 images" in out
    calibration = with_one.calibration.calibration
    assert load_bundle(with_one.bundle).calibration == calibration, "it is these weights', asked again or not"
    assert calibration is not None


def test_next_to_no_right_answer_kept(
    run: Path, exported: api.Exported, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainBackbone, "prove", lambda *_: exported.proven)
    api.export(run, tmp_path / "b", keep=1e-12)
    comparison = api.compare(exported.bundle, tmp_path / "b", data=str(pictures), split="val")
    (some, _), (most, lost) = comparison.rejections()
    assert some < most
    assert lost == comparison.paired.b_right.sum() - 1  # all but the surest


def test_a_run_and_its_bundle_say_the_same(run: Path, exported: api.Exported, pictures: Path) -> None:
    comparison = api.compare(run, exported.bundle)
    assert (comparison.split, comparison.paired.images, comparison.paired.p) == ("val", 72, 1)
    assert comparison.flips() == []
    assert comparison.notes == ()
    np.testing.assert_array_equal(*comparison.predicted)
    learnt = api.compare(exported.bundle, run, data=str(pictures / "train"))
    assert learnt.notes == (f"{run} was trained on 48 of these 48 images, which favours it",)
    assert api.compare(run, run, split="test").paired.images == 12
