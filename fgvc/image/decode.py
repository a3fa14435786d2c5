"""From a file or bytes to an upright RGB image, with limits that hold before a single pixel is decoded (trap T5)."""

from __future__ import annotations

import stat
import warnings
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from fgvc.types import ImageError

MAX_PIXELS = 50_000_000

# What Pillow decodes by itself. Its full list also has formats that start other programs (EPS: ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")

# By which a file below a folder is taken for an image, in lower case: of data sets, and where folders are predicted or explained.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2")

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """An RGB image: first frame, EXIF orientation applied, transparency on white, 16 bits as the upper 8.

    `formats` narrows FORMATS (MPO, of cameras with two lenses, counts as JPEG). Colour profiles are ignored, as by
    every stack that trains on pixels.
    Raises ImageError; its reason is one of: missing, a directory, not a file, not readable, empty, not an image,
    format not accepted, too many pixels, truncated, corrupt.
    """
    return _decoded(source, max_pixels, formats)[0]


def decode_stored(path: Path) -> tuple[Image.Image, str, bytes]:
    """What `decode` gives, how the file stores colour, in Pillow's words, and its bytes. Raises ImageError likewise."""
    try:
        with _open(path) as stream:
            content = stream.read()
    except (OSError, ValueError):
        content = None  # `decode` finds the word for it
    image, mode = _decoded(path if content is None else content, MAX_PIXELS, None)
    return image, mode, content or b""


def _decoded(source: Path | bytes, max_pixels: int, formats: tuple[str, ...] | None) -> tuple[Image.Image, str]:
    name = source if isinstance(source, Path) else "(bytes)"
    accepted = FORMATS if formats is None else tuple(kind for kind in FORMATS if kind in formats)
    _hush_metadata()
    try:
        with _open(source) as stream, Image.open(stream, formats=accepted) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(name, "too many pixels")
            mode = image.mode
            return _upright_rgb(image), mode
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        reason = "missing"
    except PermissionError:
        reason = "not readable"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = "too many pixels"  # Pillow's own limit, for whoever raised ours above it
    except (UnidentifiedImageError, UserWarning):
        reason = "format not accepted" if formats else "not an image"
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "corrupt"
    except Exception:  # the parsers meet hostile bytes with whatever falls out: struct, zlib, Index, Overflow...
        reason = "corrupt"
    raise ImageError(name, reason) from None


def _hush_metadata() -> None:
    """Pillow warns of odd EXIF, which is no error here, not even where warnings are errors.

    One filter for good, for Pillow's format modules only: `catch_warnings` swaps the process's filters back and forth
    and so is not safe among threads. Warnings about size come from another module and are not touched.
    """
    module = r"PIL\.\w+ImagePlugin"
    if not any(action == "ignore" and where and where.pattern == module for action, _, _, where, _ in warnings.filters):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)


def _open(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise ImageError("(bytes)", "empty")
        return BytesIO(source)
    status = source.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(source, "a directory")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        raise ImageError(source, "not a file")
    if status.st_size == 0:
        raise ImageError(source, "empty")
    return source.open("rb")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata must not cost a good picture
        orientation = 1
    rgb = _rgb(image)
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return rgb if turn is None else rgb.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """A detached RGB copy."""
    if image.mode.startswith("I"):  # I;16*, and I as Pillow's readers of 16-bit grey give it
        grey = image if image.mode == "I" else image.convert("I")
        return grey.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode == "F":
        _, highest = image.getextrema()
        unit = isinstance(highest, (int, float)) and highest <= 1  # floats are a share of white, or 0-255
        return (image.point(lambda value: value * 255.0) if unit else image).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")
