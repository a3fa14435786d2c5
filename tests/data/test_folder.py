import os
from pathlib import Path

import numpy as np
import pytest

from fgvc.config.data import SPLITS, FolderData
from fgvc.config.loading import validate
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.images.suffix import SUFFIXES
from fgvc.runtime.predict import expand


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def rows(index):
    """(split, class, path) of every row."""
    return [
        (SPLITS[s], index.classes[k], str(p)) for s, k, p in zip(index.splits, index.labels, index.paths, strict=True)
    ]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_parts_as_given(tmp_path, val):
    touch(tmp_path, "train/b/1.jpg", "train/a/1.JPG", "train/a/2.png", f"{val}/a/3.webp", "test/b/4.jpeg")
    index = read_source(FolderData(root=tmp_path))
    assert index.classes == ("a", "b")
    assert rows(index) == [
        ("train", "a", "train/a/1.JPG"),
        ("train", "a", "train/a/2.png"),
        ("train", "b", "train/b/1.jpg"),
        ("val", "a", f"{val}/a/3.webp"),
        ("test", "b", "test/b/4.jpeg"),
    ]
    assert "train/, " + val in index.recognised


def test_validation_is_taken_from_train_where_there_is_none(tmp_path):
    touch(tmp_path, *(f"train/{k}/{i}.jpg" for k in "abc" for i in range(20)), *(f"test/{k}/0.jpg" for k in "abc"))
    index = read_source(FolderData(root=tmp_path, val_fraction=0.1))
    assert [len(index.rows(split)) for split in SPLITS] == [54, 6, 3]
    assert all(path.startswith("test/") for path in index.paths[index.rows("test")].tolist())
    assert np.bincount(index.labels[index.rows("val")]).tolist() == [2, 2, 2]
    assert len(read_source(FolderData(root=tmp_path, val_fraction=0)).rows("val")) == 0


def test_one_folder_is_split_in_three_the_same_way_whatever_the_disk_says(tmp_path):
    files = [f"{k}/{i:02d}.jpg" for k in ("oak", "ash") for i in range(50)]
    one = read_source(FolderData(root=touch(tmp_path / "one", *files)))
    two = read_source(FolderData(root=touch(tmp_path / "two", *reversed(files))))
    assert rows(one) == rows(two)
    assert one.classes == ("ash", "oak")
    assert [len(one.rows(split)) for split in SPLITS] == [72, 8, 20]
    assert np.bincount(one.labels[one.rows("test")]).tolist() == [10, 10]
    other = read_source(FolderData(root=tmp_path / "one", split_seed=1))
    assert rows(other) != rows(one)


def test_folders_below_a_class_belong_to_it_and_the_rest_is_left_out(tmp_path):
    touch(
        tmp_path,
        "a/day1/left/1.jpg",
        "a/day2/1.jpg",
        "a/.thumbs/9.jpg",
        "a/.2.jpg",
        "a/notes.txt",
        "b/1.jpg",
        ".git/x.jpg",
    )
    (tmp_path / "empty").mkdir()
    index = read_source(FolderData(root=tmp_path, val_fraction=0, test_fraction=0))
    assert rows(index) == [
        ("train", "a", "a/day1/left/1.jpg"),
        ("train", "a", "a/day2/1.jpg"),
        ("train", "b", "b/1.jpg"),
    ]
    assert index.warnings[0] == "class folders without an image, left out: empty"
    assert index.warnings[1] == "1 files are of other types than fgvc reads, and left out: .txt 1"


