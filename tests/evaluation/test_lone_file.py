"""The stack of a deployed file that states none is asked of its answers about a run's images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgvc.config.data import AutoData
from fgvc.config.images import Preprocess
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.evaluation.lone_file import by_its_answers
from fgvc.runtime.stack import Agreement, Stack, agreement, stack_of
from tests.e2e.test_preprocess import write_file, write_images
from tests.evaluation.test_preprocessing import SIZE, planted

SPEC = planted("0 to 1", "bgr", resize="squash", crop_pct=1.0, interpolation="bilinear")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def verdict_of(run_spec: Preprocess, deployed: Stack, images: Path) -> tuple[Agreement, list[str]]:
    index = read_source(AutoData(root=images, val_fraction=0.0))
    recipe = SimpleNamespace(image=SimpleNamespace(size=SIZE))
    run: Any = SimpleNamespace(folder=images, preprocess=run_spec, index=index, recipe=recipe)
    stated = agreement(Stack(path=images, preprocess=run_spec, labels=tuple(index.classes)), deployed)
    lines: list[str] = []
    return by_its_answers(run, deployed, stated, say=lines.append), lines


def test_a_file_that_is_fed_as_the_run_is_known_by_its_answers(images: Path, tmp_path: Path) -> None:
    deployed = stack_of(write_file(tmp_path / "lone.onnx", SPEC))
    verdict, lines = verdict_of(SPEC, deployed, images)
    assert (verdict.preprocess, verdict.labels, verdict.unproved) == ("the same", "the same", "")
    assert "by its answers about 60 images" in verdict.numbers["answers"]
    assert verdict.answers in lines[-1]


def test_a_file_that_is_fed_otherwise_is_refused_with_both(images: Path, tmp_path: Path) -> None:
    deployed = stack_of(write_file(tmp_path / "lone.onnx", SPEC))
    with pytest.raises(FgvcError, match="is not a drop-in") as refused:
        verdict_of(planted("0 to 1", resize="squash", crop_pct=1.0, interpolation="bilinear"), deployed, images)
    assert "likeliest: size (24, 24), resize squash" in str(refused.value)
    assert "channel_order bgr" in str(refused.value)
    assert "as the run: " in str(refused.value)


def test_outputs_in_another_order_are_refused(images: Path, tmp_path: Path) -> None:
    deployed = stack_of(write_file(tmp_path / "lone.onnx", SPEC, (0, 3, 2, 1, 4)))
    with pytest.raises(FgvcError, match="2 are others: beech"):
        verdict_of(SPEC, deployed, images)


def test_answers_that_do_not_tell_leave_it_unproved(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def knows_nothing(*_: object, **__: object) -> None:
        raise FgvcError("under none of them")

    monkeypatch.setattr("fgvc.evaluation.lone_file.search_file", knows_nothing)
    verdict, lines = verdict_of(SPEC, stack_of(write_file(tmp_path / "lone.onnx", SPEC)), images)
    assert verdict.preprocess == "not known"
    assert verdict.unproved
    assert "under none" in lines[-1]


def test_a_file_that_states_it_is_not_asked(images: Path, tmp_path: Path) -> None:
    file = write_file(tmp_path / "lone.onnx", SPEC)
    (tmp_path / "preprocess.json").write_text(SPEC.model_dump_json())
    assert verdict_of(SPEC, stack_of(file), images)[1] == []
