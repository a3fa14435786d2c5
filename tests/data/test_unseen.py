"""Images that may judge a deployed classifier are those that it was not trained on, and copies of none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from fgvc.config.data import SPLITS, FolderData, Split
from fgvc.data.index import ImageIndex
from fgvc.data.sources.read import read_source
from fgvc.data.unseen import FEWEST_TO_CHOOSE, divide_unseen, judged, judged_apart, unseen_rows
from fgvc.errors import FgvcError, NoUnseenImagesError

CLASSES = 4


def picture(seed: int) -> Image.Image:
    """A picture that is a copy of no other."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((48, 40), Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 train and 60 test images a class; of these the first is a train image made smaller, the next two are one, mirrored."""
    root, seed = tmp_path_factory.mktemp("set"), 0
    for k in range(CLASSES):
        for n in range(10):
            save(root / "train" / f"class{k}" / f"{n}.png", picture(1000 + 10 * k + n))
        save(root / "test" / f"class{k}" / "00-copy.jpg", picture(1000 + 10 * k).resize((40, 33)))
        save(root / "test" / f"class{k}" / "01.png", picture(2000 + k))
        save(root / "test" / f"class{k}" / "02.jpg", picture(2000 + k).filter(ImageFilter.GaussianBlur(0.5)))
        for n in range(3, 60):
            save(root / "test" / f"class{k}" / f"{n:02d}.png", picture(seed := seed + 1))
    return root


def read(root: Path, **settings: object) -> ImageIndex:
    return read_source(FolderData(root=root, val_fraction=0.2, **settings))


def names(index: ImageIndex, rows: np.ndarray) -> set[str]:
    return set(index.paths[rows].tolist())


def test_the_sets_own_test_split_is_divided_once_without_copies(folder: Path) -> None:
    index = read(folder)
    assert index.given_splits == ("test",)
    unseen = divide_unseen(index, "train", learned=index.rows("train"))
    assert names(index, unseen.pool.copies) == {f"test/class{k}/00-copy.jpg" for k in range(CLASSES)}
    pool = [*unseen.choose, *unseen.judge, *unseen.pool.copies]
    assert sorted(pool) == index.rows("test").tolist()
    for k in range(CLASSES):
        counts = [int((index.labels[rows] == k).sum()) for rows in (unseen.choose, unseen.judge)]
        assert abs(counts[0] - counts[1]) <= 2, "a half each"
        pair = {f"test/class{k}/01.png", f"test/class{k}/02.jpg"}
        assert pair <= names(index, unseen.choose) or pair <= names(index, unseen.judge)
    again = divide_unseen(read(folder), "train", learned=index.rows("train"))
    np.testing.assert_array_equal(again.judge, unseen.judge)
    assert "4 near copies" in str(unseen)


