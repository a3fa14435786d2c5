"""The page of a data check: all findings with their images, bounded, nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.dtypes import StringDType
from PIL import Image

from fgvc.data.index import ImageIndex
from fgvc.data.quality.checks import Report, check, with_suspects
from fgvc.data.quality.colour import Normalisation
from fgvc.data.quality.suspects import Suspect, Suspects
from fgvc.report import data
from fgvc.report.data import data_page


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Two classes with awkward names; an image in three parts, a tiny one, one that can't be read."""
    paths = []
    for number in range(9):
        cells = np.random.default_rng(0 if number in (0, 4, 8) else number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        size = (20, 20) if number == 1 else (90, 60)
        Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
        paths.append(f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    index = ImageIndex(
        root=tmp_path,
        classes=("a <b>", "锈病"),
        paths=np.array(paths, dtype=StringDType()),
        labels=np.arange(9, dtype=np.int32) % 2,
        splits=np.array([0] * 4 + [1] * 2 + [2] * 3, np.int8),
        recognised="made by hand",
    )
    checked = check(index, max_unreadable=1, expected=Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    return with_suspects(checked, Suspects((Suspect(row=3, label=1, suggested=0, p_label=0.04, p_suggested=0.93),), 1))


def test_all_findings_are_there_with_their_images(report: Report) -> None:
    page = data_page(report)
    assert page == data_page(report)
    assert "1 error, " in page
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', page)) == 3 + 1
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert "锈病" in page
    for words in ("more than one split", "not an image", "20 x 20", "93 %", "made by hand"):
        assert words in page, words
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)


def test_what_is_shown_is_bounded(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "GROUPS", 0)
    monkeypatch.setattr(data, "SUSPECTS", 0)
    monkeypatch.setattr(data, "LINES", 0)
    page = data_page(report)
    assert "<img" not in page
    assert "And 1 more, all in the CSV file" in page


def test_a_clean_set_says_so(report: Report) -> None:
    page = data_page(with_suspects(check(report.index, max_unreadable=1), Suspects((), 0)))
    assert "None." in page
    assert '<td class="number">?</td>' in page
