"""A deployed file is compared on images that it was not trained on, and it is said which and how many."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgvc import api
from fgvc.cli import show
from fgvc.cli.app import main
from fgvc.config.data import FolderData
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.beside import with_folder
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.report.compare import write_page
from fgvc.runs.folder import read_run
from fgvc.runs.images import file_names, first_index
from fgvc.runs.loaded import load_run
from fgvc.runtime.bundle import load_bundle
from tests.data.test_unseen import picture, save
from tests.e2e.test_deployed_file import SPEC, saved, tree
from tests.evaluation.test_side import NAMES, PLAIN, network
from tests.models.onnxnet import small
from tests.trained import Once

COLOURS = ("red", "green", "blue")


def tinted(seed: int, channel: int) -> Image.Image:
    """A picture like no other, in which one channel is the lightest."""
    pixels = np.asarray(picture(seed)) // 3
    pixels[:, :, channel] += 150
    return Image.fromarray(pixels)


def draw(folder: Path, names: tuple[str, ...] | list[str], count: int, seed: int) -> None:
    for channel, name in enumerate(names):
        for n in range(count):
            save(folder / name / f"{n:02d}.png", tinted(seed + 100 * channel + n, channel))


@pytest.fixture(scope="module")
def flat(once: Once) -> Path:
    """Eight pictures of each class that may all have been seen; beside it `new`: 6 of each, the first of them a copy of these."""

    def make(folder: Path) -> None:
        draw(folder / "leaves", NAMES, 8, 0)
        draw(folder / "new", NAMES, 6, 1000)
        for channel, name in enumerate(NAMES):
            save(folder / "new" / name / "00.png", tinted(100 * channel, channel).resize((40, 33)))

    return once.made("judging", make)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A file that is right everywhere, and one that does not see the first class; labels and preprocessing beside them."""
    paths = tmp_path / "old.onnx", tmp_path / "better.onnx"
    for path, lost in zip(paths, (None, 0), strict=True):
        path.write_bytes(network([0, 1, 2], lost=lost))
    (tmp_path / "labels.json").write_text(json.dumps(NAMES))
    (tmp_path / "preprocess.json").write_text(PLAIN.model_dump_json())
    return paths


