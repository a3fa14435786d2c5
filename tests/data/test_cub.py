import os
from pathlib import Path

import numpy as np
import pytest

from fgvc.config.data import SPLITS, CubData
from fgvc.data.quality.stored import refuse_shares
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError

TABLES = {
    "classes.txt": "1 001.Red Kite\n2 002.Blue Tit\n",
    "images.txt": "7 001.Red Kite/a 1.jpg\n9 001.Red Kite/b.jpg\n12 002.Blue Tit/c.jpg\n20 002.Blue Tit/d.jpg\n",
    "image_class_labels.txt": "9 1\n7 1\n12 2\n20 2\n",
    "train_test_split.txt": "7 1\n9 0\n12 1\n20 0\n",
    "bounding_boxes.txt": "7 1.0 2.0 30.5 4.0\n9 0 0 1 1\n12 5 6 7 8\n20 0 0 9 9\n",
    "parts/parts.txt": "1 beak\n2 left eye\n",
    "parts/part_locs.txt": "".join(f"{i} {p} {i}.5 {p}.0 {p % 2}\n" for i in (7, 9, 12, 20) for p in (2, 1)),
}


@pytest.fixture
def root(tmp_path):
    for name, text in TABLES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_columns_follow_images_txt_whatever_the_order_of_the_other_tables(root):
    index = read_source(CubData(root=root, val_fraction=0))
    assert index.classes == ("001.Red Kite", "002.Blue Tit")
    assert index.paths.tolist()[0] == "images/001.Red Kite/a 1.jpg"
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert index.labels.dtype == np.int32
    assert [SPLITS[s] for s in index.splits] == ["train", "test", "train", "test"]
    assert index.boxes.tolist()[0] == [1.0, 2.0, 30.5, 4.0]
    assert index.part_names == ("beak", "left eye")
    assert index.parts[2].tolist() == [[12.5, 1.0, 1.0], [12.5, 2.0, 0.0]]


def test_class_order_can_be_given(root):
    index = read_source(CubData(root=root, classes=["002.Blue Tit", "001.Red Kite"]))
    assert index.classes == ("002.Blue Tit", "001.Red Kite")
    assert index.labels.tolist() == [1, 1, 0, 0]


def test_boxes_and_parts_are_optional(root):
    for name in ("bounding_boxes.txt", "parts/part_locs.txt"):
        (root / name).unlink()
    index = read_source(CubData(root=root))
    assert index.boxes is None
    assert index.parts is None
    assert index.part_names == ()


@pytest.mark.parametrize(
    ("table", "old", "new", "words"),
    [
        ("images.txt", "9 001.Red Kite/b.jpg", "9", "images.txt:2: 1 fields"),
        ("images.txt", "9 001", "x9 001", "images.txt:2: 'x9' is not a whole number"),
        ("images.txt", "12 002", "9 002", "images.txt:3: id 9 occurs a second time"),
        ("image_class_labels.txt", "12 2", "12 3", "image_class_labels.txt:3: 3 is not a class of classes.txt"),
        ("image_class_labels.txt", "7 1\n", "", "image_class_labels.txt: lacks 1 of the ids in images.txt: 7"),
        ("image_class_labels.txt", "7 1\n", "9 1\n", "image_class_labels.txt:2: image id 9 occurs a second time"),
        ("train_test_split.txt", "20 0", "20 2", r"train_test_split.txt:4: 2 is not 1 \(train\) or 0"),
        ("train_test_split.txt", "20 0", "21 0", "train_test_split.txt:4: image id 21 is not in images.txt"),
        ("bounding_boxes.txt", "12 5 6 7 8", "12 5 6 7", "bounding_boxes.txt:3: 4 fields, 5 expected"),
        ("bounding_boxes.txt", "5 6 7 8", "5 6 7 eight", "bounding_boxes.txt:3: 4 numbers expected"),
        ("bounding_boxes.txt", "5 6 7 8", "5 6 7 nan", "bounding_boxes.txt:3: .* is not finite"),
        ("bounding_boxes.txt", "12 5 6 7 8\n", "", "bounding_boxes.txt: lacks 1 of the ids in images.txt: 12"),
        ("parts/part_locs.txt", "9 1 9.5", "9 3 9.5", "part_locs.txt:4: part id 3 is not in parts.txt"),
        ("parts/part_locs.txt", "9 1 9.5", "9 2 9.5", "part_locs.txt:4: image id 9 occurs a second time for part 2"),
        ("parts/part_locs.txt", "9 1 9.5 1.0 1\n", "", "part_locs.txt: lacks 1 of the ids in images.txt: 9"),
        ("classes.txt", TABLES["classes.txt"], "\n", "classes.txt: is empty"),
    ],
)
def test_a_malformed_table_is_named_with_its_line(root, table, old, new, words):
    text = (root / table).read_text(encoding="utf-8")
    assert old in text
    (root / table).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(FgvcError, match=words):
        read_source(CubData(root=root))


