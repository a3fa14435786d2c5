"""Decoding of a file or bytes to an upright RGB image, with limits that are checked before any pixel is decoded.

A PNG of one bit a pixel can have 13,000 x 13,000 pixels in 20 kB; as RGB that takes half a gigabyte. Pillow by itself only
warns of it.
"""

from __future__ import annotations

import re
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fgvc.config.images import MAX_PIXELS
from fgvc.errors import ImageError
from fgvc.images.suffix import TGA
from fgvc.images.upright import UPRIGHT, orientation_of, turned, turned_sides

# What Pillow decodes by itself. Its full list also has formats that start other programs (EPS: ghostscript).
RAISE_LIMIT = "; data.max_megapixels or --megapixels raise it"  # said to who runs fgvc, not to a client of its server
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")

@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture, and how its file stores it."""

    image: Image.Image  # RGB, upright; reduced if it is a JPEG of more than MAX_PIXELS
    stored: tuple[int, int]  # width and height in the file; boxes are in these pixels
    orientation: int  # EXIF's, see fgvc.images.upright
    mode: str  # Pillow's
    bits: int = 8  # of a value of a channel
    extremes: tuple[float, float] | None = None  # smallest and largest stored value, of one channel with more than 8 bits

    @property
    def size(self) -> tuple[int, int]:
        """Width and height upright, before any reduction."""
        return turned_sides(self.stored, self.orientation)


def decode(
    source: Path | bytes, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode to an RGB image: first frame, EXIF orientation applied, transparency on white, the upper 8 bits of more.

    A JPEG of more than MAX_PIXELS, if `max_pixels` allows it, is decoded at 1/2, 1/4 or 1/8 of its sides, the largest of
    at most MAX_PIXELS, so that training, evaluation and serving see the same. `formats` narrows FORMATS (MPO, of cameras with
    two lenses, counts as JPEG). Colour profiles are ignored, as by every stack that trains on pixels.
    Raises ImageError; its reason begins with one of: missing, a directory, not a file, not readable, empty, not an image,
    format not accepted, too many pixels (with how many, and the limit), truncated, corrupt.
    """
    return read_picture(source, max_pixels=max_pixels, formats=formats).image


def read_picture(
    source: Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
    name: Path | None = None,
) -> Picture:
    """Decode as `decode` does, with its errors; returns the image and how it is stored. `name`: the file that bytes come from,
    for messages."""
    where = source if isinstance(source, Path) else (name or "(bytes)")
    _hush_metadata()
    _allow(max_pixels)
    try:
        with _open(source, where) as stream, Image.open(stream, formats=_accepted(where, formats)) as image:
            _refuse_large(image, max_pixels, where)
            return _read(image)
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError:
        reason = "missing"
    except PermissionError:
        reason = "not readable"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = re.search(r"\d+", str(error))  # Pillow's own limit, above ours: only its message has the count
        reason = _too_many(f"{int(count[0]) / 1e6:.4g}" if count else "more", max_pixels)
    except (UnidentifiedImageError, UserWarning):
        reason = "format not accepted" if formats else "not an image"
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else "corrupt"
    except Exception:  # hostile bytes make the parsers raise anything: struct, zlib, Index, Overflow...
        reason = "corrupt"
    raise ImageError(where, reason) from None


def as_rgb(image: Image.Image | NDArray[np.uint8], name: str) -> Image.Image:
    """An image of Pillow, or pixels (H,W), (H,W,3) in RGB or (H,W,4) in RGBA, as `decode` makes it of a file. Raises ImageError
    for what is neither, under `name`."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ImageError(name, f"pixels are uint8 (H,W), (H,W,3) in RGB or (H,W,4) in RGBA, not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ImageError(name, f"not a path, a PIL image or a numpy array, but {type(image).__name__}")
    try:
        return _read(image).image
    except OSError as error:  # a file that Pillow has opened and not yet read
        raise ImageError(name, "truncated" if "truncated" in str(error) else "corrupt") from error


def _accepted(where: object, formats: tuple[str, ...] | None) -> tuple[str, ...]:
    named = (*FORMATS, "TGA") if str(where).lower().endswith(TGA) else FORMATS
    return named if formats is None else tuple(kind for kind in named if kind in formats)


def _allow(pixels: int) -> None:
    """Raise Pillow's own limit of the process to `pixels`, if that is larger."""
    if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = pixels


