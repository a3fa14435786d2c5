"""The images of an improvement: what the deployed file has seen neither chooses nor judges."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest

from fgvc.config.data import CsvData
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError, NoUnseenImagesError
from fgvc.improvement.images import divide, refuse_faulty
from fgvc.improvement.unlabelled import list_unlabelled, write_named
from tests.improvement.conftest import NAMES, draw


def paths(root: Path, table: str, split: str) -> set[str]:
    return {str(root / row["path"]) for row in csv.DictReader(io.StringIO(table)) if row["split"] == split}


def test_a_set_with_a_test_split(pictures: Path, tmp_path: Path) -> None:
    divided = divide(pictures, deployed=True)
    assert divided.counts == {"train": 60, "val": 120, "test": 120}
    assert all("/train/" in path for path in paths(pictures, divided.table(), "train"))
    (tmp_path / "images.csv").write_text(divided.table())
    again = read_source(CsvData(root=pictures, file=tmp_path / "images.csv"))
    assert set(again.given_splits) == {"val", "test"}
    assert [len(again.rows(split)) for split in ("train", "val", "test")] == [60, 120, 120]


def test_a_flat_folder_was_seen(pictures: Path) -> None:
    with pytest.raises(NoUnseenImagesError):
        divide(pictures / "train", deployed=True)


def test_a_flat_folder_and_images_that_were_not_seen(pictures: Path) -> None:
    divided = divide(pictures / "train", deployed=True, unseen=pictures / "test")
    assert divided.counts == {"train": 60, "val": 120, "test": 120}
    chosen = paths(pictures / "train", divided.table(), "val") | paths(pictures / "train", divided.table(), "test")
    assert all(Path(path).is_file() and "/test/" in path for path in chosen)


def test_copies_of_what_is_learned_from_are_left_out(pictures: Path, tmp_path: Path) -> None:
    for name in NAMES:
        for n in range(45):
            draw(tmp_path / "new" / name / f"{n}.png", name, 9000 + 100 * NAMES.index(name) + n)
    copy = pictures / "train" / "red" / "000.png"
    (tmp_path / "new" / "red" / "copy.png").write_bytes(copy.read_bytes())
    divided = divide(pictures / "train", deployed=True, unseen=tmp_path / "new")
    assert sum(divided.counts.values()) == 60 + 225
    assert "1 near cop" in divided.rule


def test_an_unseen_image_that_can_not_be_read_is_not_learned_from(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "set")
    (tmp_path / "set" / "test" / "red" / "000.png").write_bytes(b"no picture")
    divided = divide(tmp_path / "set", deployed=True)
    assert divided.counts == {"train": 60, "val": 120, "test": 119}
    assert "test/red/000.png" not in divided.table()


def test_what_is_asked_before_training_does_not_judge(pictures: Path) -> None:
    divided = divide(pictures, deployed=True)
    asked = {str(pictures / path) for path in divided.unjudged.paths.tolist()}
    assert asked == paths(pictures, divided.table(), "train") | paths(pictures, divided.table(), "val")


def test_two_words_on_what_was_seen_are_too_many(pictures: Path) -> None:
    with pytest.raises(FgvcError, match="give one"):
        divide(pictures / "train", deployed=True, seen="none", unseen=pictures / "test")


def write_judge(bundle: Path, judging: set[str], root: Path) -> None:
    images = {path.removeprefix(f"{root}/"): Path(path).parent.name for path in judging}
    bundle.mkdir()
    (bundle / "judge.json").write_text(json.dumps({"unseen": "the set's own test split", "images": images}))


def test_a_better_file_has_learned_from_all_but_those_that_judged_it(pictures: Path, tmp_path: Path) -> None:
    first = divide(pictures, deployed=True)
    judging = paths(pictures, first.table(), "test")
    write_judge(tmp_path / "bundle", judging, pictures)
    second = divide(pictures, deployed=True, bundle=tmp_path / "bundle")
    assert second.counts == {"train": 180, "val": 0, "test": 120}
    assert paths(pictures, second.table(), "test") == judging
    assert "has learned from the others" in second.rule


def test_images_beside_a_set_are_unseen_where_the_bundle_lists_none_of_them(pictures: Path, tmp_path: Path) -> None:
    train = pictures / "train"
    write_judge(tmp_path / "bundle", {str(next(train.rglob("*.png")))}, train)
    assert divide(train, deployed=True, unseen=pictures / "test", bundle=tmp_path / "bundle").counts["test"] == 120


def test_of_a_flat_folder_with_a_list_all_that_it_names_is_learned_from_and_nothing_else(
    pictures: Path, tmp_path: Path
) -> None:
    flat = pictures / "test"
    names = sorted(str(path.relative_to(flat)) for path in flat.rglob("*.png"))[::12]
    (tmp_path / "seen.txt").write_text("\n".join(names))
    divided = divide(flat, deployed=True, seen=tmp_path / "seen.txt")
    assert paths(flat, divided.table(), "train") == {str(flat / name) for name in names}
    assert divided.counts == {"train": 20, "val": 110, "test": 110}


def test_all_were_collected_after_it_was_trained(pictures: Path) -> None:
    divided = divide(pictures / "test", deployed=True, seen="none")
    assert divided.counts["train"] > 100
    assert divided.counts["test"] > 0


def test_a_net_without_a_file_has_seen_nothing(pictures: Path) -> None:
    divided = divide(pictures / "train", deployed=False)
    assert all(count > 0 for count in divided.counts.values())


def test_without_a_test_split_the_validation_split_judges_a_net(pictures: Path, tmp_path: Path) -> None:
    """ImageNet's layout."""
    (tmp_path / "train").symlink_to(pictures / "train")
    (tmp_path / "val").symlink_to(pictures / "test")
    divided = divide(tmp_path, deployed=False)
    assert divided.counts["test"] == 240
    assert divided.counts["train"] + divided.counts["val"] == 60
    assert divided.counts["val"] == pytest.approx(9, abs=2)
    assert divide(tmp_path, deployed=False, in_folds=True).counts == {"train": 60, "val": 0, "test": 240}


