"""What the files of a set store, and what a network would see of it."""

import io
import re

import numpy as np
import pytest
from numpy.dtypes import StringDType
from PIL import Image

from fgvc.data.index import ImageIndex
from fgvc.data.quality.checks import check, findings
from fgvc.data.quality.stored import spot_check

SIDE = 40


def grey(number: int) -> np.ndarray:
    """(SIDE,SIDE) uint8 of 35 to 239."""
    cells = np.random.default_rng(number).integers(35, 240, (8, 8), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def build(root, arrays, suffix: str = "tif", **columns) -> ImageIndex:
    """A set of two classes and three parts; arrays are saved as Pillow makes pictures of them, bytes are files."""
    for number, array in enumerate(arrays):
        if isinstance(array, bytes):
            (root / f"{number}.{suffix}").write_bytes(array)
        else:
            Image.fromarray(array).save(root / f"{number}.{suffix}")
    count = len(arrays)
    return ImageIndex(
        root=root,
        classes=("a", "b"),
        paths=np.array([f"{number}.{suffix}" for number in range(count)], dtype=StringDType()),
        labels=(np.arange(count) % 2).astype(np.int32),
        splits=(np.arange(count) // 2 % 3).astype(np.int8),
        **columns,
    )


ARRAYS = [grey(number) for number in range(12)]


@pytest.mark.parametrize(
    ("suffix", "stored", "words"),
    [
        ("png", lambda g: g.astype(np.uint16) * 4, r"integers of 16 bits \(I;16\).*use 10 bits, multiply all values by 64"),
        ("png", lambda g: g.astype(np.uint16) * 16, r"integers of 16 bits \(I;16\).*use 12 bits, multiply all values by 16"),
        ("tif", lambda g: g.astype(np.uint16) * 64, r"integers of 16 bits \(I;16\).*use 14 bits, multiply all values by 4"),
        ("tif", lambda g: g.astype(np.int32), r"integers of 32 bits \(I\), \d+ to \d+.*use 8 bits, save them with 8 bits"),
        ("tif", lambda g: g.astype(np.int32) * 2**20, "integers of 32 bits .*cut off in 12"),
        ("tif", lambda g: g.astype(np.float32) / 255 * 10000, "floats .*cut off in 12"),
        ("tif", lambda g: g.astype(np.float32) - 300, "floats .*cut off in 12"),
        ("png", lambda g: np.stack([g // 16] * 3, axis=2), r"100% of 12 images, stored as RGB, are all but black"),
        ("png", lambda g: np.stack([g // 16 + 240] * 3, axis=2), r"100% of 12 images, stored as RGB, are all but white"),
        ("png", lambda g: g // 32 + 100, r"100% of 12 images, stored as L, are of nearly one colour"),
    ],
)
def test_a_set_that_decodes_to_nothing_is_an_error(tmp_path, suffix, stored, words):
    index = build(tmp_path, [stored(array) for array in ARRAYS], suffix)
    assert [text for text in check(index).errors if "near copies" not in text], words

    assert any(re.search(words, text) for text in check(index).errors), check(index).errors
    assert any(re.search(words, text) for text in spot_check(index, index.rows("train"))) or "12" in words


@pytest.mark.parametrize(
    ("suffix", "stored"),
    [
        ("png", lambda g: g),
        ("png", lambda g: g.astype(np.uint16) * 257),
        ("tif", lambda g: g.astype(np.uint16) * 200),
        ("tif", lambda g: g.astype(np.int32) * 257),
        ("tif", lambda g: g.astype(np.float32) / 255),
        ("tif", lambda g: g.astype(np.float32)),
        ("png", lambda g: np.stack([g] * 3, axis=2)),
    ],
)
def test_a_set_that_is_well_stored_gives_no_warning(tmp_path, suffix, stored):
    index = build(tmp_path, [stored(array) for array in ARRAYS], suffix)
    assert check(index).errors == ()
    assert spot_check(index, index.rows("train")) == []


def test_one_dark_picture_spoils_no_set(tmp_path):
    index = build(tmp_path, [*(array.astype(np.uint16) * 257 for array in ARRAYS), ARRAYS[0].astype(np.uint16)], "png")
    assert not [text for text in check(index).errors if "black" in text]


def test_floats_of_two_ranges_are_said(tmp_path):
    arrays = [array.astype(np.float32) / (255 if number % 2 else 1) for number, array in enumerate(ARRAYS)]
    assert any("6 are shares of white, the others are not" in text for text in check(build(tmp_path, arrays)).warnings)


def jpeg(array: np.ndarray, orientation: int = 1) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(array).save(stream, "JPEG", exif=exif, quality=90)
    return stream.getvalue()


def test_damaged_files_are_named_in_report_table_and_training(tmp_path):
    whole = jpeg(grey(3))
    cut = whole[: whole.index(b"\xff\xda") + 60] + b"\xff\xd9"
    index = build(tmp_path, [jpeg(array) for array in ARRAYS[:6]] + [cut], "jpg")
    report = check(index)
    assert any("1 images are damaged, though they can be decoded: 6.jpg (its data end early" in w for w in report.warnings)
    assert [line["path"] for line in findings(report) if line["finding"] == "damaged"] == ["6.jpg"]
    warnings = spot_check(index, np.arange(7))
    assert len(warnings) == 1
    assert "of 7 images looked at: 1 images are damaged" in warnings[0]


def boxed(root, boxes, orientation: int = 1, size=(60, 40)) -> ImageIndex:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8) for _ in boxes]
    return build(root, [jpeg(array, orientation) for array in arrays], "jpg", boxes=np.array(boxes, np.float32))


@pytest.mark.parametrize(
    ("boxes", "error", "words"),
    [
        ([[5, 5, 20, 20], [70, 5, 10, 10]], True, "1 boxes lie outside .*1.jpg .box 70 5 10 10 of 60 x 40"),
        ([[5, 5, 20, 20], [5, 5, 0, 10]], True, "1 boxes lie outside of their image, or are empty"),
        ([[5, 5, 20, 20], [30, 5, 40, 10]], False, "1 boxes reach beyond their image.*cut"),
        ([[0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1]], True, "shares of the image's sides"),
    ],
)
def test_boxes_that_do_not_fit_are_named(tmp_path, boxes, error, words):

    report = check(boxed(tmp_path, boxes))
    assert any(re.search(words, text) for text in (report.errors if error else report.warnings)), report
    assert not error or not report.ok
    assert [line["path"] for line in findings(report) if line["finding"] == "box"] == ["1.jpg"] or "shares" in words


def test_boxes_that_fit_are_not_named(tmp_path):
    report = check(boxed(tmp_path, [[0, 0, 60, 40], [59, 39, 1, 1], [-1, -1, 62, 42]]))
    assert not [text for text in (*report.errors, *report.warnings) if "box" in text]


def test_boxes_of_turned_images(tmp_path):
    (tmp_path / "stored").mkdir()
    report = check(boxed(tmp_path / "stored", [[30, 5, 25, 20], [1, 2, 3, 4]], orientation=6))
    assert any("2 images are turned by their EXIF orientation, and their boxes with them" in w for w in report.warnings)
    assert not [text for text in report.errors if "box" in text]
    (tmp_path / "shown").mkdir()
    report = check(boxed(tmp_path / "shown", [[5, 30, 20, 28], [5, 45, 20, 14]], orientation=6))  # of 40 x 60
    assert any("2 boxes fit their image as EXIF turns it, and not as it is stored" in text for text in report.errors)
