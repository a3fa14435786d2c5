"""Files that decode though they lost data are named; whole ones, of whatever encoder's settings, are not."""

import struct
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fgvc.errors import ImageError
from fgvc.images.damage import damage
from fgvc.images.decode import decode


def picture(width: int = 160, height: int = 120, seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (height // 5, width // 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


CODINGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "restarts": {"restart_marker_rows": 1},
    "grey": {"mode": "L"},
    "cmyk": {"mode": "CMYK"},
}


def jpeg(image: Image.Image, coding: str, quality: int = 85) -> bytes:
    options = dict(CODINGS[coding])
    return encoded(image.convert(options.pop("mode", "RGB")), quality=quality, **options)


def halves(content: bytes) -> tuple[bytes, bytes]:
    """Both halves of a file, cut in the middle of the compressed data."""
    start = content.index(b"\xff\xda")
    middle = start + (len(content) - start) // 2
    return content[:middle], content[middle:]


def read(content: bytes) -> bool:
    try:
        decode(content)
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [(160, 120), (64, 48), (101, 77), (17, 233), (16, 16), (7, 5), (128, 256)])
def test_whole_files_are_not_named(coding: str, size: tuple[int, int]) -> None:
    image = picture(max(10, size[0]), max(10, size[1])).crop((0, 0, *size))
    for quality in (30, 95):
        assert damage(jpeg(image, coding, quality)) == ""


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("colour", ["white", "black", "grey", "red"])
def test_flat_pictures_are_not_named(coding: str, colour: str) -> None:
    image = Image.new("RGB", (120, 90), colour)
    assert damage(jpeg(image, coding)) == ""
    ImageDraw.Draw(image).ellipse((30, 10, 60, 40), "green")  # the lower half is flat
    assert damage(jpeg(image, coding)) == ""


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("fill", [b"\xff" * 10, b"\0" * 4, b"\0", b"\xff"])
def test_bytes_that_fill_up_before_the_end_mark_are_no_damage(coding: str, fill: bytes) -> None:
    content = jpeg(picture(), coding)
    assert damage(content[:-2] + fill + content[-2:]) == ""


def test_a_grey_picture_that_ends_flat_is_not_named() -> None:
    image = picture(168, 96).crop((0, 0, 168, 81))
    image.paste("white", (0, 40, 168, 81))
    for padding in (b"", b"\0\0\0\0"):
        content = jpeg(image, "grey")
        assert damage(content[:-2] + padding + content[-2:]) == ""


@pytest.mark.parametrize("coding", ["baseline", "444", "422", "grey"])
def test_changed_bytes_that_leave_some_over(coding: str) -> None:
    """Half of a block too few is decoded from other bytes: nothing ends early, and some bytes are never read."""
    content = jpeg(picture(400, 300), coding)
    start = content.index(b"\xff\xda") + 200
    damaged = 0
    for seed in range(12):
        other = np.random.default_rng(seed).integers(1, 255, 64, dtype=np.uint8).tobytes()
        changed = content[:start] + other + content[start + 64 :]
        damaged += not read(changed) or damage(changed) != ""
    assert damaged >= 6  # by chance, the others come out even


def test_zeros_in_a_pass_of_a_progressive_file() -> None:
    content = jpeg(picture(400, 300), "progressive")
    scan = [at for at in range(len(content)) if content.startswith(b"\xff\xda", at)][1]
    zeroed = content[: scan + 60] + bytes(60) + content[scan + 120 :]
    assert read(zeroed)
    assert "zeros" in damage(zeroed)


def test_what_follows_the_picture_does_not_matter() -> None:
    content = jpeg(picture(), "baseline")
    assert damage(content + b"\0" * 500) == ""
    assert damage(content + content) == ""


@pytest.mark.parametrize("coding", CODINGS)
def test_half_of_the_data_and_an_end_mark(coding: str) -> None:
    cut = halves(jpeg(picture(), coding))[0] + b"\xff\xd9"
    assert read(cut)
    assert damage(cut)


@pytest.mark.parametrize("coding", ["baseline", "optimised", "444", "422", "grey", "restarts"])
def test_zeros_in_the_middle(coding: str) -> None:
    first, second = halves(jpeg(picture(), coding))
    zeroed = first + bytes(200) + second[200:]
    assert read(zeroed)
    assert damage(zeroed)


@pytest.mark.parametrize("coding", ["baseline", "optimised", "444"])
def test_bytes_that_came_twice(coding: str) -> None:
    first, second = halves(jpeg(picture(), coding))
    assert "more data" in damage(first + first[-300:] + second) or "early" in damage(first + first[-300:] + second)


def test_a_progressive_file_without_its_last_passes() -> None:
    content = jpeg(picture(), "progressive")
    last = content.rindex(b"\xff\xda")
    cut = content[:last] + b"\xff\xd9"
    assert read(cut)
    assert "passes are missing" in damage(cut)


def test_a_png_whose_checksum_is_wrong() -> None:
    content = encoded(picture(), "PNG")
    assert damage(content) == ""
    at = content.index(b"IDAT")
    (length,) = struct.unpack_from(">I", content, at - 4)
    broken = bytearray(content)
    broken[at + 4 + length] ^= 1
    assert "checksum" in damage(bytes(broken))
    assert damage(content[:-12]) == "ends early"


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_zeros_from_the_middle_of_an_uncompressed_file(kind: str) -> None:
    content = encoded(picture(), kind)
    assert damage(content) == ""
    assert "zeros" in damage(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    barred = picture()
    for bar in ((0, 0, 160, 20), (0, 100, 160, 120)):
        barred.paste("black", bar)
    assert damage(encoded(barred, kind)) == ""
    cutout = Image.new("RGB", (160, 120))
    cutout.paste(picture(80, 60), (40, 20))  # an object on black
    assert damage(encoded(cutout, kind)) == ""


def test_other_formats_and_bytes_that_are_no_picture_are_not_judged() -> None:
    assert damage(b"hello") == ""
    assert damage(encoded(picture(), "WEBP")) == ""
    assert damage(encoded(picture(), "GIF")) == ""
    assert damage(b"\xff\xd8\xff\xe0\x00")


def test_real_photographs_are_not_named(shared) -> None:
    files = sorted((shared / "data").rglob("*.jpg"))[::97]
    assert len(files) > 40
    assert [file for file in files if damage(file.read_bytes())] == []
