"""The page at `/`: one file, with its style and script inside, that loads nothing from any other host.

A policy names both by their hashes: whatever else gets into the page, by a class name or a proxy, neither runs nor loads.
Scripts cannot write markup either (trusted types).
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")


def _source(tag: str) -> str:
    """Hash of the page's one element `tag`, as a Content-Security-Policy names it."""
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


CSP = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_source('script')}",
        f"style-src {_source('style')}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The value of the header Content-Security-Policy that PAGE is sent with."""
