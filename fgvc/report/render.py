"""Rendering of self-contained HTML: pictures inside the file, no script, nothing fetched. Templates lie beside this file."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,  # class names and paths are the user's
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def breakable(text: str) -> Markup:
    """Escape text, with a break opportunity after each of _ / . and -: class names and paths have no spaces."""
    return Markup(re.sub(r"([_/.-])(?=\w)", r"\1<wbr>", str(escape(text))))


ENVIRONMENT.filters["breakable"] = breakable


def render(template: str, **context: Any) -> str:
    """Render a page from `template`; it extends `base.html`, which needs `title`."""
    return ENVIRONMENT.get_template(template).render(**context)


def picture(image: Image.Image, *, side: int = 224, quality: int = 80) -> str:
    """Encode an image as a data address (JPEG), no side longer than `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _address("jpeg", small, quality=quality)


def svg(figure: Figure, **metadata: str) -> bytes:
    """Encode a figure as an SVG file: the same bytes each time. `metadata`: Dublin Core, such as Description."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "fgvc"}):  # else each file has names of its own inside
        figure.savefig(content, format="svg", metadata={"Date": None, **metadata})
    return content.getvalue()


def chart(figure: Figure) -> str:
    """Encode a figure as a data address (SVG): sharp on paper and on any screen."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg(figure)).decode()}"


def _address(kind: str, image: Image.Image, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