def test_a_link_to_a_folder_above_ends(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert len(read_source(FolderData(root=tmp_path))) == 2


def test_explicit_class_order_may_name_classes_without_images(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    index = read_source(FolderData(root=tmp_path, classes=["z", "b", "a"]))
    assert index.classes == ("z", "b", "a")
    assert index.labels.tolist() == [2, 1]
    with pytest.raises(FgvcError, match=r"data\.classes lacks: b"):
        read_source(FolderData(root=tmp_path, classes=["a", "z"]))
    with pytest.raises(FgvcError, match=r"data\.classes has a twice"):
        read_source(FolderData(root=tmp_path, classes=["a", "b", "a"]))


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, "train/1.jpg", "bus/1.jpg")
    assert read_source(FolderData(root=tmp_path)).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["train/a/1.jpg", "test/a/1.jpg", "test/b/1.jpg", "test/c/1.jpg"],
            "test: classes that train/ has no images of: b, c",
        ),
        (["test/a/1.jpg", "val/a/1.jpg"], "has val/, test/ but no train/"),
        (["train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"], "two names for one split"),
        (["train/a/1.jpg", "extra/a/1.jpg"], "and also extra/"),
        (["a/readme.txt", "b/readme.txt"], r"2 class folders would end empty.*a/ \(.txt 1\)"),
        (["1.jpg", "2.jpg"], "no folders in it"),
    ],
)
def test_a_folder_without_classes_is_refused_with_the_layouts(tmp_path, files, words):
    with pytest.raises(FgvcError, match=words):
        read_source(FolderData(root=touch(tmp_path, *files)))


def test_a_real_set():
    if "FGVC_SHARED" not in os.environ:
        pytest.skip("FGVC_SHARED names no folder with coffee-leaf5")
    root = Path(os.environ["FGVC_SHARED"]) / "data" / "coffee-leaf5"
    index = read_source(FolderData(root=root, val_fraction=0))
    assert index.classes == ("cercospora", "healthy", "leaf_miner", "phoma", "rust")
    for split in ("train", "test"):
        files = {f.relative_to(root).as_posix() for f in (root / split).glob("*/*.jpg")}
        assert set(index.paths[index.rows(split)].tolist()) == files


def test_names_that_are_not_utf8_or_break_lines_are_refused_by_name(tmp_path):
    touch(tmp_path / "a", "x/1.jpg", f"y/{os.fsdecode(b'caf')}.jpg")
    (tmp_path / "a/y" / os.fsdecode(b"caf\xe9.jpg")).touch()
    with pytest.raises(FgvcError, match=r"y/caf\\udce9\.jpg: the name is not UTF-8: rename the file"):
        read_source(FolderData(root=tmp_path / "a"))
    for name in (b"two\nlines", b"caf\xe9", b"a\tb"):
        root = tmp_path / os.fsdecode(name)
        touch(root, "x/1.jpg", f"{os.fsdecode(name)}/1.jpg")
        with pytest.raises(FgvcError, match="the class '.*rename it|the name is not UTF-8"):
            read_source(FolderData(root=root))


