"""A run's images are those that it began with, whatever becomes of its data set, and whichever verb asks."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.config.loading import dump, validate
from fgvc.config.recipe import Recipe
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.runs import record as recording
from fgvc.runs.folder import read_run
from fgvc.runs.images import read_index, recorded_images, resumed_index
from fgvc.runs.loaded import load_run
from fgvc.runs.record import NAME, Record
from fgvc.training import trainer
from tests.conftest import COLOURS, paint

TREE = {
    "data": {"kind": "folder"}, "image": {"size": 32}, "model": {"backbone": "test_resnet"}, "optim": {"warmup_epochs": 0.5},
    "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "max_steps": 2},
}  # fmt: skip


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set`, one folder of class folders of 12 pictures each, whose parts fgvc draws; and `run`, two steps on it."""
    place = tmp_path_factory.mktemp("begun")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for i in range(12):
            paint(place / "set" / name / f"{i:02d}.png", colour, seed=100 * number + i, size=(32, 32))
    trainer.train(recipe(TREE, data={"root": str(place / "set")}), place / "run")
    return place


@pytest.fixture
def pictures(tmp_path: Path, place: Path) -> Path:
    return Path(shutil.copytree(place / "set", tmp_path / "set"))


@pytest.fixture
def config(pictures: Path) -> Recipe:
    return recipe(TREE, data={"root": str(pictures)})