def test_a_set_with_validation_and_test_has_divided_them_itself(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "own"
    root.mkdir()
    for split, own in (("train", folder / "train"), ("val", folder / "test"), ("test", tmp_path / "more")):
        if split == "test":
            for k in range(CLASSES):
                for n in range(5):
                    save(own / f"class{k}" / f"{n}.png", picture(5000 + 10 * k + n))
            save(own / "class0" / "of-val.jpg", picture(2000).resize((44, 36)))
        (root / split).symlink_to(own)
    index = read(root)
    assert set(index.given_splits) == {"val", "test"}
    unseen = divide_unseen(index, "train", learned=index.rows("train"))
    copy = set(np.flatnonzero(index.paths == "test/class0/of-val.jpg"))
    assert set(unseen.choose) == set(index.rows("val")) - set(unseen.pool.copies) | copy
    assert set(unseen.judge) == set(index.rows("test")) - copy
    assert "val chooses, test judges, but 1 near copy of val" in unseen.named
    assert len(unseen.pool.copies) == CLASSES
    few = replace_split(index, "val", "test", keep=20)
    own, halves = (divide_unseen(few, "train", learned=few.rows("train"), fewest=fewest) for fewest in (1, 100))
    assert len(own.choose) <= 20
    assert min(len(halves.choose), len(halves.judge)) > 100, "so few are not left to choose"


def replace_split(index: ImageIndex, split: Split, other: Split, *, keep: int) -> ImageIndex:
    """The index with all but some images of a split in another one."""
    splits = index.splits.copy()
    splits[index.rows(split)[keep:]] = SPLITS.index(other)
    return dataclasses.replace(index, splits=splits)


def test_images_of_one_group_judge_together(folder: Path) -> None:
    index = read(folder)
    group = np.array(["one plant"] * len(index), dtype=np.dtypes.StringDType())
    unseen = divide_unseen(dataclasses.replace(index, groups=group), "train", learned=index.rows("train"))
    assert not len(unseen.choose)
    assert len(unseen.judge) == len(unseen.pool.rows)
    assert "all of one group" in str(unseen)


def test_a_table_of_images_that_lie_elsewhere_has_a_split_of_its_own(folder: Path) -> None:
    index = read(folder)
    index = dataclasses.replace(index, paths=np.array([f"../{name}" for name in index.paths.tolist()], index.paths.dtype))
    _, where, rule = unseen_rows(index, "train", learned=index.rows("train"))
    assert where == "test"
    assert "the set's own test split" in rule


def test_a_split_that_fgvc_draws_counts_as_seen(folder: Path) -> None:
    index = read(folder / "train", test_fraction=0.3)
    assert len(index.rows("test"))
    assert index.given_splits == ()
    with pytest.raises(NoUnseenImagesError, match="deploy.seen=none") as error:
        divide_unseen(index, "train", learned=index.rows("train"))
    assert error.value.exit_code == 4


def test_none_seen_leaves_all_but_what_is_learned_from(folder: Path) -> None:
    index = read(folder / "train", test_fraction=0.3)
    unseen = divide_unseen(index, "none", learned=index.rows("train"))
    assert not len(unseen.choose)
    assert set(unseen.judge) == {*index.rows("val"), *index.rows("test")}
    assert f"fewer than {FEWEST_TO_CHOOSE}" in str(unseen)


def test_a_list_says_what_was_seen(folder: Path, tmp_path: Path) -> None:
    index = read(folder)
    listed = index.rows("test")[10:]
    file = tmp_path / "seen.txt"
    lines = [str(folder / str(path)) if n % 2 else str(path) for n, path in enumerate(index.paths[listed])]
    file.write_text("\n".join(lines) + "\n")
    rows, _, rule = unseen_rows(index, file, learned=index.rows("train"))
    assert set(rows) == {*index.rows("test")[:10], *index.rows("val")}
    assert f"{len(listed)} images" in rule
    file.write_text("elsewhere/1.png\n")
    with pytest.raises(FgvcError, match="names none of"):
        unseen_rows(index, file, learned=index.rows("train"))
    with pytest.raises(FgvcError, match="can't be read"):
        unseen_rows(index, tmp_path / "none.txt", learned=index.rows("train"))


def test_copies_alone_judge_nothing(folder: Path) -> None:
    index = read(folder)
    copies = [row for row in index.rows("test") if "copy" in str(index.paths[row])]
    rows = np.sort(np.concatenate([index.rows("train"), index.rows("val"), copies]))
    columns = {name: getattr(index, name)[rows] for name in ("paths", "labels", "splits")}
    few = dataclasses.replace(index, **columns)
    with pytest.raises(NoUnseenImagesError, match="near copy"):
        divide_unseen(few, "train", learned=few.rows("train"))


def test_what_is_learned_from_never_judges(folder: Path) -> None:
    index = read(folder)
    learned = np.concatenate([index.rows("train"), index.rows("test")[::2]])
    unseen = divide_unseen(index, "none", learned=learned)
    assert not set(learned) & {*unseen.choose, *unseen.judge}


def test_a_set_with_a_validation_split_of_its_own_and_folds(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name).symlink_to(folder / name)
    for k in range(CLASSES):
        for n in range(4):
            save(tmp_path / "val" / f"class{k}" / f"{n}.png", picture(3000 + 10 * k + n))
    assert read(tmp_path).given_splits == ("val", "test")
    assert read(tmp_path, fold=(0, 5)).given_splits == ("test",), "a fold is drawn from train and validation"


def test_a_chain_of_copies_that_begins_with_a_seen_image_judges_nothing(folder: Path, tmp_path: Path) -> None:
    """What is a copy of a copy goes with it: no image that judges is a near copy of one that is learned from."""
    index = judged_apart(read(folder), "train")
    learned_from, choose, judge = (int((index.splits == k).sum()) for k in range(3))
    assert (learned_from, choose + judge) == (44, 236)
    assert abs(choose - judge) <= 2 * CLASSES, "pairs stay together, so that the halves differ by a pair a class at most"
    assert {str(path) for path in index.paths[index.rows("train")]} >= {f"test/class{k}/00-copy.jpg" for k in range(CLASSES)}
    assert index.unseen == "test (half of them; 4 near copies left out)"
    assert judged(index, "test", 118) == "judged on 118 unseen images of test (half of them; 4 near copies left out)"
    assert judged(index, "val", 118).startswith("chosen by 118 unseen images of test")
    learned = judged_apart(read(folder), "train", hold_out=False)
    assert not len(learned.rows("val"))
    np.testing.assert_array_equal(learned.rows("test"), index.rows("test"))
