"""Rendering of self-contained HTML: pictures inside the file, no script, nothing fetched. Templates lie beside this file."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from fgvc.images.address import address

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


def svg(figure: Figure, **metadata: str) -> bytes:
    """Encode a figure as an SVG file: the same bytes each time. `metadata`: Dublin Core, such as Description."""
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "fgvc"}):  # else each file has names of its own inside
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, **metadata})
    return content.getvalue()


def chart(figure: Figure) -> str:
    """Encode a figure as a data address (SVG): sharp on paper and on any screen."""
    return address(svg(figure), kind="svg+xml")
