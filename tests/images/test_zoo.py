"""A zoo of odd images, drawn in memory: what decode makes of each, and the whole chain against timm."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
import timm.data
from PIL import Image

from fgvc.config.images import Preprocess
from fgvc.images.decode import decode
from fgvc.images.preprocess import preprocess

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def marked(width: int = 60, height: int = 40) -> Image.Image:
    """A picture that is red in the upper left quarter, blue elsewhere, so that a turn shows."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste(RED, (0, 0, width // 2, height // 2))
    return image


def turned(orientation: int) -> bytes:
    """A picture stored so that EXIF orientation makes it `marked()`; the stored pixels by numpy, not by Pillow."""
    pixels = np.asarray(marked())
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, 1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)


def big_endian_tiff(values: list[int]) -> bytes:
    """A 16-bit grey TIFF of one row, written by hand."""
    pixels = struct.pack(f">{len(values)}H", *values)
    offset = 8 + len(pixels)
    tags = [(256, len(values)), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(pixels)))
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return b"MM\0*" + struct.pack(">I", offset) + pixels + struct.pack(">H", len(tags)) + entries + bytes(4)


def zoo() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Name -> (file, RGB that the pixel at the upper left must have)."""
    red = marked()
    clear = red.convert("RGBA")
    clear.putalpha(Image.new("L", red.size, 0))
    half = Image.new("RGBA", (30, 20), (255, 0, 0, 128))
    palette = red.quantize(4)
    index = palette.getpixel((0, 0))
    deep = np.full((20, 30), 0x80FF, dtype=np.uint16)
    rgb_from_red = palette.getpixel((59, 39))
    alphas = bytes(0 if entry == index else 255 for entry in range(4))
    files = {
        "rgb": (encoded(red), RED),
        "bmp": (encoded(red, "BMP"), RED),
        "webp": (encoded(red, "WEBP", lossless=True), RED),
        "tiff": (encoded(red, "TIFF"), RED),
        "ppm": (encoded(red, "PPM"), RED),
        "gif": (encoded(red, "GIF"), RED),
        "two frames": (encoded(red, "GIF", save_all=True, append_images=[Image.new("RGB", red.size)]), RED),
        "apng": (encoded(red, "PNG", save_all=True, append_images=[Image.new("RGB", red.size)]), RED),
        "bilevel": (encoded(Image.new("1", (30, 20), 1)), WHITE),
        "grey": (encoded(Image.new("L", (30, 20), 77)), (77, 77, 77)),
        "grey clear": (encoded(Image.new("LA", (30, 20), (0, 0))), WHITE),
        "grey keyed": (encoded(Image.new("L", (30, 20), 77), transparency=77), WHITE),
        "alpha": (encoded(clear), WHITE),
        "half": (encoded(half), (255, 127, 127)),
        "webp alpha": (encoded(clear, "WEBP", lossless=True), WHITE),
        "rgb keyed": (encoded(red, transparency=RED), WHITE),
        "palette": (encoded(palette), RED),
        "palette clear": (encoded(palette, transparency=index), WHITE),
        "palette alphas": (encoded(palette, transparency=alphas), WHITE),
        "gif clear": (encoded(palette, "GIF", transparency=rgb_from_red), RED),
        "grey 16": (encoded(Image.fromarray(deep)), (128, 128, 128)),
        "grey 16 tiff": (encoded(Image.fromarray(deep), "TIFF"), (128, 128, 128)),
        "grey 16 big-endian": (big_endian_tiff([0x80FF] * 30), (128, 128, 128)),
        "grey 16 pgm": (b"P5 30 1 65535\n" + b"\x80\xff" * 30, (128, 128, 128)),
        "float": (encoded(Image.new("F", (30, 20), 0.5), "TIFF"), (127, 127, 127)),
        "cmyk": (encoded(Image.new("CMYK", (30, 20), (0, 255, 255, 0)), "TIFF"), RED),
        "cmyk jpeg": (encoded(Image.new("CMYK", (32, 16), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
        "one pixel": (encoded(Image.new("RGB", (1, 1), RED)), RED),
        "panorama": (encoded(marked(3000, 20)), RED),
        "tower": (encoded(marked(10, 2500)), RED),
    }
    return files | {f"orientation {n}": (turned(n), RED) for n in range(1, 9)}


ZOO = zoo()


@pytest.mark.parametrize("name", ZOO)
def test_upper_left_pixel(name: str, recwarn: pytest.WarningsRecorder) -> None:
    data, expected = ZOO[name]
    image = decode(data)
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 1
    assert not recwarn.list


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    np.testing.assert_array_equal(np.asarray(decode(turned(orientation))), np.asarray(marked()))


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = [0, 255, 256, 511, 512, 0x7FFF, 0x8000, 0xFFFF]
    by_hand = [0, 0, 1, 1, 2, 127, 128, 255]
    little = encoded(Image.fromarray(np.array([values], dtype=np.uint16)))
    for data in (little, big_endian_tiff(values)):
        np.testing.assert_array_equal(np.asarray(decode(data))[0, :, 1], by_hand)


def test_the_whole_chain_equals_timm_on_the_zoo() -> None:
    spec = Preprocess(size=(48, 48), crop_pct=0.875, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    reference = timm.data.create_transform(
        48, interpolation="bicubic", crop_pct=0.875, mean=spec.mean, std=spec.std, is_training=False
    )
    for name, (data, _) in ZOO.items():
        image = decode(data)
        fitted = preprocess(image, spec)
        assert fitted.shape == (3, 48, 48), name
        assert fitted.dtype == np.float32
        assert fitted.flags.c_contiguous
        if max(image.size) <= 10 * min(image.size):
            np.testing.assert_array_equal(fitted, reference(image).numpy(), err_msg=name)
