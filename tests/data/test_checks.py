import io
import os
from dataclasses import replace

import numpy as np
import pytest
from numpy.dtypes import StringDType
from PIL import Image, ImageOps

from fgvc.config.data import FolderData
from fgvc.data.index import ImageIndex
from fgvc.data.quality.checks import COLUMNS, check, findings, with_suspects
from fgvc.data.quality.colour import Normalisation
from fgvc.data.quality.suspects import Suspect, Suspects
from fgvc.data.sources.read import read_source


def blobs(number, size=(48, 40)):
    """A picture of soft blobs, others for every number."""
    cells = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def saved(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(number, size=(48, 40)):
    return saved(blobs(number, size))


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
    calls = []
    index = build(
        tmp_path, [(s, k, picture(20 * s + 100 * k + j)) for s in range(3) for k in range(2) for j in range(2)]
    )
    report = check(index, progress=lambda *now: calls.append(now))
    assert report.ok
    assert (report.errors, report.warnings) == ((), ())
    assert report.counts.tolist() == [[2, 2]] * 3
    assert report.imbalance == 1.0
    assert report.missing == {}
    assert calls == [*(("reading", i, 12) for i in range(1, 13)), ("comparing", 12, 12)]


def test_unreadable_files_are_named_with_their_reason(tmp_path):
    big = picture(9, (100, 100))
    contents = [picture(1), picture(2), b"", b"", b"hello, I am a JPEG", picture(3, (400, 300))[:200], None, big]
    index = build(tmp_path, [(0, i % 2, c) for i, c in enumerate(contents)])
    report = check(replace(index, max_pixels=9_999))
    reasons = {f"{row}.png": reason for row, reason in report.unreadable}
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
    assert any("1.png (train, b) = 5.png (test, b)" in text for text in report.errors)
    assert any("4.png (test, a) = 6.png (test, b)" in text for text in report.errors)
    assert any("2 images occur more than once within a split" in text for text in report.warnings)


def test_balance_missing_classes_sizes_and_groups(tmp_path):
    rows = [(0, 0, picture(i)) for i in range(12)] + [(0, 1, picture(50, (31, 200))), (2, 0, picture(60))]
    report = check(build(tmp_path, rows, groups=["same"] + [f"g{i}" for i in range(12)] + ["same"]))
    assert report.imbalance == 12
    assert report.missing == {"test": ("b",)}
    assert report.tiny == (12,)
    assert report.straddling == ("same",)
    assert [text.split(":")[0] for text in report.errors] == ["1 groups have rows in more than one split"]
    assert len(report.warnings) == 4  # b not in test, no val part, imbalance, tiny
    assert not check(build(tmp_path, [(0, 0, picture(1)), (2, 1, picture(2))])).ok  # class b is never trained


def test_an_index_from_disk(tmp_path):
    for k in range(3):
        for i in range(10):
            (tmp_path / f"class{k}").mkdir(exist_ok=True)
            (tmp_path / f"class{k}" / f"{i}.png").write_bytes(picture(10 * k + i))
    index = read_source(FolderData(root=tmp_path))
    report = check(index)
    assert report.ok
    assert report.counts.sum() == 30
    assert report.index is index
    with pytest.raises(AttributeError):
        report.errors = ()


def test_near_copies_across_splits_and_labels_are_errors(tmp_path):
    big = blobs(1, (200, 160))
    rows = [
        (0, 0, saved(big)),  # 0 = 3 ~ 4, the last in test
        (0, 1, saved(blobs(2, (200, 160)))),  # 1 ~ 5 within train, another label
        (2, 1, picture(3)),
        (0, 0, saved(big)),
        (2, 0, saved(big.resize((150, 120)), "JPEG", quality=70)),
        (0, 0, saved(ImageOps.mirror(blobs(2, (200, 160))), "JPEG")),
    ]
    report = check(build(tmp_path, rows))
    assert report.duplicates == ((0, 3),)
    assert report.near == ((0, 3, 4), (1, 5))
    assert (report.near_leaks, report.near_conflicts) == (((0, 4),), ((1, 5),))
    assert report.leaks == ()
    assert [text.split(":")[0] for text in report.errors] == [
        "1 pairs of near copies lie in two splits",
        "1 pairs of near copies have different labels",
    ]
    families = report.families
    assert families[0] == families[3] == families[4]
    assert families[1] == families[5]
    assert len(set(families.tolist())) == 3


def test_families_join_groups_and_copies(tmp_path):
    rows = [(0, 0, picture(1)), (0, 1, picture(2)), (0, 1, picture(1)), (0, 0, picture(3)), (0, 0, picture(4))]
    report = check(build(tmp_path, rows, groups=["a", "a", "", "", ""]))
    assert len(set(report.families.tolist())) == 3
    assert len(set(report.families[:3].tolist())) == 1


def test_colours_are_compared_with_the_normalisation(tmp_path):
    light = [saved(blobs(i).point(lambda v: 200 + v // 5)) for i in range(8)]
    rows = [(0, i % 2, content) for i, content in enumerate(light)]
    rows += [(2, 0, saved(Image.new("RGB", (50, 50)))), (2, 1, saved(blobs(9).convert("L")))]
    report = check(build(tmp_path, rows), expected=Normalisation((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(one)), float).reshape(-1, 3) for one in light]) / 255
    np.testing.assert_allclose(report.colours.mean, pixels.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(report.colours.std, pixels.std(axis=0), rtol=1e-9)  # of the train part alone
    np.testing.assert_allclose(report.colours.shift, (pixels.mean(axis=0) - 0.5) / 0.25, rtol=1e-9)
    assert report.colours.grey == (8, 9)
    assert report.colours.flat == (8,)
    assert report.colours.modes == (("RGB", 9), ("L", 1))
    warnings = "\n".join(report.warnings)
    for expected in (
        "red is 1.",
        "standard deviations lighter",
        "blue spreads 0.",
        "RGB 9, L 1",
        "2 of 10 images are grey",
    ):
        assert expected in warnings, expected
    assert report.ok


@pytest.mark.parametrize("value", [lambda v: v, lambda v: 30 + v // 2])
def test_what_the_weights_ask_for_makes_no_picture_odd(tmp_path, value):
    """A mean of 0 and a std of 1, which some of timm's weights ask for, are those of no images."""
    rows = [(0, i % 2, saved(blobs(i).point(value))) for i in range(8)]
    index = build(tmp_path, rows)
    unlikely = Normalisation((0.0,) * 3, (1.0,) * 3, from_weights=True)
    assert not [line for line in check(index, expected=unlikely).warnings if "normalisation" in line]
    stated = replace(unlikely, from_weights=False)
    assert any("deploy.std" in line for line in check(index, expected=stated).warnings)
    warnings = check(index, expected=replace(stated, doubts=("std is in other units",))).warnings
    assert "std is in other units" in warnings
    assert not any("deploy.std" in line for line in warnings), "said once"


def test_pictures_unlike_photographs_are_odd_whatever_the_weights_ask_for(tmp_path):
    rows = [(0, i % 2, saved(blobs(i).point(lambda v: 200 + v // 8))) for i in range(8)]
    imagenet = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), from_weights=True)
    warnings = "\n".join(check(build(tmp_path, rows), expected=imagenet).warnings)
    assert "red is 1." in warnings
    assert "lighter" in warnings
    assert "deploy." not in warnings, "nobody set it"


def test_of_a_large_group_the_faulty_ones_are_shown(tmp_path):
    rows = [*((0, 0, picture(1)) for _ in range(9)), (2, 0, picture(1)), (0, 1, picture(1))]
    report = check(build(tmp_path, rows))
    (error, other) = report.errors
    for text in (error, other):
        assert "0.png (train, a) = 9.png (test, a) = 10.png (train, b)" in text
    assert report.shown(report.duplicates[0], 4) == [0, 9, 10, 1]


def test_a_chain_whose_ends_are_unlike_is_a_group_but_no_leak_of_all(tmp_path):
    first, last = (np.asarray(blobs(seed, (64, 64))).astype(float) for seed in (5, 6))
    steps = [Image.fromarray((first + (last - first) * t).round().astype(np.uint8)) for t in np.linspace(0, 1, 30)]
    report = check(build(tmp_path, [*((0, 0, saved(image)) for image in steps[:-1]), (2, 0, saved(steps[-1]))]))
    assert report.near == (tuple(range(30)),)
    assert (28, 29) in report.near_leaks
    assert all(other == 29 and row > 20 for row, other in report.near_leaks), (
        "those that are alike, not all of the chain"
    )
    assert "~ 29.png (test, a)" in report.errors[-1]


def test_what_is_no_file_is_unreadable_and_does_not_wait(tmp_path):
    index = build(tmp_path, [(0, 0, picture(1)), (0, 1, picture(2))])
    (tmp_path / "0.png").unlink()
    os.mkfifo(tmp_path / "0.png")
    assert check(index, max_unreadable=1).unreadable == ((0, "not a file"),)
    index.paths[0] = "nu\0l.png"
    assert check(index, max_unreadable=1).unreadable == ((0, "corrupt"),)


def test_findings_are_lines_to_act_upon(tmp_path):
    rows = [(0, 0, picture(1)), (0, 1, picture(1)), (2, 1, b""), (2, 0, picture(3, (20, 90)))]
    report = check(build(tmp_path, rows), max_unreadable=1)
    report = with_suspects(report, Suspects((Suspect(row=3, label=0, suggested=1, p_label=0.0123, p_suggested=0.9),), 1))
    lines = findings(report)
    assert all(tuple(line) == COLUMNS for line in lines)
    assert [(line["finding"], line["path"], line["split"], line["label"]) for line in lines] == [
        ("unreadable", "2.png", "test", "b"),
        ("tiny", "3.png", "test", "a"),
        ("duplicate", "0.png", "train", "a"),
        ("duplicate", "1.png", "train", "b"),
        ("suspect", "3.png", "test", "a"),
    ]
    assert lines[-1]["suggested"] == "b"
    assert lines[-1]["score"] == "0.0123"
    assert "about 1 labels look wrong" in report.warnings[-1]
