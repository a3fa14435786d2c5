"""Example pictures, which the page offers to whoever has none at hand. They are read once, when the server starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from fgvc.config.images import MAX_PIXELS
from fgvc.images.decode import decode
from fgvc.runtime.predict import expand

MOST = 8  # pictures
SIDE = 640  # pixels of the longer side


@dataclass(frozen=True, slots=True)
class Example:
    """A picture as a JPEG, and the name of its file."""

    name: str
    jpeg: bytes


def read_examples(paths: Sequence[Path], *, max_pixels: int = MAX_PIXELS) -> tuple[Example, ...]:
    """Read pictures of files and folders: of more than MOST, as many spread evenly over them. Raises FgvcError for a path that
    does not exist, and ImageError for a picture that can't be read."""
    files = list(expand(paths))
    count = min(MOST, len(files))
    chosen = [files[(2 * at + 1) * len(files) // (2 * count)] for at in range(count)]
    return tuple(Example(path.name, _jpeg(decode(path, max_pixels=max_pixels))) for path in chosen)


def _jpeg(image: Image.Image) -> bytes:
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = BytesIO()
    image.save(content, "jpeg", quality=92)
    return content.getvalue()
