"""Trackers read back: TensorBoard's event files by its own reader, MLflow's database by SQL."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.training import Log
from fgvc.errors import FgvcError
from fgvc.runs import trackers
from fgvc.runs.trackers import TensorBoard, Trackers, scalars_of
from fgvc.training import trainer
from fgvc.training.log import Events
from tests.trained import Once

BOTH = ("tensorboard", "mlflow")
STEPS = 12  # two epochs of 48 images in batches of 8


def recipe(tree: dict, **sections: dict) -> Recipe:
    return validate(Recipe, tree | {"techniques": {"acb": {}, "centre_loss": {}}} | sections, where="test")


@pytest.fixture(scope="session")
def watched(once: Once, colours: Path) -> Path:
    """A run that both trackers watched, that broke in its eighth step, two after its checkpoint, and went on; and its bundle."""
    for package in ("tensorboard", "mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(package)

    def make(folder: Path) -> None:
        config = validate(
            Recipe,
            {
                "data": {"kind": "folder", "root": str(colours)},
                "image": {"size": 32},
                "model": {"backbone": "test_resnet"},
                "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
                "optim": {"lr": 0.02, "warmup_epochs": 0.5, "head_lr_scale": 2},
                "techniques": {"acb": {}, "centre_loss": {}},
                "export": {"exporter": "torchscript"},
                "log": {"to": BOTH, "every_steps": 1},
            },
            where="test",
        )
        real = trainer._check_step

        def breaks(session, losses, out):  # type: ignore[no-untyped-def]
            real(session, losses, out)
            if session.progress.step == 8 and not (folder / "broken").exists():
                (folder / "broken").touch()
                raise RuntimeError("power cut")

        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_TRACKING_URI", raising=False)
            patch.setattr(trainer, "_check_step", breaks)
            with pytest.raises(RuntimeError, match="power cut"):
                trainer.train(config, folder / "run")
            trainer.train(config, folder / "run")
            api.export(folder / "run", folder / "bundle")

    return once.made("watched", make)


def last_events(run: Path) -> dict[int, dict]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return {event["step"]: event for event in events if event["event"] == "step"}


def test_tensorboard_has_every_step_once_and_the_pictures(watched: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(
        str(watched / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0}
    )
    read.Reload()
    tags = read.Tags()
    expected = last_events(watched / "run")
    for tag, key in (("train/loss", "loss"), ("lr/base", "lr")):
        rows = read.Scalars(tag)
        assert [row.step for row in rows] == list(range(1, STEPS + 1))
        np.testing.assert_allclose([row.value for row in rows], [expected[row.step][key] for row in rows], rtol=1e-5)
    terms = {
        "train/centre_loss.centre",
        "epoch/centre_loss.centre",
        "epoch/loss",
        "val/top1",
        "val/loss",
        "lr/x2",
        "lr/x0.1",
    }
    assert terms <= {*tags["scalars"]}
    assert [row.step for row in read.Scalars("val/top1")] == [0, 6, 12]
    assert {*tags["images"]} == {"samples", "curves", "confusion"}
    assert {*tags["tensors"]} == {"recipe/text_summary", "bundle/text_summary"}
    (text,) = read.Tensors("bundle/text_summary")
    assert b"model.onnx" in text.tensor_proto.string_val[0]


def test_mlflow_has_every_step_once_the_recipe_and_the_bundle(watched: Path) -> None:
    with sqlite3.connect(watched / "mlflow.db") as base:
        ((run, name, status, place),) = base.execute("SELECT run_uuid, name, status, artifact_uri FROM runs").fetchall()
        rows = base.execute("SELECT key, step, value FROM metrics ORDER BY key, step").fetchall()
        params = dict(base.execute("SELECT key, value FROM params").fetchall())
    assert (name, status) == ("run", "FINISHED")
    assert json.loads((watched / "run" / "trackers.json").read_text())["mlflow"]["run"] == run
    metrics: dict[str, list[tuple[int, float]]] = {}
    for key, step, value in rows:
        metrics.setdefault(key, []).append((step, value))
    expected = last_events(watched / "run")
    assert metrics["train/loss"] == [(step, expected[step]["loss"]) for step in range(1, STEPS + 1)]
    assert metrics["lr/x2"] == [(step, pytest.approx(2 * expected[step]["lr"])) for step in range(1, STEPS + 1)]
    assert [step for step, _ in metrics["val/top1"]] == [0, 6, 12]
    assert params["model.backbone"] == "test_resnet"
    files = Path(place.removeprefix("file://"))
    assert (files / "config.yaml").read_bytes() == (watched / "run" / "config.yaml").read_bytes()
    for file in (watched / "bundle").iterdir():
        assert (files / "bundle" / file.name).read_bytes() == file.read_bytes()
    assert {path.name for path in (files / "pictures").iterdir()} == {
        "samples.png",
        "curves-12.png",
        "confusion-12.png",
    }
    with Image.open(files / "pictures" / "samples.png") as sheet:
        assert sheet.height > 6 * 40


def test_a_tracker_that_is_turned_on_later_gets_the_past(watched: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "events.jsonl").write_bytes((watched / "run" / "events.jsonl").read_bytes() + b'{"torn')
    messages: list[str] = []
    opened = Trackers(messages.append)
    opened.open(tmp_path, Log(to="tensorboard"), step=9)  # type: ignore[arg-type]
    opened.close("FINISHED")
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [row.step for row in read.Scalars("train/loss")] == list(range(1, 10))
    assert messages == []


class Broken:
    """A tracker that fails in whatever it is asked, and draws from the global generators before."""

    known = True

    def __getattr__(self, name: str) -> object:
        def fails(*_: object) -> None:
            import torch

            torch.rand(3), np.random.rand(3)
            raise OSError(28, "No space left on device")

        return fails


def test_a_tracker_that_fails_is_said_once_and_changes_nothing(
    tmp_path: Path, recipe_tree: dict, once: Once, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tree = recipe_tree | {"model": {"backbone": "test_resnet", "kwargs": {"drop_rate": 0.3}}}
    plain = once.run(validate(Recipe, tree, where="test"))
    monkeypatch.setattr(trainer, "refuse_missing", lambda _: None)
    monkeypatch.setattr(trackers, "TensorBoard", lambda *_: Broken())
    run = trainer.train(validate(Recipe, tree | {"log": {"to": "tensorboard"}}, where="test"), tmp_path / "run")
    assert capsys.readouterr().err.count("WARNING: log.to: tensorboard: OSError") == 1
    weights, expected = (load_file(folder / "ckpt" / "last" / "net.safetensors") for folder in (run, plain))
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert [path.name for path in run.rglob("*trackers*")] == []


def test_a_missing_package_is_an_error_before_anything_is_written(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.NEEDED, "mlflow", ("a_package_that_is_not_there",))
    config = recipe(recipe_tree, log={"to": ["mlflow"]})
    with pytest.raises(FgvcError, match=r"log.to: mlflow needs a package .* pip install 'fgvc\[mlflow\]'"):
        trainer.train(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_that_its_tracker_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "TensorBoard", lambda *_: Broken())
    monkeypatch.setattr(trackers, "refuse_missing", lambda _: None)
    messages: list[str] = []
    logged = SimpleNamespace(log=Log(to="tensorboard"))  # type: ignore[arg-type]
    trackers.log_bundle(tmp_path, logged, tmp_path, messages.append)  # type: ignore[arg-type]
    assert messages == [], "a run that no tracker watched"
    (tmp_path / trackers.NAME).write_text("{}")
    trackers.log_bundle(tmp_path, logged, tmp_path, messages.append)  # type: ignore[arg-type]
    (line,) = messages
    assert "OSError" in line
    assert line.endswith("the bundle is written, and not logged there")


def test_other_ranks_than_the_first_log_nothing(tmp_path: Path, recipe_tree: dict) -> None:
    events = Events(tmp_path, Log(to="tensorboard"), active=False)  # type: ignore[arg-type]
    with events.tracked(recipe(recipe_tree, log={"to": "tensorboard"})):
        assert not events.trackers
        events.write("validated", step=0, val_top1=0.5)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_events() -> None:
    step = {"event": "step", "step": 4, "loss": 0.5, "lr": 0.1, "images_per_second": 9.0, "time": 1.0}
    assert scalars_of(step) == {"train/loss": 0.5, "lr/base": 0.1, "train/images_per_second": 9.0}
    more = scalars_of(step | {"losses": {"loss": 0.5, "centre_loss.centre": 0.2}, "rates": {"base": 0.1, "x2": 0.2}})
    assert more == scalars_of(step) | {"train/centre_loss.centre": 0.2, "lr/x2": 0.2}
    epoch = {
        "event": "epoch",
        "step": 6,
        "epoch": 1,
        "lr": 0.1,
        "loss": 0.4,
        "val_top1": 0.9,
        "val_ece": None,
        "time": 1.0,
    }
    assert scalars_of(epoch) == {"epoch/loss": 0.4, "val/top1": 0.9}
    assert scalars_of({"event": "floor", "top1": 0.5}) == {}


def test_settings_take_one_name_or_a_list() -> None:
    assert Log(to="mlflow").to == ("mlflow",)  # type: ignore[arg-type]
    assert Log(to=None).to == Log(to="none").to == Log().to == ()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tensorboard"):
        Log(to=["wandb"])  # type: ignore[arg-type]


def test_a_picture_is_made_for_a_tracker_alone(tmp_path: Path) -> None:
    messages: list[str] = []
    none = Trackers(messages.append)
    none.picture("samples", lambda: pytest.fail("nobody looks"), 0)
    none._open["tensorboard"] = Broken()  # type: ignore[assignment]

    def fails() -> bytes:
        raise ValueError("no font")

    none.picture("samples", fails, 0)
    assert none, "a picture that can't be made costs no tracker"
    assert messages == ["WARNING: log.to: the picture samples: ValueError: no font; the run goes on without it"]
    assert TensorBoard.__doc__
