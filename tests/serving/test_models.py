"""Names, places, and the exchange of bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fgvc.errors import FgvcError
from fgvc.runtime.bundle import load_bundle, write_bundle
from fgvc.serving import models as module
from fgvc.serving.limits import Refusal
from fgvc.serving.models import ModelRegistry, parse_places
from tests.serving.small import SIZE, save_bundle

X = np.ones((1, 3, SIZE, SIZE), np.float32)


def scale(models: ModelRegistry, name: str) -> float:
    return round(float(models.get(name).engine.logits(X)[0, 0]), 3)


def break_model(folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def test_names_of_models_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_places(["a=x/b", "x/c/", "d=e=f", "鸟=x"]) == {
        "a": Path("x/b"), "c": Path("x/c"), "d": Path("e=f"), "鸟": Path("x"),
    }  # fmt: skip
    assert parse_places(["x/lr=3/b"]) == {"b": Path("x/lr=3/b")}  # a "=" further down is the path's own
    monkeypatch.chdir(tmp_path)
    assert list(parse_places(["."])) == [tmp_path.name]
    for wrong in (["=x"], ["/"], ["a?b=x"], [" =x"], ["a%2f=x"], ["a\n=x"]):
        with pytest.raises(FgvcError, match="is no name for a model"):
            parse_places(wrong)
    with pytest.raises(FgvcError, match="a second model named 'b'"):
        parse_places(["x/b", "y/b"])


def test_a_new_bundle_takes_the_place_and_a_bad_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"a": save_bundle(tmp_path / "a", 1), "b": save_bundle(tmp_path / "b", 1)}
    models = ModelRegistry(places, threads=1)
    first = models.get("a")
    save_bundle(places["a"], 2)
    assert scale(models, "a") == 1
    models.reload(changed_only=True)
    assert (scale(models, "a"), models.reloads) == (2, {"a": 1, "b": 0})
    assert first.engine.logits(X)[0, 0] == 1  # whoever is being answered keeps the one he began with

    save_bundle(places["a"], 3)
    break_model(places["a"])
    for _ in range(3):  # a bad one is tried and counted once
        models.reload(changed_only=True)
    assert (scale(models, "a"), models.failures) == (2, {"a": 1, "b": 0})
    assert "a: not reloaded, the old one goes on" in capsys.readouterr().err
    models.reload()  # unless somebody asks for it
    assert models.failures["a"] == 2
    assert models.reloads == {"a": 1, "b": 1}

    save_bundle(places["a"], 4, explain=False)
    models.reload(changed_only=True)
    assert (scale(models, "a"), models.get("a").explainer) == (4, None)
    assert models.get(None).name == "a"
    with pytest.raises(Refusal, match="no model 'c' here; there are: a, b"):
        models.get("c")


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["green", "red", "蓝"]},
        {"labels": ["red", "green", "blue"]},
        {"preprocess": {"channel_order": "bgr"}},
        {"preprocess": {"mean": (0.5, 0.5, 0.5)}},
        {"preprocess": {"interpolation": "bilinear"}},
        {"preprocess": {"antialias": False}},
    ],
)
def test_a_bundle_that_is_fed_or_read_otherwise_takes_no_place_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    folder = save_bundle(tmp_path / "a", 1)
    models = ModelRegistry({"a": folder}, threads=1)
    any_bundle = ModelRegistry({"a": folder}, threads=1, any_bundle=True)
    save_bundle(folder, 2, **change)
    for changed_only in (True, True, False):
        models.reload(changed_only=changed_only)
        assert (scale(models, "a"), models.get("a").labels[0]) == (1, "red")
    assert (models.failures["a"], models.reloads["a"]) == (2, 0)
    warnings = capsys.readouterr().err
    assert "a: not reloaded, the old one goes on: not a drop-in" in warnings
    assert next(iter(change.get("preprocess", {"labels": 0}))) in warnings
    assert "--any-bundle" in warnings
    any_bundle.reload(changed_only=True)
    assert (scale(any_bundle, "a") != 1, any_bundle.failures["a"]) == (True, 0)

    save_bundle(folder, 3)  # back to what is served
    models.reload(changed_only=True)
    assert (scale(models, "a"), models.reloads["a"]) == (3, 1)


def test_the_same_preprocessing_in_other_words_takes_the_place(tmp_path: Path) -> None:
    models = ModelRegistry({"a": save_bundle(tmp_path / "a", 1)}, threads=1)
    save_bundle(tmp_path / "a", 2, preprocess={"input_range": 255, "std": (255, 255, 255), "fill": (0, 0, 0)})
    models.reload()
    assert (scale(models, "a"), models.failures["a"]) == (2, 0)


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels of one and weights of the other would be a model that nobody proved."""
    folder = save_bundle(tmp_path / "a", 1)
    real, calls = module.load_bundle, 0

    def load(place: Path):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        bundle = real(place)
        if calls == 1:
            save_bundle(folder, 2)  # after the check, before the session
        return bundle

    monkeypatch.setattr(module, "load_bundle", load)
    monkeypatch.setattr(module, "_PAUSE", 0)
    assert scale(ModelRegistry({"a": folder}, threads=1), "a") == 2
    assert calls == 2


def test_a_moment_without_a_bundle_is_waited_for_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, aside = save_bundle(tmp_path / "a", 1), tmp_path / "aside"
    models = ModelRegistry({"a": folder}, threads=1)
    save_bundle(folder, 2).rename(aside)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: aside.exists() and aside.rename(folder))
    models.reload()
    assert (scale(models, "a"), models.failures["a"]) == (2, 0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    folder.rename(aside)
    models.reload()
    assert (scale(models, "a"), models.failures["a"]) == (2, 1)


def test_no_error_of_a_new_bundle_ends_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_bundle(tmp_path / "a", 1)
    models = ModelRegistry({"a": folder}, threads=1)
    save_bundle(folder, 2)
    for error in (MemoryError(), RuntimeError("onnxruntime's own"), PermissionError(13, "no")):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(module, "Engine", fail)
            models.reload()
        assert scale(models, "a") == 1
    assert models.failures["a"] == 3


def test_a_bundle_that_can_not_be_loaded_is_named(tmp_path: Path) -> None:
    folder = save_bundle(tmp_path / "a")
    break_model(folder)
    with pytest.raises(FgvcError, match=r"model\.onnx: is not the file that was exported"):
        ModelRegistry({"a": folder}, threads=1)


def test_a_file_that_ends_otherwise_takes_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its preprocess.json is the same to a letter; the graphs tell."""
    folder = save_bundle(tmp_path / "a", explain=False)
    models = ModelRegistry({"a": folder}, threads=1)
    model = onnx.load_from_string((folder / "model.onnx").read_bytes())
    model.graph.node[-1].output[0] = "z"
    model.graph.node.append(onnx.helper.make_node("Softmax", ["z"], ["logits"], axis=1))
    files = {name: (folder / name).read_bytes() for name in load_bundle(folder).files} | {"model.onnx": model.SerializeToString()}
    write_bundle(folder, files=files, overwrite=True)
    models.reload()
    assert "not a drop-in, the new one's against the old one's: network.ending: softmax against None" in capsys.readouterr().err
    assert models.get("a").engine.session.file.ending is None