@pytest.mark.parametrize("options", [{"deployed": False}, {"deployed": True, "seen": "none"}])
def test_a_table_names_the_images_of_a_folder_that_has_more(pictures: Path, options: dict, tmp_path: Path) -> None:
    named = [path for path in sorted((pictures / "test").rglob("*.png")) if path.stem < "040"]
    table = "".join(f"{path},{path.parent.name}\n" for path in named)
    (tmp_path / "images.csv").write_text(f"path,label\n{table}")
    draw(tmp_path / "other" / "1.png", "red", 1)
    divided = divide(tmp_path / "images.csv", **options)
    assert sum(divided.counts.values()) == len(named) == 200
    assert divided.counts["test"] > 0


def test_near_copies_of_a_flat_folder_are_in_one_split(pictures: Path, tmp_path: Path) -> None:
    for path in (pictures / "test").rglob("*.png"):
        for copy in ("a", "b"):
            target = tmp_path / path.parent.name / f"{path.stem}{copy}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    divided = divide(tmp_path, deployed=False)
    refuse_faulty(divided)
    assert all(divided.counts.values())


def test_classes_that_the_set_does_not_have(pictures: Path, tmp_path: Path) -> None:
    draw(tmp_path / "new" / "orange" / "1.png", "red", 1)
    draw(tmp_path / "new" / "red" / "1.png", "red", 2)
    with pytest.raises(FgvcError, match="orange"):
        divide(pictures / "train", deployed=True, unseen=tmp_path / "new")


def test_a_set_of_one_class_is_refused(tmp_path: Path) -> None:
    for n in range(3):
        draw(tmp_path / "red" / f"{n}.png", "red", n)
    with pytest.raises(FgvcError):
        divide(tmp_path, deployed=True, seen="none")


def test_images_without_labels_are_no_copies_of_those_that_judge(pictures: Path, tmp_path: Path) -> None:
    divided = divide(pictures, deployed=True)
    for n in range(6):
        draw(tmp_path / "field" / f"{n}.png", "red", 7000 + n)
    judged = next(iter(paths(pictures, divided.table(), "test")))
    (tmp_path / "field" / "judged.png").write_bytes(Path(judged).read_bytes())
    (tmp_path / "field" / "broken.png").write_bytes(b"none")
    listed = list_unlabelled(tmp_path / "field", divided, seed=0)
    assert [Path(path).name for path in listed.paths] == [f"{n}.png" for n in range(6)]
    assert (listed.copies, listed.unreadable, listed.unsampled) == (1, 1, 0)


def test_a_run_names_images_without_labels(better: Path, pictures: Path, tmp_path: Path) -> None:
    for n, name in enumerate(NAMES):
        draw(tmp_path / "field" / f"{n}.png", name, 8000 + n)
    files = sorted((tmp_path / "field").iterdir())
    count = write_named([str(file) for file in files], better / "runs" / "final", better / "images.csv", tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert len(rows) == 300 + count
    assert count >= 4
    answers = {row["path"]: row["label"] for row in rows[300:]}
    assert answers == {str(file): name for file, name in zip(files, NAMES, strict=True) if str(file) in answers}
    assert {row["split"] for row in rows[300:]} == {"train"}


def test_of_few_unseen_images_all_judge(few: Path) -> None:
    divided = divide(few, deployed=True)
    assert divided.counts == {"train": 60, "val": 0, "test": 100}
    assert "none chooses" in divided.rule
