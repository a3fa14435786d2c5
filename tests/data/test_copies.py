"""Near copies of planted pictures stay together in the splits that fgvc draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.data import CsvData
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.quality import copies
from fgvc.data.quality.copies import in_one_split, near_copies, together
from fgvc.data.sources.read import read_source
from fgvc.io.files import cache_folder
from fgvc.runs.images import read_index
from fgvc.training import trainer


def photograph(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((96, 72), Image.Resampling.BICUBIC)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of 20 photographs in one folder, each with a copy: smaller, lightened or mirrored; and a broken file."""
    for number in range(40):
        folder = tmp_path / "set" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = photograph(number)
        picture.save(folder / f"{number:02d}.png")
        changed = (picture.resize((64, 48)), picture.point(lambda v: v * 0.9), picture.transpose(0))[number % 3]
        changed.save(folder / f"{(number * 7) % 40:02d}-copy.jpg", quality=90)
    (tmp_path / "set" / "a" / "broken.png").write_bytes(b"no image")
    return tmp_path / "set"


def recipe(root: Path, **data: object) -> Recipe:
    tree = {
        "data": {"kind": "folder", "root": str(root), "val_fraction": 0.3, **data},
        "model": {"backbone": "test_resnet"},
    }
    return validate(Recipe, tree, where="test")


def pairs_across(index: object) -> int:
    numbers, _ = near_copies(index, np.arange(len(index)))  # type: ignore[arg-type]
    return sum(len(set(index.splits[numbers == number])) > 1 for number in np.unique(numbers))  # type: ignore[attr-defined]


def test_no_copy_lies_on_both_sides(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_draw = read_source(recipe(root).data)
    assert pairs_across(first_draw) > 5, "or nothing is shown"
    index = read_index(recipe(root))
    assert pairs_across(index) == 0
    assert index.joined > 5
    assert f"{index.joined} of these moved to their near copies" in index.recognised
    unmoved = index.splits == first_draw.splits
    assert unmoved.sum() == len(index) - index.joined
    assert all(0.5 < (index.splits == k).sum() / (first_draw.splits == k).sum() < 1.5 for k in range(3))
    assert not any("near copies" in text for text in api.check(recipe(root)).errors)

    def looks(*_: object) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr(copies, "decode_row", looks)
    np.testing.assert_array_equal(read_index(recipe(root)).splits, index.splits)
    assert read_index(recipe(root, copies_together=False)).joined == 0


def test_folds_keep_them_together_too(root: Path) -> None:
    folds = [read_index(recipe(root, fold=[i, 3], test_fraction=0)) for i in range(3)]
    assert [pairs_across(index) for index in folds] == [0, 0, 0]
    validated = np.concatenate([index.rows("val") for index in folds])
    assert len(validated) == len(set(validated.tolist())) == 81, "each picture in one fold"


def test_splits_of_the_set_stay(root: Path, colours: Path) -> None:
    lines = ["path,label,split"]
    for number, file in enumerate(sorted(root.rglob("*.*g"))):
        if file.name != "broken.png":
            lines.append(f"{file.relative_to(root)},{file.parent.name},{('train', 'val', 'test')[number % 3]}")
    (root / "list.csv").write_text("\n".join(lines))
    index = read_source(CsvData(root=root, file=Path("list.csv")))
    assert together(index) is index
    assert pairs_across(index) > 5


def test_a_set_too_large_to_compare_is_warned_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MOST", 80)
    index = read_index(recipe(root))
    assert index.joined == 0
    assert "near copies were not looked for among 81 pictures" in index.warnings[-1]


def test_a_family_of_copies_goes_into_one_split(root: Path) -> None:
    base = read_source(recipe(root).data)
    index = replace(
        base,
        labels=np.array([0, 0, 0, 0, 0, 1, 1, 1], np.int32),
        splits=np.array([0, 1, 1, 0, 1, 0, 1, 1], np.int8),
        paths=base.paths[:8],
    )
    families = np.array([7, 7, 7, 3, 3, 5, 5, 5])
    # The first is in val, then in train; of class 1 there is no other row in train.
    families, index = (
        np.array([7, 7, 7, 3, 3, 5, 5, 5]),
        replace(index, splits=np.array([1, 0, 1, 0, 1, 1, 0, 1], np.int8)),
    )
    np.testing.assert_array_equal(in_one_split(index, families, ["val"]), [1, 1, 1, 0, 0, 0, 0, 0])
    splits = in_one_split(replace(index, splits=np.array([0, 2, 2, 0, 2, 0, 2, 2], np.int8)), families, ["val"])
    np.testing.assert_array_equal(splits, [0, 2, 2, 0, 2, 0, 2, 2])


def test_a_run_goes_on_without_looking(
    root: Path, tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root)}}
    trainer.train(validate(Recipe, tree | {"train": tree["train"] | {"max_steps": 1}}, where="test"), tmp_path / "run")
    for file in (cache_folder() / "copies").iterdir():
        file.unlink()

    def looks(*_: object) -> None:
        raise AssertionError("looked at again")

    monkeypatch.setattr(copies, "decode_row", looks)
    trainer.train(validate(Recipe, tree | {"train": tree["train"] | {"max_steps": 2}}, where="test"), tmp_path / "run")


def test_a_clean_list_is_a_set_of_its_own(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture, recipe_tree: dict
) -> None:
    for split, names in (("train", ("00.png", "02.png", "04.png", "06.png")), ("test", ("08.png", "10.png"))):
        for label in "ab":
            (tmp_path / "own" / split / label).mkdir(parents=True)
            for name in names:
                photograph(int(name[:2]) + ord(label)).save(tmp_path / "own" / split / label / name)
    own = tmp_path / "own"
    photograph(8 + ord("a")).resize((64, 48)).save(own / "train" / "a" / "leak.jpg")  # a near copy of a test picture
    (own / "train" / "a" / "again.png").write_bytes((own / "train" / "a" / "02.png").read_bytes())
    photograph(500).save(own / "train" / "a" / "twice.png")
    photograph(500).save(own / "train" / "b" / "twice.jpg", quality=95)  # with another label
    Image.new("RGB", (60, 50), "green").save(own / "train" / "b" / "flat.png")
    (own / "train" / "b" / "broken.png").write_bytes(b"no image")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_tree | {"data": {"kind": "folder", "root": str(own), "val_fraction": 0}}))
    with pytest.raises(SystemExit):
        main(["data", "check", str(file), "--fail-on", "never", "--write-clean", str(tmp_path / "clean.csv")])
    output = capsys.readouterr().out
    assert "12 of 18 images are in the list" in " ".join(output.split())
    settings = dict(word.split("=", 1) for word in output.partition("to use it: ")[2].split()[:3])
    assert settings.pop("data.kind") == "csv"
    index = read_source(CsvData(root=settings["data.root"], file=settings["data.file"], val_fraction=0))  # type: ignore[arg-type]
    names = sorted(f"{split}/{label}/{n:02d}.png" for split, ns in (("train", (0, 2, 4, 6)), ("test", (8, 10))) for n in ns
                   for label in "ab")  # fmt: skip
    paths = sorted(index.paths.tolist())
    assert paths == sorted(
        "train/a/again.png" if name == "train/a/02.png" and name not in paths else name for name in names
    )
    clean = tmp_path / "clean.yaml"
    data = {"kind": "csv", "root": str(own), "file": str(tmp_path / "clean.csv"), "val_fraction": 0}
    clean.write_text(yaml.safe_dump(recipe_tree | {"data": data}))
    assert api.check(api.load_recipe(clean)).errors == ()
