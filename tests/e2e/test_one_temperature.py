"""One temperature: fitted on validation, kept in the run, and the same wherever a probability of it is shown."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from fgvc import api
from fgvc.cli import show, show_export
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.evaluation.temperature import RECORD, calibration
from fgvc.runs.loaded import load_run, onnx_answers
from fgvc.runtime.engine import OnnxSession
from fgvc.runtime.predict import predict_files
from fgvc.training import trainer
from tests.serving.small import ask, service

COLOURS = {"blue": (90, 90, 170), "green": (90, 160, 90), "red": (170, 90, 90)}


def draw(root: Path, *, test: int, validation: bool = True) -> Path:
    """Three colours, a quarter of the pictures in another's folder, so that no net is right to be sure: 16 train, 24 val and 8
    test pictures each. `test`: the seed of which test pictures lie in which folder."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    for split, count in (("train", 16), ("val", 24), ("test", 8)):
        if split == "val" and not validation:
            continue
        true = np.repeat(np.arange(3), count)
        colours = np.where(rng.random(len(true)) < 0.25, rng.integers(0, 3, len(true)), true)
        if split == "test":
            colours = np.random.default_rng(test).permutation(colours)
        for i, (label, colour) in enumerate(zip(true, colours, strict=True)):
            pixels = np.random.default_rng(1000 * len(split) + i).normal(COLOURS[names[colour]], 40, (40, 40, 3))
            path = root / split / names[label] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return root


