"""Pictures as data addresses, which a page holds in itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image


def picture(image: Image.Image, *, side: int = 224, quality: int = 80) -> str:
    """Encode an image as a data address (JPEG), no side longer than `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "jpeg", quality=quality)
    return address(content.getvalue(), kind="jpeg")


def address(file: Path | bytes, *, kind: str = "png") -> str:
    """The data address of an encoded picture, a file or its bytes."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
