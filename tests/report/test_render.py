"""Pages: all inside, what users named escaped."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure
from PIL import Image

from fgvc.images.address import picture
from fgvc.report.render import ENVIRONMENT, breakable, chart, render


def test_what_users_named_is_escaped_and_nothing_is_fetched() -> None:
    page = render("base.html", title="<script>alert(1)</script> 藏红花")
    assert "<script" not in page
    assert "藏红花" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http" not in page.replace("http-equiv", "")


def test_a_forgotten_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("base.html")


def test_pictures_are_inside_and_no_larger_than_asked() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 500, 4), dtype=np.uint8)
    kind, content = picture(Image.fromarray(pixels), side=100).split(";base64,")
    assert kind == "data:image/jpeg"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (100, 60)


def test_charts_are_the_same_every_time() -> None:
    def drawing() -> str:
        figure = Figure()
        figure.subplots().plot([1, 2])
        return chart(figure)

    assert drawing() == drawing()
    assert b"<svg" in base64.b64decode(drawing().partition(",")[2])


def test_every_template_compiles() -> None:
    for name in ENVIRONMENT.list_templates(["html"]):
        ENVIRONMENT.get_template(name)


def test_long_names_may_break_and_stay_escaped() -> None:
    assert breakable("a_b/<i>.c-_d") == "a_<wbr>b/&lt;i&gt;.<wbr>c-<wbr>_<wbr>d"