def trained(root: Path, out: Path, **data: Any) -> Path:
    tree = {
        "data": {"kind": "folder", "root": str(root), **data},
        "image": {"size": 64},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 5, "batch_size": 8, "workers": 0, "device": "cpu"},
        "select": "last",
        "optim": {"lr": 0.01, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = out.parent / "own.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return trainer.train(api.load_recipe(recipe), out)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"), test=1)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(pictures, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    variants = api.Variants(fp16=True, agreement=0.5)
    return api.export(run, tmp_path_factory.mktemp("bundles") / "bundle", variants=variants).bundle


def recorded(run: Path) -> dict[str, Any]:
    return json.loads((run / RECORD).read_text())["val.last"]


def fitted(place: Path) -> dict[str, dict[str, Any]]:
    """Every fitted number of a run's or bundle's files, by file and selection."""
    numbers: dict[str, dict[str, Any]] = {}
    names = ("temperature", "threshold", "fitted_on")
    for name in (RECORD, "metrics.json"):
        tree = json.loads((place / name).read_text())
        rows = {"": tree} if "temperature" in tree else tree
        numbers |= {
            f"{name} {key}": {k: row.get("calibration", row)[k] for k in names} for key, row in rows.items()
        }
    return numbers


def confidence(z: np.ndarray, t: float) -> np.ndarray:
    return np.exp(z / t - np.logaddexp.reduce(z / t, axis=1, keepdims=True)).max(1)


def calibration_error(z: np.ndarray, right: np.ndarray, t: float) -> float:
    p = confidence(z, t)
    bins = [(p > k / 15) & (p <= (k + 1) / 15) for k in range(15)]
    return sum(abs(p[b].mean() - right[b].mean()) * b.mean() for b in bins if b.any())


def test_a_smaller_file_says_what_the_temperature_is_worth_for_it(run: Path, bundle: Path) -> None:
    opened, loaded = api.load_bundle(bundle), load_run(run)
    assert opened.calibration is not None
    agreement = opened.contract["fp16"]["agreement"]
    for name, model in (("ece_float", opened.model), ("ece", opened.variant("fp16"))):
        index, spec = loaded.index, loaded.preprocess
        answers = onnx_answers(OnnxSession(model), index, index.rows("val"), spec=spec, workers=0)
        z, right = answers.logits.astype(np.float64), answers.logits.argmax(1) == answers.labels
        assert agreement[name] == pytest.approx(calibration_error(z, right, opened.calibration.temperature), abs=1e-6)


def test_the_temperature_is_that_of_least_loss_on_validation(run: Path, bundle: Path) -> None:
    loaded = load_run(run)
    answers = loaded.answers(loaded.index.rows("val"))
    z, y = torch.from_numpy(answers.logits).double(), torch.from_numpy(answers.labels)
    least = minimize_scalar(lambda t: F.cross_entropy(z / t, y).item(), bounds=(0.05, 20), options={"xatol": 1e-9})
    assert recorded(run)["temperature"] == pytest.approx(least.x, rel=1e-4)
    assert 0.05 < least.x < 20
    assert abs(least.x - 1) > 0.1, "there is something to mend"
    right = np.sort(F.softmax(z / least.x, 1).amax(1)[z.argmax(1) == y].numpy())
    place = int(0.05 * (len(right) + 1) + 1e-9)
    assert recorded(run)["threshold"] == pytest.approx(right[place - 1] if place else 0, abs=1e-4)


def test_all_ways_say_one_probability_and_that_it_is_calibrated(
    run: Path, bundle: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pictures / "test/red/017.png"
    temperature = api.evaluate(run, "test").calibrated
    assert temperature is not None
    assert temperature.calibrated
    loaded = load_run(run)
    (row,) = np.flatnonzero([loaded.index.path(n) == picture for n in range(len(loaded.index))])
    logits = loaded.answers(np.array([row])).logits[0].astype(np.float64)
    expected = F.softmax(torch.from_numpy(logits / temperature.temperature), 0).numpy()
    probabilities: dict[str, np.ndarray] = {}
    for name, folder in (("run", run), ("bundle", bundle)):
        capsys.readouterr()
        api.explain(folder, [picture], tmp_path / name, methods=["cam"])
        assert capsys.readouterr().out.rstrip("\n").endswith("\tcalibrated")
        with np.load(tmp_path / name / "maps/017.npz") as arrays:
            probabilities[f"explain {name}"] = arrays["p"]
            assert bool(arrays["calibrated"])
            assert float(arrays["temperature"]) == recorded(run)["temperature"]
    predict_files(bundle, [picture], as_json=True, top_k=3)
    one = json.loads(capsys.readouterr().out)
    answer = ask(service({"b": bundle}), "POST", "/v1/classify", content=picture.read_bytes()).json()
    for name, tree in (("predict", one), ("serve", answer)):
        assert tree["calibrated"] is True
        p = {each["label"]: each["probability"] for each in tree["predictions"]}
        probabilities[name] = np.array([p[label] for label in loaded.classes])
    for name, p in probabilities.items():
        np.testing.assert_allclose(p, expected, atol=1e-4, err_msg=name)
    predict_files(bundle, [picture])
    assert capsys.readouterr().out.rstrip("\n").endswith(" %\tcalibrated") or one["rejected"]
    versus = api.compare(run, bundle, split="test")
    np.testing.assert_allclose(*versus.confidence, atol=1e-4)
    assert versus.rejections()[0] == versus.rejections()[1]
    show.comparison(versus, [])
    assert "probabilities: A calibrated, B calibrated" in capsys.readouterr().out
    page = api.report([run], tmp_path / "page.html", split="test", images=1).read_text(encoding="utf-8")
    assert f"are calibrated: temperature {recorded(run)['temperature']:.3f}, fitted on 72 val images" in page
    assert "%, calibrated<br>" in page


def test_on_test_the_temperature_is_validations_to_the_last_bit(run: Path, bundle: Path) -> None:
    numbers = [recorded(run)[name] for name in ("temperature", "threshold")]
    for split in ("test", "val"):
        evaluation = api.evaluate(run, split)  # type: ignore[arg-type]
        assert evaluation.calibrated is not None
        assert [evaluation.calibrated.temperature, evaluation.calibrated.threshold] == numbers
        row = json.loads((run / "metrics.json").read_text())[f"{split}.last"]["calibration"]
        assert [row["temperature"], row["threshold"]] == numbers
        assert (row["calibrated"], row["fitted_on"], row["fitted_images"]) == (True, "val", 72)
    stored = api.load_bundle(bundle).calibration
    assert stored is not None
    assert [stored.temperature, stored.threshold] == numbers
    loaded = load_run(run)
    answers = loaded.answers(loaded.index.rows("test"))
    z, right = answers.logits.astype(np.float64), answers.logits.argmax(1) == answers.labels
    tested = api.evaluate(run, "test").calibrated
    assert tested is not None
    for side, t in ((tested.before, 1.0), (tested.after, numbers[0])):
        assert side.ece == pytest.approx(calibration_error(z, right, t), abs=1e-6)
    answered = confidence(z, numbers[0]) >= numbers[1]
    assert tested.coverage == pytest.approx(answered.mean())
    assert tested.kept == pytest.approx(answered[right].mean())


def test_other_test_labels_change_no_fitted_number(run: Path, bundle: Path, tmp_path: Path) -> None:
    """The same training and validation pictures, the test split's in one another's folders; the test split is read first."""
    poisoned = trained(draw(tmp_path / "pictures", test=2), tmp_path / "runs/run")
    wrong = api.evaluate(poisoned, "test")
    assert wrong.scores.top1 != api.evaluate(run, "test").scores.top1
    api.evaluate(poisoned, "val")
    api.evaluate(run, "val")
    assert fitted(poisoned) == fitted(run)
    page = api.report([poisoned], tmp_path / "page.html", split="test", images=1).read_text(encoding="utf-8")
    assert f"temperature {recorded(run)['temperature']:.3f}, fitted on 72 val images" in page
    exported = api.export(poisoned, tmp_path / "bundle")
    assert (exported.bundle / RECORD).read_bytes() == (bundle / RECORD).read_bytes()


def test_without_validation_nothing_is_ever_fitted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = trained(draw(tmp_path / "pictures", test=1, validation=False), tmp_path / "runs/bare", val_fraction=0)
    evaluation = api.evaluate(bare, "test")
    assert evaluation.calibrated is not None
    fit = evaluation.calibrated
    assert (fit.calibrated, fit.temperature, fit.threshold) == (False, 1, 0)
    assert fit.before.ece == fit.after.ece
    show.scores(evaluation)
    picture = next((tmp_path / "pictures/test/red").iterdir())
    api.explain(bare, [picture], tmp_path / "out")
    captured = capsys.readouterr()
    assert "not calibrated; the data have no validation split" in captured.out
    assert "bare: its probabilities are not calibrated: the data have no validation split" in captured.err
    assert captured.out.rstrip("\n").endswith("\tnot calibrated")
    exported = api.export(bare, tmp_path / "bundle")
    show_export.contract(exported)
    assert "not calibrated: the data have no validation split" in capsys.readouterr().out
    assert exported.calibration.calibration is None
    predict_files(exported.bundle, [picture], as_json=True)
    assert json.loads(capsys.readouterr().out)["calibrated"] is False
    predict_files(exported.bundle, [picture])
    assert capsys.readouterr().out.endswith("\tnot calibrated\n")
    answer = ask(service({"b": exported.bundle}), "POST", "/v1/classify", content=picture.read_bytes()).json()
    assert answer["calibrated"] is False
    page = api.report([bare], tmp_path / "page.html", images=1).read_text(encoding="utf-8")
    assert "The probabilities on this page are not calibrated: the data have no validation split" in page
    assert not any((place / RECORD).exists() for place in (bare, exported.bundle))


def test_other_weights_have_a_temperature_of_their_own(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    tree = json.loads((copy / RECORD).read_text())
    tree["val.last"] |= {"checkpoint": "0" * 64, "temperature": 7.0}
    (copy / RECORD).write_text(json.dumps(tree))
    assert calibration(load_run(copy)).calibration == calibration(load_run(run)).calibration
    assert recorded(copy) == recorded(run)
    both = [load_run(copy, select) for select in ("last", "best")]
    fits = [calibration(one).calibration for one in both]
    assert set(json.loads((copy / RECORD).read_text())) == {"val.last", "val.best"}
    assert (both[0].identity == both[1].identity) == (fits[0] == fits[1])


def test_a_damaged_record_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    tree = json.loads((copy / RECORD).read_text())
    for value in (0, "warm", None):
        tree["val.last"]["temperature"] = value
        (copy / RECORD).write_text(json.dumps(tree))
        with pytest.raises(FgvcError, match=r"calibration\.json: val\.last: temperature"):
            api.evaluate(copy, "test")


def test_a_file_that_answers_otherwise_is_not_called_calibrated(run: Path, tmp_path: Path, bundle: Path) -> None:
    from fgvc.evaluation.temperature import shipped_calibration

    loaded = load_run(run)
    fit, session = calibration(loaded), OnnxSession(bundle / "model.onnx")
    shipped_calibration(loaded, fit, session)
    assert fit.calibration is not None
    other = fit.calibration.model_copy(update={"nll_before": fit.calibration.nll_before + 0.01})
    with pytest.raises(FgvcError, match="the exported file has a loss of"):
        shipped_calibration(loaded, type(fit)(other), session)


def test_a_run_whose_data_are_gone_keeps_its_temperature(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = next((pictures / "test/red").iterdir())
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(pictures), str(tmp_path / "nowhere")))
    api.explain(copy, [picture], tmp_path / "with")
    assert capsys.readouterr().out.endswith("\tcalibrated\n")
    (copy / RECORD).unlink()
    api.explain(copy, [picture], tmp_path / "without")
    captured = capsys.readouterr()
    assert captured.out.endswith("\tnot calibrated\n")
    assert "copy: its probabilities are not calibrated: none is kept, and the validation split can't be read" in captured.err
    moved = tmp_path / "moved"
    shutil.copytree(pictures, moved)
    api.evaluate(copy, "val", root=moved)  # as the message says
    api.explain(copy, [picture], tmp_path / "again")
    assert capsys.readouterr().out.endswith("\tcalibrated\n")
    assert recorded(copy) == recorded(run)


def test_averaged_views_are_never_called_calibrated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = api.evaluate(run, "test", views="flip")
    assert evaluation.calibrated is None
    show.scores(evaluation)
    assert "not calibrated: no temperature is fitted for averaged views" in capsys.readouterr().out
    row = json.loads((run / "metrics.json").read_text())["test-flip.last"]["calibration"]
    assert row["calibrated"] is False


def test_the_pictures_read_are_those_of_the_loader(run: Path) -> None:
    """The temperature is of what serving sees: the evaluation's own loader, in its order."""
    loaded = load_run(run)
    rows = loaded.index.rows("val")
    batches = evaluation_loader(loaded.index, rows, spec=loaded.preprocess, batch_size=64, workers=0)
    with torch.inference_mode():
        z = torch.cat([loaded.step.net(batch.images) for batch in batches])
    loss = F.cross_entropy(z, torch.from_numpy(loaded.index.labels[rows]).long()).item()
    assert recorded(run)["nll_before"] == pytest.approx(loss, abs=1e-5)


def test_in_a_run_that_can_not_be_written_it_is_computed_and_not_kept(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    (copy / RECORD).unlink()
    whole = os.open

    def read_only(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if str(path).startswith(str(copy)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return whole(path, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", read_only)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    evaluation = api.evaluate(copy, "test")
    assert evaluation.calibrated is not None
    assert evaluation.calibrated.temperature == recorded(run)["temperature"]
    api.explain(copy, [next((pictures / "test/red").iterdir())], tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out.endswith("\tcalibrated\n")
    assert "copy: can't be written (Read-only file system): nothing was stored there" in captured.err
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
