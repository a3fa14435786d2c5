"""How a camera was held: pixels, points and boxes turn together, by Pillow's own word on what each orientation means."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from fgvc.images.decode import read_picture
from fgvc.images.upright import turned_boxes, turned_points, turned_sides

ALL = range(1, 9)
STORED = (60, 40)  # width, height


KINDS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "TIFF, packed": {"compression": "tiff_lzw"}}


def with_orientation(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = BytesIO()
    image.save(stream, kind.partition(",")[0], exif=exif, **KINDS[kind])
    return stream.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", ALL)
def test_a_box_lies_where_pillow_puts_what_was_drawn_in_it(orientation: int, kind: str) -> None:
    box = [7, 5, 27, 16]
    image = Image.new("RGB", STORED)
    ImageDraw.Draw(image).rectangle((7, 5, 26, 15), "white")
    content = with_orientation(image, orientation, kind)
    true = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    picture = read_picture(content)
    assert (picture.stored, picture.orientation, picture.size) == (STORED, orientation, true.size)
    np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(true))
    boxes = turned_boxes(np.array(box, np.float32), orientation, STORED)
    assert tuple(boxes.tolist()) == true.convert("L").getbbox()
    assert boxes.dtype == np.float32


@pytest.mark.parametrize("orientation", ALL)
def test_a_point_keeps_its_pixel(orientation: int) -> None:
    image = Image.new("RGB", STORED)
    image.putpixel((13, 31), (255, 255, 255))
    true = ImageOps.exif_transpose(Image.open(BytesIO(with_orientation(image, orientation))))
    x, y = turned_points(np.array([13.5, 31.5]), orientation, STORED)  # a pixel's centre
    assert true.getpixel((int(x), int(y))) == (255, 255, 255)
    assert (x % 1, y % 1) == (0.5, 0.5)
    assert turned_sides(turned_sides(STORED, orientation), orientation) == STORED


@pytest.mark.parametrize("orientation", ALL)
def test_the_turn_back_is_exact(orientation: int) -> None:
    back = {6: 8, 8: 6}.get(orientation, orientation)
    points = np.random.default_rng(0).integers(0, 40, (9, 2)).astype(np.float64)
    turned = turned_points(points, orientation, STORED)
    np.testing.assert_array_equal(turned_points(turned, back, turned_sides(STORED, orientation)), points)
    boxes = np.concatenate([points[:4] / 4, points[:4] / 4 + points[4:8] / 4 + 1], axis=1)
    upright = turned_boxes(boxes, orientation, STORED)
    np.testing.assert_array_equal(turned_boxes(upright, back, turned_sides(STORED, orientation)), boxes)


def test_boxes_are_cut_at_the_border_and_unknown_outside() -> None:
    boxes = np.array([[50, 30, 70, 50], [-5, -5, 5, 5], [61, 5, 70, 14], [5, 5, 5, 14], [np.nan] * 4, [0, 0, 60, 40]], np.float32)
    turned = turned_boxes(boxes, 1, STORED)
    assert turned[[0, 1, 5]].tolist() == [[50, 30, 60, 40], [0, 0, 5, 5], [0, 0, 60, 40]]
    assert np.isnan(turned[2:5]).all()


def test_a_box_within_keeps_its_bits() -> None:
    boxes = np.random.default_rng(0).random((50, 4), dtype=np.float32) * 20 + np.array([0, 0, 20, 20], np.float32)
    np.testing.assert_array_equal(turned_boxes(boxes, 1, STORED), boxes)