def test_predict_and_explain_take_the_files_that_a_data_set_takes(tmp_path):
    names = [f"{at}{suffix}" for at, suffix in enumerate(SUFFIXES)]
    touch(
        tmp_path,
        *(f"a/{name}" for name in names),
        "a/UP.JPG",
        "a/notes.txt",
        "a/.hidden.jpg",
        "a/.trash/1.jpg",
        "a/b/1.png",
    )
    index = read_source(FolderData(root=tmp_path, test_fraction=0, val_fraction=0))
    assert sorted(expand([tmp_path])) == sorted(tmp_path / path for path in index.paths.tolist())
    assert len(index) == len(SUFFIXES) + 2


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("TRAINING", "DEV", "TESTING"),
        ("training_set", "validation_set", "test_set"),
        ("Train Images", "eval", "test-data"),
        ("trainset", "Valid", "testset"),
    ],
)
def test_parts_by_other_usual_names(tmp_path, train, val, test):
    touch(tmp_path, f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{val}/a/2.jpg", f"{test}/b/3.jpg")
    index = read_source(FolderData(root=tmp_path))
    assert index.classes == ("a", "b")
    assert [len(index.rows(split)) for split in SPLITS] == [2, 1, 1]
    assert f"{train}/, {val}/, {test}/" in index.recognised


@pytest.mark.parametrize("name", ["train", "Test", "Training", "dev"])
def test_a_class_may_be_called_as_a_part_whatever_its_capitals(tmp_path, name):
    touch(tmp_path, f"{name}/1.jpg", "bus/1.jpg", "car/deep/1.jpg")
    assert set(read_source(FolderData(root=tmp_path)).classes) == {name, "bus", "car"}


def test_parts_within_the_classes_are_refused_and_not_mixed(tmp_path):
    """Whatever `classes` says: the test part would be drawn anew, with training images among it."""
    touch(tmp_path, *(f"{leaf}/{part}/1.jpg" for leaf in ("rust", "scab") for part in ("Training", "test")))
    for classes in (None, ["rust", "scab"]):
        with pytest.raises(FgvcError, match=r"split folders within its classes \(rust/Training/, rust/test/\).*kind=csv"):
            read_source(FolderData(root=tmp_path, classes=classes))
    touch(tmp_path / "days", "bus/test/1.jpg", "bus/may/1.jpg", "car/train/1.jpg")  # of one part, or of none
    assert read_source(FolderData(root=tmp_path / "days")).classes == ("bus", "car")


def test_classes_that_are_written_in_two_ways_are_named(tmp_path):
    touch(tmp_path, *(f"{name}/1.jpg" for name in ("Leaf rust", "leaf_rust", "scab", "caf\u00e9", "cafe\u0301")))
    (warning,) = read_source(FolderData(root=tmp_path, test_fraction=0, val_fraction=0)).warnings
    assert "'Leaf rust' and 'leaf_rust'" in warning
    assert "caf\u00e9" in warning
    assert "scab" not in warning


def test_variants_of_a_set_are_no_classes_unless_they_are_named(tmp_path):
    touch(tmp_path, *(f"{kind}/{leaf}/1.jpg" for kind in ("color", "grayscale") for leaf in ("rust", "scab")))
    with pytest.raises(FgvcError, match=r"same names \(rust, scab\).*data\.root=.*color.*data\.classes=\[color, grayscale\]"):
        read_source(FolderData(root=tmp_path))
    assert read_source(FolderData(root=tmp_path, classes=["color", "grayscale"])).classes == ("color", "grayscale")
    assert read_source(FolderData(root=tmp_path / "color")).classes == ("rust", "scab")
    touch(tmp_path / "in", *(f"train/{kind}/{leaf}/1.jpg" for kind in ("color", "grey") for leaf in ("rust", "scab")))
    with pytest.raises(FgvcError, match="same names"):
        read_source(FolderData(root=tmp_path / "in"))
    touch(tmp_path / "one", "raw/rust/1.jpg", "raw/scab/1.jpg")
    with pytest.raises(FgvcError, match=r"its only folder raw/ .*data\.root=.*one/raw"):
        read_source(FolderData(root=tmp_path / "one"))
    touch(tmp_path / "days", "rust/monday/1.jpg", "rust/friday/1.jpg", "scab/may/1.jpg")
    assert read_source(FolderData(root=tmp_path / "days")).classes == ("rust", "scab")


def test_what_is_left_out_is_counted_by_suffix(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.HEIC", "a/3.heic", "a/noname", "b/1.jfif", "b/x.svg", "b/.hidden.heic", "3.png")
    index = read_source(FolderData(root=tmp_path))
    assert index.paths.tolist() == ["a/1.jpg", "b/1.jfif"]
    assert index.warnings == (
        "4 files are of other types than fgvc reads, and left out: .heic 2, .svg 1, no suffix 1",
        f"{tmp_path}: 1 images lie in it and in no class folder; they are left out",
    )


@pytest.mark.parametrize("files", [["c/1.heic", "c/2.heic"], ["c/1", "c/2"], ["c/1.npy", "c/2.npy"]])
def test_a_class_that_would_end_empty_is_an_error(tmp_path, files):
    touch(tmp_path, "a/1.jpg", "b/1.jpg", *files)
    with pytest.raises(FgvcError, match=r"1 class folders would end empty.*c/ \((\.heic|\.npy|no suffix) 2\)"):
        read_source(FolderData(root=tmp_path))
    touch(tmp_path / "parts", "train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", *(f"test/b/{file[2:]}" for file in files))
    with pytest.raises(FgvcError, match="test/b/"):
        read_source(FolderData(root=tmp_path / "parts"))


def test_predict_says_what_it_leaves_out(tmp_path, capsys):
    touch(tmp_path, "1.jpg", "2.heic", "3.heic")
    assert [path.name for path in expand([tmp_path])] == ["1.jpg"]
    assert "2 files are of other types than fgvc reads: .heic 2" in capsys.readouterr().err
    touch(tmp_path / "none", "2.heic")
    with pytest.raises(FgvcError, match=r"no picture below this folder; .*\.heic 1"):
        list(expand([tmp_path / "none"]))


def test_a_fold_without_images_is_refused(tmp_path):
    touch(tmp_path / "set", *(f"{name}/{number}.png" for name in "ab" for number in range(6)))
    touch(tmp_path / "single", "a/1.png", "b/1.png")

    def validation(fold, root="set", **settings):
        index = read_source(FolderData(root=tmp_path / root, test_fraction=0, fold=fold, **settings))
        return len(index.rows("val"))

    assert sum(validation((fold, 5)) for fold in range(5)) == 12
    assert [validation((fold, 20)) for fold in range(12)] == [1] * 12
    with pytest.raises(FgvcError, match=r"data\.fold: fold 12 has no images, 12 of 20 folds have some \(0, 1, .* of images;"):
        validation((12, 20))
    with pytest.raises(FgvcError, match=r"data\.fold: fold 4 has no images, 4 of 5 folds .*\(0, 1, 2, 3\), for want of groups"):
        validation((4, 5), group_size=3)
    with pytest.raises(FgvcError, match=r"data\.fold: fold 0 has no images, nor has any other, .*leave it out"):
        validation((0, 5), root="single")


def test_photographs_in_a_row_are_groups_that_nothing_divides(tmp_path):
    """Numbered without zeros, in two folders of a class, with gaps; some classes end in a group that is not full."""
    numbers = {"a": [*range(1, 22), 100, 101], "b": [*range(8, 40)], "c": [7, 3, 11, 2]}
    touch(tmp_path, *(f"{name}/DSC_{number}.png" for name, own in numbers.items() for number in own))
    read = read_source(FolderData(root=tmp_path, group_size=4, test_fraction=0, fold=(1, 3)))
    expected = {
        f"{name}/DSC_{number}.png": (name, place // 4)
        for name, own in numbers.items()
        for place, number in enumerate(sorted(own))
    }
    groups: dict[str, set[tuple[str, int]]] = {}
    for path, group in zip(read.paths.tolist(), read.groups.tolist(), strict=True):
        groups.setdefault(group, set()).add(expected[path])
    assert all(len(members) == 1 for members in groups.values())
    assert len(groups) == len(set(expected.values())) == 6 + 8 + 1
    for group in groups:
        assert len(set(read.splits[read.groups == group].tolist())) == 1
    assert set(read.splits.tolist()) == {0, 1}
    assert "by group" in read.recognised
    assert read_source(FolderData(root=tmp_path, test_fraction=0)).groups is None
    with pytest.raises(FgvcError, match="group_size"):
        validate(FolderData, {"kind": "folder", "root": str(tmp_path), "group_size": 1}, where="test")


def test_groups_are_of_a_part_and_a_class(tmp_path):
    touch(tmp_path, *(f"train/{name}/{number:03d}.png" for name in "ab" for number in range(5)))
    touch(tmp_path, *(f"test/{name}/{number:03d}.png" for name in "ab" for number in range(3)))
    read = read_source(FolderData(root=tmp_path, group_size=8, val_fraction=0.5))
    assert sorted(set(read.groups.tolist())) == ["test/a/0", "test/b/0", "train/a/0", "train/b/0"]
    assert [int((read.splits == split).sum()) for split in range(3)] == [10, 0, 6], "a class keeps a row"
