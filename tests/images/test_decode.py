"""Every way in which a file can be bad ends in an ImageError that names it, and costs neither memory nor a handle."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import threading
import tracemalloc
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fgvc.errors import ImageError
from fgvc.images.decode import FORMATS, decode, read_picture
from fgvc.images.suffix import SUFFIXES


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE)


def png_of_size(width: int, height: int, mode: int = 0) -> bytes:
    """A PNG whose header promises width x height 1-bit pixels, without drawing them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, mode, 0, 0, 0)
    row = zlib.compressobj()
    body = b"".join(row.compress(bytes(1 + (width + 7) // 8)) for _ in range(min(height, 64))) + row.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"\0" * 4096, "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[:20], "not an image"),
        (png_of_size(13_000, 13_000), "too many pixels"),
        (png_of_size(60_000, 60_000), "too many pixels"),
        (png_of_size(10_000, 5_001), "too many pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ],
)
def test_bad_bytes(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError) as error:
            decode(source)
        assert error.value.reason.partition(":")[0] == reason
    assert error.value.path == str(path)
    assert pickle.loads(pickle.dumps(error.value)).reason == error.value.reason  # noqa: S301


@pytest.mark.parametrize("kind", ["error", "ignore"])
def test_a_bomb_is_refused_whatever_the_warning_filters_say(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(kind)
        with pytest.raises(ImageError, match="too many pixels"):
            decode(png_of_size(13_000, 13_000))


def test_a_bomb_costs_no_memory() -> None:
    bomb = png_of_size(6_000, 9_000)  # below Pillow's own limit, above ours: 162 MB as RGB
    decode(PNG)
    tracemalloc.start()
    before = _resident()
    with pytest.raises(ImageError, match="too many pixels"):
        decode(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert _resident() - before < 4 * 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_cap_is_inclusive() -> None:
    assert decode(PNG, max_pixels=64 * 48).size == (48, 64)
    with pytest.raises(ImageError, match="too many pixels"):
        decode(PNG, max_pixels=64 * 48 - 1)


def test_missing_directory_pipe_and_unreadable(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [("gone.jpg", "missing"), (".", "a directory"), ("pipe", "not a file")]:
        with pytest.raises(ImageError) as error:
            decode(tmp_path / path)
        assert error.value.reason == reason


def test_format_allow_list() -> None:
    assert decode(JPEG, formats=("JPEG", "PNG")).size == (48, 64)
    with pytest.raises(ImageError) as error:
        decode(encoded(NOISE, "BMP"), formats=("JPEG", "PNG"))
    assert error.value.reason == "format not accepted"


def test_pixels_are_pillows_own() -> None:
    np.testing.assert_array_equal(np.asarray(decode(PNG)), np.asarray(NOISE))
    np.testing.assert_array_equal(np.asarray(decode(JPEG)), np.asarray(Image.open(BytesIO(JPEG))))


def corrupt_exif() -> bytes:
    """A JPEG whose EXIF block announces more entries than it has: Pillow warns, and reads the picture all the same."""
    entry = struct.pack("<HHII", 0x010F, 2, 4000, 900)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 40) + entry
    return JPEG[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + JPEG[20:]


def test_corrupt_metadata_is_quiet_even_among_threads() -> None:
    data = corrupt_exif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Image.open(BytesIO(data)) as image:  # so the test has teeth
            image.getexif()
    expected, wrong = np.asarray(NOISE.convert("RGB")).shape, []

    def work() -> None:
        for _ in range(50):
            try:
                if np.asarray(decode(data)).shape != expected:
                    wrong.append("shape")
            except BaseException as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_no_handle_is_left_open(tmp_path: Path) -> None:
    files = {"good.png": PNG, "cut.jpg": JPEG[:400], "text.jpg": b"text", "bomb.png": png_of_size(9_000, 9_000)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in files:
        with contextlib.suppress(ImageError):
            decode(tmp_path / name)
        open_files = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
        assert str(tmp_path / name) not in open_files


@given(st.sampled_from([JPEG, PNG, encoded(NOISE, "WEBP"), encoded(NOISE, "GIF"), encoded(NOISE, "TIFF")]), st.data())
def test_mutated_files_give_an_image_or_an_image_error(data: bytes, draw: st.DataObject) -> None:
    broken = bytearray(data)
    for position in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
        broken[position] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert decode(bytes(broken), max_pixels=10**6).mode == "RGB"


def test_large_jpegs_are_reduced_by_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1/2, 1/4 or 1/8, by their own size alone: no limit and no network's input changes what is seen."""
    monkeypatch.setattr("fgvc.images.decode.MAX_PIXELS", 1000)
    for size, scale in (((40, 25), 1), ((41, 25), 2), ((80, 50), 2), ((81, 51), 4), ((200, 100), 8)):
        content = encoded(NOISE.resize(size), "JPEG")
        picture = read_picture(content, max_pixels=size[0] * size[1])
        assert picture.image.size == (-(-size[0] // scale), -(-size[1] // scale))
        assert (picture.stored, picture.size) == (size, size)
        again = decode(content, max_pixels=10**9)
        np.testing.assert_array_equal(np.asarray(picture.image), np.asarray(again))
    assert decode(encoded(NOISE.resize((80, 50))), max_pixels=10**9).size == (80, 50)  # a PNG can't be


def test_a_raised_limit_is_above_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(PNG, max_pixels=64 * 48).size == (48, 64)


def test_too_many_pixels_say_how_many() -> None:
    with pytest.raises(ImageError, match=r"6000 x 9000 = 54\.0 megapixels, the limit is 50; data\.max_megapixels or --"):
        decode(png_of_size(6_000, 9_000))
    with pytest.raises(ImageError, match=r"10000 x 5001 = 50\.01 megapixels, the limit is 50;"):
        decode(png_of_size(10_000, 5_001))
    with pytest.raises(ImageError, match="3600 megapixels"):
        decode(png_of_size(60_000, 60_000))


def test_targa_is_told_by_its_name_alone(tmp_path: Path) -> None:
    content = encoded(NOISE, "TGA")
    for name in ("1.tga", "2.TGA"):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(np.asarray(decode(tmp_path / name)), np.asarray(NOISE))
    (tmp_path / "3.jpg").write_bytes(content)
    for source in (content, tmp_path / "3.jpg"):
        with pytest.raises(ImageError, match="not an image"):
            decode(source)


def test_twelve_bits_of_a_tiff_are_scaled_by_what_the_file_says() -> None:
    """BitsPerSample 12, packed: 0x000, 0x800, 0xFFF, 0x010."""
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    content = content.ljust(122, b"\0") + bytes.fromhex("000800fff010")
    picture = read_picture(content)
    assert (picture.bits, picture.extremes) == (12, (0, 0xFFF))
    assert np.asarray(picture.image)[0, :, 0].tolist() == [0, 0x80, 0xFF, 0x01]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_of_a_format_that_is_read(suffix: str) -> None:
    """By Pillow's table of suffixes, or one of those that browsers give to JPEGs."""
    Image.init()
    name = Image.EXTENSION.get(suffix, "JPEG" if suffix.startswith((".j", ".p")) else "")
    assert name in (*FORMATS, "MPO", "TGA")