def test_missing_places_are_named(root):
    with pytest.raises(FgvcError, match=r"data\.root is not there"):
        read_source(CubData(root=root / "nowhere"))
    (root / "train_test_split.txt").unlink()
    with pytest.raises(FgvcError, match=r"train_test_split\.txt: not there"):
        read_source(CubData(root=root))
    (root / "images.txt").write_bytes(b"1 \xff\xfe.jpg\n")
    with pytest.raises(FgvcError, match="not UTF-8"):
        read_source(CubData(root=root))


def test_the_folder_above_is_recognised(tmp_path, root):
    below = tmp_path / "above" / "CUB_200_2011"
    below.mkdir(parents=True)
    (below / "images.txt").write_text("1 a\n")
    with pytest.raises(FgvcError, match=r"set data\.root=.*CUB_200_2011"):
        read_source(CubData(root=tmp_path / "above"))


def test_real_cub_keeps_the_official_split():
    if "FGVC_SHARED" not in os.environ:
        pytest.skip("FGVC_SHARED names no folder with cub50")
    root = Path(os.environ["FGVC_SHARED"]) / "data" / "cub50"
    index = read_source(CubData(root=root))
    assert (len(index), len(index.classes), index.parts.shape) == (2889, 50, (2889, 15, 3))
    assert [len(index.rows(split)) for split in SPLITS] == [1350, 150, 1389]
    assert set(np.bincount(index.labels[index.rows("val")]).tolist()) == {3}
    official = dict(line.split() for line in (root / "train_test_split.txt").read_text().splitlines())
    paths = dict(line.split() for line in (root / "images.txt").read_text().splitlines())
    tested = {f"images/{paths[i]}" for i, train in official.items() if train == "0"}
    assert set(index.paths[index.rows("test")].tolist()) == tested
    # Every path's own folder is the class that its label says.
    assert all(str(p).split("/")[1] == index.classes[k] for p, k in zip(index.paths, index.labels, strict=True))
    assert all(index.path(row).is_file() for row in range(0, len(index), 97))
    plain = read_source(CubData(root=root, val_fraction=0))
    assert [len(plain.rows(split)) for split in SPLITS] == [1500, 0, 1389]


def test_an_image_that_is_listed_twice_is_said(root):
    lines = TABLES["images.txt"].replace("002.Blue Tit/d.jpg", "001.Red Kite/b.jpg")
    (root / "images.txt").write_text(lines, encoding="utf-8")
    (warning,) = read_source(CubData(root=root, val_fraction=0)).warnings
    assert "1 rows name an image again, with two labels: " in warning
    assert "labels: images/001.Red Kite/b.jpg (001.Red Kite and 002.Blue Tit)" in warning


def test_boxes_in_shares_are_refused_where_they_are_used(root):
    (root / "bounding_boxes.txt").write_text("7 0.1 0.2 0.5 0.4\n9 0 0 1 1\n12 0.5 0.5 0.4 0.4\n20 0 0 0.9 0.9\n")
    with pytest.raises(FgvcError, match="are they shares"):
        refuse_shares(read_source(CubData(root=root, val_fraction=0)))
    (root / "bounding_boxes.txt").write_text(TABLES["bounding_boxes.txt"])
    refuse_shares(read_source(CubData(root=root, val_fraction=0)))