@pytest.fixture
def run(tmp_path: Path, place: Path, config: Recipe) -> Path:
    """As if it had been trained on the pictures of this test."""
    shutil.copytree(place / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run/config.yaml").write_text(dump(config))
    return tmp_path / "run"


def longer(base: Recipe, **data: str) -> Recipe:
    return recipe(base.model_dump(mode="json"), data=data, train={"max_steps": 3})


def parts(index: ImageIndex) -> dict[str, int]:
    return dict(zip(index.paths.tolist(), index.splits.tolist(), strict=True))


def net(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / "last" / "net.safetensors")


def add(root: Path, name: str = "blue/new.png") -> None:
    paint(root / name, COLOURS["blue"], seed=999, size=(32, 32))


def test_a_run_records_what_it_began_with(run: Path, tmp_path: Path, config: Recipe, pictures: Path) -> None:
    record = recording.load(run / NAME, pictures)
    assert parts(record.index) == parts(read_index(config))
    assert record.sizes.tolist() == [record.index.path(row).stat().st_size for row in range(36)]


CHANGES: dict[str, Callable[[Path], object]] = {
    "first removed": lambda root: (root / "blue/00.png").unlink(),
    "last removed": lambda root: (root / "red/11.png").unlink(),
    "one added to the first class": add,
    "one added to the last class": lambda root: add(root, "red/zz.png"),
    "renamed": lambda root: (root / "blue/00.png").rename(root / "blue/99.png"),
    "a class added": lambda root: add(root, "amber/00.png"),
    "a class gone": lambda root: shutil.rmtree(root / "red"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_of_a_folder_moves_an_image_of_a_run(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path, change: Callable[[Path], object]
) -> None:
    before = parts(load_run(run).index)
    change(pictures)
    assert parts(load_run(run).index) == before
    with pytest.raises(FgvcError, match=r"are not those that this run began with|can't go on without its images"):
        resumed_index(run, config)


@pytest.mark.parametrize("group", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize(
    "change",
    [lambda r: r[::-1], lambda r: r[1:], lambda r: [*r, ["blue/00.png", "blue", "zz"]], lambda r: r[3:] + r[:3]],
    ids=["reversed", "first removed", "appended", "rotated"],
)
def test_no_change_of_a_table_moves_an_image_of_a_run(
    tmp_path: Path, pictures: Path, change: Callable[[list], list], group: bool
) -> None:
    rows = [
        [str(path.relative_to(pictures)), path.parent.name, f"{path.parent.name}-{int(path.stem) // 3}"]
        for path in sorted(pictures.rglob("*.png"))
    ]

    def write(rows: list) -> None:
        with (pictures / "t.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["path", "label", "group" if group else "other"], *rows])

    write(rows)
    table = {"kind": "csv", "root": str(pictures), "file": "t.csv"}
    config = recipe(TREE | {"data": table})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).write_bytes(Record.of(read_index(config)).dump())
    run = tmp_path / "run"
    before = parts(read_index(config))
    write(change(rows))
    assert parts(recorded_images(run, config).index) == before
    assert parts(resumed_index(run, config, recorded=True)) == before


def test_without_a_picture_of_train_the_score_is_the_same(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = load_run(run).index
    before = api.evaluate(run, "test")
    trained = index.path(index.rows("train")[0])
    trained.unlink()
    add(pictures)
    capsys.readouterr()
    after = api.evaluate(run, "test")
    assert after.scores.numbers() == before.scores.numbers()
    assert np.array_equal(after.right, before.right)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "1 added: blue/new.png" in warnings[0]
    assert "1 gone" in warnings[0]


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_reader_refuses_a_file_of_its_part_and_no_other(
    run: Path, tmp_path: Path, config: Recipe, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = load_run(run).index
    lost = index.path(index.rows("test")[0])
    if how == "gone":
        lost.unlink()
    else:
        lost.write_bytes(lost.read_bytes() + b"\0")
    with pytest.raises(
        FgvcError, match=rf"(?s)1 {'gone' if how == 'gone' else 'of another size'}.*{lost.name}.*--root DIR"
    ):
        api.evaluate(run, "test")
    with pytest.raises(FgvcError, match="--root DIR"):
        api.compare(run, run, split="test")
    with pytest.raises(FgvcError, match="--root DIR"):
        api.report([run], tmp_path / "page.html", split="test")
    assert not (tmp_path / "page.html").exists()
    assert api.evaluate(run, "val").scores.images == 3


def test_a_set_that_moved_is_named(run: Path, tmp_path: Path, config: Recipe, pictures: Path) -> None:
    before = api.evaluate(run, "test").scores.numbers()
    moved = tmp_path / "elsewhere"
    pictures.rename(moved)
    for verb in (
        lambda root: api.evaluate(run, "test", root=root),
        lambda root: api.compare(run, run, root=root),
        lambda root: api.report([run], tmp_path / "page.html", root=root, images=1),
    ):
        with pytest.raises(FgvcError, match="--root DIR"):
            verb(None)
        verb(moved)
    assert api.evaluate(run, "test", root=moved).scores.numbers() == before
    with pytest.raises(FgvcError, match=r"data\.root=DIR"):
        trainer.train(longer(config), run)
    trainer.train(longer(config, root=str(moved)), run)
    assert read_run(run).data.root == moved, "from now on the run knows its place"
    assert api.evaluate(run, "test").scores.images == 7


def test_a_finished_run_is_told_where_its_set_lies_now(run: Path, config: Recipe, pictures: Path, tmp_path: Path) -> None:
    (run / "metrics.json").write_text("{}")
    moved = pictures.rename(tmp_path / "elsewhere")
    there = recipe(config.model_dump(mode="json"), data={"root": str(moved)})
    trainer.train(there, run)
    assert read_run(run).data.root == moved
    assert (run / "metrics.json").exists(), "the weights are the same"
    before = (run / "config.yaml").read_bytes()
    add(moved)
    with pytest.raises(FgvcError, match="1 added"):
        trainer.train(recipe(there.model_dump(mode="json"), train={"workers": 1}), run)
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_goes_on_with_the_recorded_images_only_where_it_is_told_to(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path
) -> None:
    whole = trainer.train(longer(config), tmp_path / "whole")
    add(pictures)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FgvcError, match=r"(?s)1 added: blue/new\.png.*--recorded"):
        trainer.train(longer(config), run)
    assert files == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    trainer.train(longer(config), run, recorded=True)
    for key, value in net(whole).items():
        assert torch.equal(value, net(run)[key]), key
    assert (whole / NAME).read_bytes() == (run / NAME).read_bytes(), "recorded once"


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_the_recorded_images_must_be_there(run: Path, tmp_path: Path, config: Recipe, pictures: Path, how: str) -> None:
    if how == "gone":
        (pictures / "red/03.png").unlink()
    else:
        (pictures / "red/03.png").write_bytes(b"x")
    for recorded in (False, True):
        with pytest.raises(FgvcError, match=r"1 (gone|of another size).*red/03\.png"):
            resumed_index(run, config, recorded=recorded)


def test_a_run_without_a_record_is_drawn_anew_and_says_so(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = api.evaluate(run, "test").scores.numbers()
    recorded = (run / NAME).read_bytes()
    (run / NAME).unlink()
    capsys.readouterr()
    assert api.evaluate(run, "test").scores.numbers() == before
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "no record" in warnings[0]
    with pytest.raises(FgvcError, match="leave --recorded out"):
        trainer.train(longer(config), run, recorded=True)
    add(pictures)
    for verb in (lambda: api.evaluate(run, "test"), lambda: trainer.train(longer(config), run)):
        with pytest.raises(FgvcError, match="trained on"):
            verb()
    (pictures / "blue/new.png").unlink()
    trainer.train(longer(config), run)
    assert (run / NAME).read_bytes() == recorded, "from now on it has one"


def test_a_record_of_another_run_is_refused(run: Path, tmp_path: Path, config: Recipe, pictures: Path) -> None:
    add(pictures)
    other = trainer.train(config, tmp_path / "other")
    shutil.copy(other / NAME, run / NAME)
    with pytest.raises(FgvcError, match="not those that the checkpoint was trained on"):
        trainer.train(longer(config), run)


def test_a_copied_run_is_not_left_where_its_images_are_others(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path
) -> None:
    add(pictures)
    with pytest.raises(FgvcError, match="1 added"):
        trainer.train(longer(config), tmp_path / "copy", resume=str(run))
    assert not (tmp_path / "copy").exists()
    trainer.train(longer(config), tmp_path / "copy", resume=str(run), recorded=True)


def test_one_root_in_other_words_is_the_same(
    run: Path, tmp_path: Path, config: Recipe, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    for spelled in ("set", "./set/../set", str(tmp_path / "link")):
        named = recipe(config.model_dump(mode="json"), data={"root": spelled})
        assert parts(resumed_index(run, named)) == parts(recorded_images(run, config).index)
        assert len(recorded_images(run, config, Path(spelled)).rows("test")) == 7
