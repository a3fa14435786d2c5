import io

import numpy as np
import pytest
from numpy.dtypes import StringDType
from PIL import Image

from fgvc.data.checks import check
from fgvc.data.folder import FolderData
from fgvc.types import ImageIndex


def picture(shade, size=(48, 40)):
    stream = io.BytesIO()
    Image.new("RGB", size, (shade, shade // 2, 255 - shade)).save(stream, "PNG")
    return stream.getvalue()


def build(root, files, groups=None):
    """An index of (split number, label, content) rows; content None: the file is missing."""
    for i, (_, _, content) in enumerate(files):
        if content is not None:
            (root / f"{i}.png").write_bytes(content)
    return ImageIndex(
        root=root,
        classes=("a", "b"),
        paths=np.array([f"{i}.png" for i in range(len(files))], dtype=StringDType()),
        labels=np.array([label for _, label, _ in files], np.int32),
        splits=np.array([split for split, _, _ in files], np.int8),
        groups=None if groups is None else np.array(groups, dtype=StringDType()),
    )


def test_a_clean_set_has_no_findings(tmp_path):
    seen = []
    index = build(
        tmp_path, [(s, k, picture(20 * s + 100 * k + j)) for s in range(3) for k in range(2) for j in range(2)]
    )
    report = check(index, progress=lambda done, total: seen.append((done, total)))
    assert report.ok
    assert (report.errors, report.warnings) == ((), ())
    assert report.counts.tolist() == [[2, 2]] * 3
    assert report.imbalance == 1.0
    assert report.missing == {}
    assert seen == [(i, 12) for i in range(1, 13)]


def test_unreadable_files_are_named_with_their_reason(tmp_path):
    big = picture(9, (100, 100))
    contents = [picture(1), picture(2), b"", b"", b"hello, I am a JPEG", picture(3, (400, 300))[:200], None, big]
    report = check(build(tmp_path, [(0, i % 2, c) for i, c in enumerate(contents)]), max_pixels=9_999)
    reasons = dict(report.unreadable)
    assert set(reasons) == {"2.png", "3.png", "4.png", "5.png", "6.png", "7.png"}
    assert all(reasons.values())
    assert "pixels" in reasons["7.png"]
    assert report.duplicates == ()  # two empty files are not copies of one image
    assert "6 of 8 files can't be read (75.00%)" in report.errors[0]
    assert not report.ok


def test_few_unreadable_files_only_warn(tmp_path):
    rows = [(0, i % 2, picture(i)) for i in range(20)]
    rows[5] = (0, 1, b"")
    index = build(tmp_path, rows)
    assert check(index).ok
    assert "1 of 20 files" in " ".join(check(index).warnings)
    assert not check(index, max_unreadable=0.04).ok


def test_duplicates_leaks_and_conflicts(tmp_path):
    rows = [
        (0, 0, picture(1)),  # 0 = 3 within train
        (0, 1, picture(2)),  # 1 = 5 across train and test
        (1, 0, picture(3)),
        (0, 0, picture(1)),
        (2, 0, picture(4)),  # 4 = 6 with two labels
        (2, 1, picture(2)),
        (2, 1, picture(4)),
        (1, 1, picture(5)),
    ]
    report = check(build(tmp_path, rows), workers=3)
    assert report.duplicates == ((0, 3), (1, 5), (4, 6))
    assert report.leaks == ((1, 5),)
    assert report.conflicts == ((4, 6),)
    assert any("1.png (train) = 5.png (test)" in text for text in report.errors)
    assert any("4.png (test) = 6.png (test)" in text for text in report.errors)
    assert any("2 images occur more than once within a split" in text for text in report.warnings)


def test_balance_missing_classes_sizes_and_groups(tmp_path):
    rows = [(0, 0, picture(i)) for i in range(12)] + [(0, 1, picture(50, (31, 200))), (2, 0, picture(60))]
    report = check(build(tmp_path, rows, groups=["same"] + [f"g{i}" for i in range(12)] + ["same"]))
    assert report.imbalance == 12
    assert report.missing == {"test": ("b",)}
    assert report.tiny == (("12.png", 31, 200),)
    assert report.straddling == ("same",)
    assert [text.split(":")[0] for text in report.errors] == ["1 groups have rows in more than one split"]
    assert len(report.warnings) == 4  # b not in test, no val part, imbalance, tiny
    assert not check(build(tmp_path, [(0, 0, picture(1)), (2, 1, picture(2))])).ok  # class b is never trained


def test_an_index_from_disk(tmp_path):
    for k in range(3):
        for i in range(10):
            (tmp_path / f"class{k}").mkdir(exist_ok=True)
            (tmp_path / f"class{k}" / f"{i}.png").write_bytes(picture(10 * k + i))
    index = FolderData(root=tmp_path).read()
    report = check(index)
    assert report.ok
    assert report.counts.sum() == 30
    assert report.recognised == index.recognised
    with pytest.raises(AttributeError):
        report.errors = ()
