import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from fgvc.config.data import SPLITS, CsvData
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError


def write(root, text, written="utf-8", **settings):
    (root / "set.csv").write_bytes(text if isinstance(text, bytes) else text.encode(written))
    return CsvData(root=root, file="set.csv", **settings)


def rows(index):
    return [
        (SPLITS[s], index.classes[k], str(p)) for s, k, p in zip(index.splits, index.labels, index.paths, strict=True)
    ]


def test_splits_as_given(tmp_path):
    text = (
        "label, path ,split\noak,a.jpg,train\nash,sub\\b.jpg,Validation\nash,c.jpg,train\n\n"
        '"oak","d, e.jpg",test\noak,f.jpg,valid\n'
    )
    index = read_source(write(tmp_path, text))
    assert index.classes == ("ash", "oak")
    assert rows(index) == [
        ("train", "oak", "a.jpg"),
        ("val", "ash", "sub/b.jpg"),
        ("train", "ash", "c.jpg"),
        ("test", "oak", "d, e.jpg"),
        ("val", "oak", "f.jpg"),
    ]
    assert index.groups is None


def test_without_a_split_column_the_set_is_split_in_three(tmp_path):
    text = "path,label\n" + "".join(f"{k}{i}.jpg,{k}\n" for i in range(100) for k in "xy")
    index = read_source(write(tmp_path, text))
    assert [len(index.rows(split)) for split in SPLITS] == [144, 16, 40]
    assert np.bincount(index.labels[index.rows("test")]).tolist() == [20, 20]
    assert [len(read_source(write(tmp_path, text, test_fraction=0, val_fraction=0)).rows(s)) for s in SPLITS] == [200, 0, 0]


def test_settings_that_a_run_has_written_down_are_as_if_they_were_not_given(tmp_path):
    text = "path,label\n" + "".join(f"{k}{i}.jpg,{k}\n" for i in range(20) for k in "xy")
    first = write(tmp_path, text)
    again = CsvData.model_validate(first.model_dump(mode="json"))
    assert rows(read_source(again)) == rows(read_source(first))


def test_groups_stay_together(tmp_path):
    text = "path,label,group\n" + "".join(f"{i}.jpg,{'xy'[i // 4 % 2]},plant {i // 4}\n" for i in range(400))
    index = read_source(write(tmp_path, text))
    where = {}
    for group, split in zip(index.groups.tolist(), index.splits.tolist(), strict=True):
        where.setdefault(group, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values())
    assert [len(index.rows(split)) for split in SPLITS] == pytest.approx([288, 32, 80], abs=4)


def test_validation_taken_from_given_train_rows_respects_groups(tmp_path):
    lines = [f"{i}.jpg,{'xy'[i % 2]},{'test' if i >= 80 else 'train'},g{i // 8}\n" for i in range(96)]
    index = read_source(write(tmp_path, "path,label,split,group\n" + "".join(lines), val_fraction=0.2))
    assert index.rows("test").tolist() == list(range(80, 96))
    rows = index.rows("val")
    assert len(rows) == 16
    assert len(set(index.groups[rows].tolist())) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "path,label\na.jpg,x\n,x\nb.jpg\n\nc.jpg,\n",
            r"3 rows can't be used: line 3 has no path, line 4 has 1 of the 2 fields, line 6 has no label",
        ),
        (
            "path,label,split\na.jpg,x,train\nb.jpg,x,trian\nc.jpg,x,\n",
            r"2 rows .*line 3 has no split .*'trian', line 4",
        ),
        ("path,label\n" + ",x\n" * 9, r"9 rows .*line 6 has no path and 4 more$"),
        ("image,label\na.jpg,x\n", r"1: no column 'path' in the header \(image, label\); set data\.path_column"),
        ("path;label\na.jpg;x\n", r"set data\.delimiter=';'"),
        ("path,label,label\na.jpg,x,y\n", "two columns are called 'label'"),
        ("path,label\n", "no labelled image"),
        ("", "no column 'path'"),
        ("path,label,split,group\na,x,train,g1\nb,x,test,g1\nc,x,train,g2\n", "in more than one split: g1; give each"),
        ("path,label,split\na,x,train\nb,y,test\n", "classes without a train row: y"),
        ('path,label\n"' + "a" * 200_000 + '",x\n', "2: field larger"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, text, words):
    with pytest.raises(FgvcError, match=words):
        read_source(write(tmp_path, text))


