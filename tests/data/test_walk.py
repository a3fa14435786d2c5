"""A class has the images of its folder and of links to elsewhere; never those of another class."""

import os

import pytest

from fgvc.config.data import FolderData
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from tests.data.test_folder import rows, touch


def read(root):
    return read_source(FolderData(root=root, val_fraction=0, test_fraction=0))


def paths(index, name):
    return [path for _, label, path in rows(index) if label == name]


@pytest.mark.parametrize("target", [".", "..", "../b", "../b/deep", "/"])
def test_a_link_upwards_or_to_a_sibling_brings_nothing(tmp_path, target):
    root = touch(tmp_path / "set", "a/1.jpg", "b/2.jpg", "b/deep/3.jpg")
    (root / "a" / "link").symlink_to(target, target_is_directory=True)
    index = read(root)
    assert paths(index, "a") == ["a/1.jpg"]
    assert paths(index, "b") == ["b/2.jpg", "b/deep/3.jpg"]
    warnings = " ".join(index.warnings)
    assert ("not followed" in warnings and "a/link ->" in warnings) or target == "."


def test_a_link_to_another_disk_is_followed_and_its_loops_end(tmp_path):
    other = touch(tmp_path / "disk", "ash/1.jpg", "ash/deep/2.jpg")
    (other / "ash" / "deep" / "round").symlink_to(other / "ash", target_is_directory=True)
    (other / "ash" / "home").symlink_to(tmp_path / "set", target_is_directory=True)
    root = touch(tmp_path / "set", "a/1.jpg", "b/1.jpg")
    (root / "a" / "more").symlink_to(other / "ash", target_is_directory=True)
    index = read(root)
    assert paths(index, "a") == ["a/1.jpg", "a/more/1.jpg", "a/more/deep/2.jpg"]
    assert "a/more/home ->" in " ".join(index.warnings)


def test_class_folders_may_be_links(tmp_path):
    pool = touch(tmp_path / "pool", "x/1.jpg", "y/2.jpg")
    root = tmp_path / "set"
    root.mkdir()
    for name in "xy":
        (root / name).symlink_to(pool / name, target_is_directory=True)
    assert [path for *_, path in rows(read(root))] == ["x/1.jpg", "y/2.jpg"]
    hidden = touch(tmp_path / "own", ".pool/x/1.jpg", ".pool/y/2.jpg")
    for name in "xy":
        (hidden / name).symlink_to(f".pool/{name}", target_is_directory=True)
    assert len(read(hidden)) == 2


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("c", "a", "a/ and c/ are one folder"),
        ("c", ".", "c/ holds .*by a link"),
        ("c", "..", "c/ holds .*by a link"),
        ("c", "a/deep", "a/ holds c/"),
        ("train/c", "../train/a", "train/a/ and train/c/ are one folder"),
        ("test/a", "../train/a", "train/a/ and test/a/ are one folder"),
        ("test", "train", "are one folder"),
    ],
)
def test_classes_that_are_one_another_are_refused(tmp_path, link, target, words):
    files = ["train/a/1.jpg", "train/b/1.jpg"] if "t" in link else ["a/1.jpg", "a/deep/2.jpg", "b/1.jpg"]
    root = touch(tmp_path / "set", *files)
    (root / link).parent.mkdir(exist_ok=True)
    (root / link).symlink_to(target, target_is_directory=True)
    with pytest.raises(FgvcError, match=words):
        read(root)


def test_two_classes_that_link_to_one_folder_are_refused(tmp_path):
    other = touch(tmp_path / "disk", "1.jpg", "deep/2.jpg")
    root = touch(tmp_path / "set", "a/1.jpg", "b/1.jpg")
    (root / "a" / "more").symlink_to(other, target_is_directory=True)
    (root / "b" / "more").symlink_to(other / "deep", target_is_directory=True)
    with pytest.raises(FgvcError, match="two classes reach the same files.*a/ and b/"):
        read(root)


def test_the_same_file_in_two_classes_or_parts_is_said(tmp_path):
    root = touch(tmp_path / "one", "a/1.jpg", "b/2.jpg")
    (root / "b" / "copy.jpg").symlink_to("../a/1.jpg")
    assert "into two classes" in " ".join(read(root).warnings)
    root = touch(tmp_path / "two", "train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg")
    (root / "test" / "a" / "copy.jpg").symlink_to("../../train/a/1.jpg")
    assert "into two splits" in " ".join(read(root).warnings)
    store = touch(tmp_path / "store", "x.jpg")
    root = touch(tmp_path / "three", "a/1.jpg", "b/2.jpg")
    for place in ("a/x.jpg", "b/x.jpg"):
        (root / place).symlink_to(store / "x.jpg")
    assert "a/ and b/" in " ".join(read(root).warnings)


def test_a_link_to_an_own_image_does_not_count_twice(tmp_path):
    """Else one of the two could be trained on, and the other tested."""
    root = touch(tmp_path / "set", "a/1.jpg", "b/2.jpg", "b/.store/blob.jpg", "b/.store/name")
    for place, target in {"a/2.jpg": "1.jpg", "b/3.jpg": ".store/blob.jpg", "b/4.jpg": ".store/name"}.items():
        os.symlink(target, root / place)
    index = read(root)
    assert [path for *_, path in rows(index)] == ["a/1.jpg", "b/2.jpg", "b/3.jpg", "b/4.jpg"]
    assert index.warnings == ("1 links are to images that their class has already; they are left out",)
