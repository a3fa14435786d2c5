"""Other trainers' names of settings, and keys of other sections, are told what they are called here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgvc.config.loading import load
from fgvc.config.recipe import Recipe
from fgvc.config.usual import MAIN_KEYS, USUAL, settings_of
from fgvc.errors import FgvcError

RECIPE = "data: {root: leaves}\nmodel: {backbone: resnet18}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(RECIPE)
    return path


def refusal(file: Path, setting: str) -> str:
    with pytest.raises(FgvcError) as caught:
        load(Recipe, file, [setting])
    return str(caught.value)


def test_every_name_leads_to_a_setting() -> None:
    assert set(USUAL.values()) <= settings_of(Recipe)
    assert {f"{section}.{key}" for section, key in MAIN_KEYS.items()} <= settings_of(Recipe)


@pytest.mark.parametrize(
    ("override", "key_path"),
    [
        ("epochs=3", "train.epochs"), ("imgsz=64", "image.size"), ("batch=8", "train.batch_size"), ("lr=0.1", "optim.lr"),
        ("img_size=64", "image.size"), ("batch_size=8", "train.batch_size"), ("learning_rate=1", "optim.lr"),
        ("wd=0", "optim.weight_decay"), ("workers=2", "train.workers"), ("amp=true", "train.precision"),
        ("seed=1", "train.seed"), ("lr0=0.1", "optim.lr"), ("bs=4", "train.batch_size"), ("opt=adamw", "optim.name"),
        ("num-workers=2", "train.workers"), ("EPOCHS=2", "train.epochs"), ("epoch=2", "train.epochs"),
        ("epocs=2", "train.epochs"),
        ("optim.epochs=3", "train.epochs"), ("train.lr=1", "optim.lr"), ("train.imgsz=64", "image.size"),
        ("model.pretrained=true", "model.weights"), ("data.path=x", "data.root"), ("mixup=0.2", "techniques.mixup"),
        ("augment.degrees=5", "augment.rotate"), ("smoothing=0.1", "loss.label_smoothing"), ("optim.wd=0", "optim.weight_decay"),
    ],
)  # fmt: skip
def test_a_usual_name_is_told_the_key(file: Path, override: str, key_path: str) -> None:
    key = override.partition("=")[0]
    assert refusal(file, override) == f"override {override!r}: {key}: unknown key; did you mean {key_path}?"


def test_in_a_file_it_has_its_line(file: Path) -> None:
    file.write_text(RECIPE + "epochs: 3\n")
    with pytest.raises(FgvcError) as caught:
        load(Recipe, file)
    assert str(caught.value) == f"{file}:3: epochs: unknown key; did you mean train.epochs?"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("model=resnet50", "did you mean model.backbone=resnet50?"),
        ("model=net.onnx", "did you mean model.onnx=net.onnx?"),
        ("model=best.pth", "did you mean model.weights=best.pth?"),
        ("data=leaves", "did you mean data.root=leaves?"),
        ("loss=focal", "did you mean loss.kind=focal?"),
        ("techniques.mixup=true", "techniques.mixup={} is all of its defaults"),
    ],
)
def test_a_value_in_the_place_of_a_section(file: Path, override: str, hint: str) -> None:
    assert refusal(file, override).endswith(f"; {hint}")


def test_what_is_an_option_or_no_setting_is_told_so(file: Path) -> None:
    assert "--out" in refusal(file, "project=runs")
    assert "the classes are those of the data" in refusal(file, "num_classes=5")