def test_settings_are_honoured(tmp_path):
    text = "img\tspecies\tfold\tplant\na.jpg\tx\ttrain\tp\nb.jpg\tx\ttest\tq\n"
    index = read_source(write(
        tmp_path,
        text,
        delimiter="\t",
        path_column="img",
        label_column="species",
        split_column="fold",
        group_column="plant",
    ))
    assert rows(index) == [("train", "x", "a.jpg"), ("test", "x", "b.jpg")]
    assert index.groups.tolist() == ["p", "q"]
    with pytest.raises(FgvcError, match="no column 'fold'"):  # asked for by name, so its absence is a mistake
        read_source(write(tmp_path, "path,label\na.jpg,x\n", split_column="fold"))
    with pytest.raises(FgvcError, match=r"data\.classes lacks: x"):
        read_source(write(tmp_path, "path,label\na.jpg,x\n", classes=["y"]))
    with pytest.raises(ValidationError):
        write(tmp_path, "", delimiter=", ")
    with pytest.raises(FgvcError, match=r"can't read the table.*data\.file"):
        read_source(CsvData(root=tmp_path, file="none.csv"))


@pytest.mark.parametrize(
    ("encoding", "label", "notice"),
    [
        ("utf-8", "chêne", None),
        ("utf-8-sig", "chêne", None),
        ("utf-16", "chêne", None),
        ("gb18030", "银杏", "read as gb18030"),
        ("cp1252", "é", "read as cp1252"),
    ],
)
def test_encodings(tmp_path, encoding, label, notice):
    index = read_source(write(tmp_path, f"path,label\na.jpg,{label}\n", encoding))
    assert index.classes == (label,)
    assert (notice or "NOT UTF-8") in index.recognised if notice else "NOT UTF-8" not in index.recognised


def test_the_encoding_can_be_said(tmp_path):
    text = "path,label\na.jpg,déjà\n"
    assert read_source(write(tmp_path, text, "cp1252", encoding="cp1252")).classes == ("déjà",)
    index = read_source(write(tmp_path, b"path,label\n\x81.jpg,a\n"))
    assert list(index.paths) == ["\x81.jpg"]  # undefined in cp1252: latin-1
    with pytest.raises(FgvcError, match=r"is not utf-8 text; set data\.encoding"):
        read_source(write(tmp_path, text, "cp1252", encoding="utf-8"))
    with pytest.raises(FgvcError, match="no encoding of that name"):
        read_source(write(tmp_path, text, encoding="utf-9"))


MEASURE = """
import sys
from pathlib import Path
from fgvc.config.data import CsvData, FolderData
from fgvc.data.sources.read import read_source

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

before = peak()
source = CsvData(root=sys.argv[2], file="set.csv") if sys.argv[1] == "csv" else FolderData(root=sys.argv[2])
index = read_source(source)
print(len(index), peak() - before)
"""


def _measure(kind, root):
    run = subprocess.run([sys.executable, "-c", MEASURE, kind, str(root)], capture_output=True, text=True, check=True)
    count, megabytes = run.stdout.split()
    return int(count), float(megabytes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_million_rows_stay_below_400_mb(tmp_path):
    with (tmp_path / "set.csv").open("w") as stream:
        stream.write("path,label,split,group\n")
        stream.writelines(
            f"images/class_{i % 200:03d}/photo_{i:07d}.jpg,class_{i % 200:03d},train,g{i // 3}\n" for i in range(10**6)
        )
    count, megabytes = _measure("csv", tmp_path)
    assert count == 10**6
    assert megabytes < 400


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_thousand_files_stay_below_40_mb_and_a_start(tmp_path):
    for k in range(100):
        (tmp_path / f"class_{k:03d}").mkdir()
        for i in range(1000):
            (tmp_path / f"class_{k:03d}" / f"photo_{i:07d}.jpg").touch()
    count, megabytes = _measure("folder", tmp_path)
    assert count == 10**5
    assert megabytes < 60


def test_parts_have_the_names_that_folders_may_have(tmp_path):
    text = "path,label,split\na.jpg,oak,Training\nb.jpg,ash,TRAIN\nc.jpg,oak,dev\nd.jpg,ash,Test Set\n"
    index = read_source(write(tmp_path, text))
    assert [SPLITS[s] for s in index.splits] == ["train", "train", "val", "test"]
    with pytest.raises(FgvcError, match=r"line 2 has no split \(train, val or test\): 'left'"):
        read_source(write(tmp_path, "path,label,split\na.jpg,oak,left\n"))


def test_rows_that_name_one_file_are_said(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    text = "path,label,split\nreal/a.jpg,oak,train\n./real//a.jpg,ash,train\nlink/b.jpg,ash,train\nreal/b.jpg,ash,test\n"
    index = read_source(write(tmp_path, text, val_fraction=0))
    assert index.warnings == (
        "1 rows name an image again, with two labels: ./real//a.jpg (oak and ash); remove one of each",
        "1 rows name an image again, with two splits: real/b.jpg (train and test); remove one of each",
    )
    index = read_source(write(tmp_path, "path,label\na.jpg,oak\na.jpg,oak\nb.jpg,ash\n", val_fraction=0, test_fraction=0))
    assert index.warnings == ("1 rows name an image again: a.jpg; remove them, unless it is to count twice",)
    assert read_source(write(tmp_path, "path,label\na.jpg,oak\nb.jpg,ash\n")).warnings == ()