def compared(*arguments: object) -> int:
    show.console.width = 300
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_a_flat_folder_may_have_been_seen(
    flat: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaves = flat / "leaves"
    assert compared(*files, "--data", leaves) == 4
    message = capsys.readouterr().err
    assert "it names 100.0 % of these rightly, mean loss 0.0" in message
    assert "it has most likely seen them" in message
    for way in ("--seen none", "--seen FILE", "--unseen DIR"):
        assert way in message
    assert compared(*files, "--data", leaves, "--seen", "none") == 0
    assert "judged on 24 unseen images of the set\n" in capsys.readouterr().out
    paths = [path.relative_to(leaves) for path in sorted(leaves.rglob("*.png")) if int(path.stem) < 5]
    (tmp_path / "seen.txt").write_text("\n".join(map(str, paths)))
    assert compared(*files, "--data", leaves, "--seen", tmp_path / "seen.txt") == 0
    assert "judged on 9 unseen images of the set\n" in capsys.readouterr().out
    assert compared(*files, "--data", leaves, "--unseen", flat / "new") == 0
    assert "judged on 15 unseen images of new (3 near copies left out)" in capsys.readouterr().out
    assert compared(*files, "--unseen", flat / "new") == 0
    out = capsys.readouterr().out
    assert "judged on 18 unseen images of new" in out
    assert "near copies of images that were seen are not left out" in out
    assert compared(*files, "--data", leaves, "--split", "test", "--seen", "none") == 2
    assert compared(*files, "--data", leaves, "--unseen", leaves / NAMES[0]) == 2
    assert "lies in" in capsys.readouterr().err


def test_the_test_split_of_a_set_judges_without_copies(flat: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(flat / "leaves", root / "train")
    shutil.copytree(flat / "new", root / "test")
    for sides in (files, files[::-1]):
        answers = api.compare(*sides, data=str(root))
        assert {path.parts[-3] for path in answers.paths} == {"test"}
        assert answers.paired.images == 15
        assert answers.judged == "judged on 15 unseen images of test (3 near copies left out)"
    write_page(answers, tmp_path / "page.html")
    assert answers.judged in (tmp_path / "page.html").read_text()


def test_others_than_deployed_files_have_no_unseen_images(flat: Path, tmp_path: Path) -> None:
    from tests.evaluation.test_side import bundle

    a = bundle(tmp_path / "a", [0, 1, 2])
    assert api.compare(a, a, data=str(flat / "leaves")).judged == ""
    with pytest.raises(FgvcError, match="neither side is one"):
        api.compare(a, a, data=str(flat / "leaves"), seen="none")


@pytest.fixture(scope="module")
def divided(once: Once) -> Path:
    """4 train and 70 test pictures of three classes: enough that some choose."""

    def make(folder: Path) -> None:
        draw(folder / "train", COLOURS, 4, 5000)
        draw(folder / "test", COLOURS, 70, 0)
        save(folder / "test" / "red" / "00.png", tinted(5000, 0).resize((40, 33)))

    return once.made("divided", make)


@pytest.fixture(scope="module")
def begun(once: Once, divided: Path) -> tuple[Path, Path]:
    """A deployed file, and a run that begins with it."""
    folder = once.made("deployed/judged", lambda folder: saved(small.plain(), folder))
    (folder / "preprocess.json").write_text(json.dumps(SPEC))
    file = folder / "deployed.onnx"
    return file, once.run(Recipe.model_validate(tree(file, divided)), name="judged")


def test_what_a_run_set_aside_to_judge_is_what_is_compared(
    begun: tuple[Path, Path], divided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = begun
    index = load_run(run).index
    judge, choose = (file_names(index, index.rows(split)) for split in ("test", "val"))
    assert len(judge) + len(choose) == 209
    assert abs(len(judge) - len(choose)) <= 3
    named = f"{len(judge)} unseen images of test (half of them; 1 near copy left out)"
    for sides in ((file, run), (run, file)):
        answers = api.compare(*sides)
        assert file_names(answers.images, answers.rows) == judge
        assert answers.judged == f"judged on {named}, which {run} set aside to judge"
    (note,) = api.compare(file, run, split="val").notes
    assert "chose between the epochs" in note
    assert api.evaluate(run, "test").judged == f"judged on {named}"
    page = api.report([run], tmp_path / "page.html", images=1)
    assert f"judged on {named}" in page.read_text()
    api.export(run, tmp_path / "bundle")
    show.console.width = 300
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.metrics["judge"] == {"split": "test", "images": len(judge), "which": named.partition(" ")[2]}
    assert bundle.metrics["test"]["judged"] == f"judged on {named}"
    with pytest.raises(FgvcError, match="the set of the run that"):
        api.compare(file, bundle.folder)
    answers = api.compare(file, bundle.folder, data=str(divided))
    assert sorted(file_names(answers.images, answers.rows)) == sorted(judge)
    assert answers.judged == f"judged on {named}, which {bundle.folder} set aside to judge"
    moved = tmp_path / "moved"
    shutil.copytree(divided, moved)
    lost = Path(judge[0]).relative_to(divided)
    (moved / lost).unlink()
    answers = api.compare(file, bundle.folder, data=str(moved))
    assert answers.paired.images == len(judge) - 1
    assert answers.notes[0].startswith(f"1 of the {len(judge)} images that judge")


def test_two_runs_are_judged_by_what_neither_knows(begun: tuple[Path, Path], divided: Path, tmp_path: Path) -> None:
    """A run that learned from some of the test images, by its list of what was seen, leaves others to judge."""
    file, run = begun
    listed = sorted(path.relative_to(divided) for path in (divided / "test").rglob("0*.png"))
    (tmp_path / "seen.txt").write_text("\n".join(map(str, listed)))
    other = api.train(Recipe.model_validate(tree(file, divided, deploy={"seen": str(tmp_path / "seen.txt")})), tmp_path / "other")
    answers = api.compare(run, other)
    indices = [load_run(each).index for each in (run, other)]
    both = set.intersection(*(set(file_names(index, index.rows("test"))) for index in indices))
    assert set(file_names(answers.images, answers.rows)) == both


def test_a_flat_set_with_a_folder_of_unseen_images(begun: tuple[Path, Path], tmp_path: Path) -> None:
    file, _ = begun
    draw(tmp_path / "leaves", COLOURS, 4, 5000)
    draw(tmp_path / "new", COLOURS, 5, 0)
    save(tmp_path / "new" / "red" / "00.png", tinted(5000, 0).resize((40, 33)))
    settings = tree(file, tmp_path / "leaves")
    with pytest.raises(NoUnseenImagesError, match="% of these rightly, mean loss") as refused:
        api.train(Recipe.model_validate(settings), tmp_path / "run")
    assert "deploy.unseen=DIR" in str(refused.value)
    settings["deploy"]["unseen"] = str(tmp_path / "new")
    index = first_index(Recipe.model_validate(settings))
    assert index.unseen == "new (1 near copy left out)"
    assert sorted(index.paths[index.rows("test")].tolist()) == sorted(
        f"../new/{name}/{n:02d}.png" for name in COLOURS for n in range(5) if (name, n) != ("red", 0)
    )
    assert len(index.rows("train")) == 13
    run = api.train(Recipe.model_validate(settings), tmp_path / "run")
    assert read_run(run).deploy.unseen == tmp_path / "new"
    assert api.compare(file, run).judged.startswith("judged on 14 unseen images of new (1 near copy left out)")
    api.export(run, tmp_path / "bundle")
    assert api.compare(file, tmp_path / "bundle", data=str(tmp_path / "leaves")).paired.images == 14
    settings["train"]["epochs"] = 2
    api.train(Recipe.model_validate(settings), run)  # the same images once more


def test_a_folder_beside_a_set_has_its_classes(tmp_path: Path) -> None:
    draw(tmp_path / "set", COLOURS, 3, 0)
    draw(tmp_path / "new", ("red", "grean"), 3, 1000)
    index = read_source(FolderData(root=tmp_path / "set", val_fraction=0, test_fraction=0.4))
    with pytest.raises(FgvcError, match=r"'grean' \(nearest: 'green'\)"):
        with_folder(index, tmp_path / "new")
    (tmp_path / "new" / "grean").rename(tmp_path / "new" / "green")
    joined = with_folder(index, tmp_path / "new")
    assert joined.given_splits == ("test",)
    assert len(joined.rows("test")) == 6, "what fgvc drew is learned from"
    assert {joined.classes[label] for label in joined.labels[-6:]} == {"red", "green"}
    assert all(joined.path(row).is_file() for row in range(len(joined)))


def test_the_images_of_a_run_that_is_no_side(once: Once, recipe_tree: dict) -> None:
    run = once.run(validate(Recipe, recipe_tree, where="test"))
    bundle = once.bundle(run)
    by_name, by_side = api.compare(bundle, bundle, data=str(run)), api.compare(run, bundle)
    assert by_name.paired.images == by_side.paired.images == 12
    assert np.array_equal(by_name.predicted[1], by_side.predicted[1])
    assert by_name.split == by_side.split == "val"
    assert api.compare(bundle, bundle, data=str(run), split="test").split == "test"