def _refuse_large(image: Image.Image, limit: int, where: object) -> None:
    if (pixels := image.width * image.height) > limit:
        digits = next((d for d in range(1, 7) if round(pixels / 1e6, d) > limit / 1e6), 6)
        raise ImageError(where, _too_many(f"{image.width} x {image.height} = {pixels / 1e6:.{digits}f}", limit))


def _too_many(count: str, limit: int) -> str:
    return f"too many pixels: {count} megapixels, the limit is {limit / 1e6:g}{RAISE_LIMIT}"


def _read(image: Image.Image) -> Picture:
    stored = image.size
    if image.format in ("JPEG", "MPO") and stored[0] * stored[1] > MAX_PIXELS:
        scale = next((s for s in (2, 4) if -(-stored[0] // s) * -(-stored[1] // s) <= MAX_PIXELS), 8)
        image.draft(None, (stored[0] // scale, stored[1] // scale))
    mode, bits = image.mode, _bits(image)
    before = orientation_of(image) if image.format == "TIFF" else UPRIGHT
    image.load()
    orientation = after = orientation_of(image)
    if before != UPRIGHT == after:  # Pillow turns a TIFF as it loads it
        orientation, stored = before, turned_sides(image.size, before)
    single = bits > 8 and len(image.getbands()) == 1
    whole = image.convert("I") if image.mode.startswith("I") else image  # Pillow has no extremes of big-endian values
    extremes = whole.getextrema() if single else None
    return Picture(
        image=turned(_rgb(image, bits), after),
        stored=stored,
        orientation=orientation,
        mode=mode,
        bits=bits,
        extremes=None if extremes is None else (float(extremes[0]), float(extremes[1])),  # type: ignore[arg-type]
    )


def _bits(image: Image.Image) -> int:
    """Bits of a value as the file stores it. Pillow scales other numbers of bits to 8 or 16, but for the 12 bits of a TIFF."""
    tiles = getattr(image, "tile", [])
    raw = " ".join(str(item) for tile in tiles for item in (tile[3] if isinstance(tile[3], tuple) else (tile[3],)))
    if "I;12" in raw:
        return 12
    if image.mode.startswith("I;16") or ";16" in raw or (image.mode == "I" and image.format == "PPM"):
        return 16
    return 32 if image.mode in ("I", "F") else 8


def _hush_metadata() -> None:
    """Ignore Pillow's warnings of odd EXIF, also where warnings are errors.

    One permanent filter, for Pillow's format modules only: `catch_warnings` replaces the filters of the whole process, which is
    not safe with threads. Warnings about size come from another module and stay.
    """
    module = r"PIL\.\w+ImagePlugin"
    if not any(action == "ignore" and where and where.pattern == module for action, _, _, where, _ in warnings.filters):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)


def _open(source: Path | bytes, where: object) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise ImageError(where, "empty")
        return BytesIO(source)
    status = source.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(source, "a directory")
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
        raise ImageError(source, "not a file")
    if status.st_size == 0:
        raise ImageError(source, "empty")
    return source.open("rb")


def read_content(path: Path) -> bytes:
    """All bytes of a file. Raises ImageError as `decode` does if it can't be read."""
    try:
        with _open(path, path) as stream:
            return stream.read()
    except ImageError:
        raise
    except FileNotFoundError:
        reason = "missing"
    except PermissionError:
        reason = "not readable"
    except (OSError, ValueError):
        reason = "corrupt"
    raise ImageError(path, reason) from None


def _rgb(image: Image.Image, bits: int) -> Image.Image:
    """A detached RGB copy."""
    if image.mode.startswith("I"):  # I;16*, and I as Pillow's readers of 16-bit grey give it
        grey = image if image.mode == "I" else image.convert("I")
        share = 1 / 16 if bits == 12 else 1 / 256
        return grey.point(lambda value: value * share).convert("L").convert("RGB")
    if image.mode == "F":
        _, highest = image.getextrema()
        unit = isinstance(highest, (int, float)) and highest <= 1  # floats are a share of white, or 0-255
        return (image.point(lambda value: value * 255.0) if unit else image).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")
