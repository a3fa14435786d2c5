"""The pages of `fgvc compare` and `fgvc data check` in a real browser, on a phone and on a desk, with names that are long."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fgvc import api
from fgvc.config.data import FolderData
from fgvc.data.quality.checks import check, with_suspects
from fgvc.data.quality.suspects import Suspect, Suspects
from fgvc.data.sources.read import read_source
from fgvc.report.compare import write_page
from fgvc.report.data import data_page
from tests.report.browser import browser, pdf, problems
from tests.serving import small

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"])  # where selenium's driver listens

LONG = "Ampelopsis_glandulosa_var_brevipedunculata_" * 4
NAMES = [LONG + "red", "UnbrokenNameOfAClassWithoutASinglePlaceToBreakIt" * 2, "蓝" * 40]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Class folders; in each a picture of its colour, a second that looks the same, a tiny one, and a broken one."""
    for name, colour in zip(NAMES, ((250, 20, 10), (20, 250, 10), (10, 20, 250)), strict=True):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        pixels = Image.effect_noise((90, 60), 80).convert("RGB")
        noisy = Image.blend(pixels, Image.new("RGB", (90, 60), colour), 0.7)
        for at, side in enumerate((1.0, 0.9, 0.2)):
            noisy.resize((round(90 * side), round(60 * side))).save(folder / f"{'no_place_to_break_in_it' * 8}{at}.png")
        (folder / f"{'broken' * 30}.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def compared(pictures: Path, folder: Path) -> Path:
    """The second names what is darkest: every image flips."""
    a, b = (
        small.save_bundle(folder / (LONG + side), scale=scale, labels=NAMES) for side, scale in (("a", 10), ("b", -10))
    )
    write_page(api.compare(a, b, data=str(pictures)), folder / "compare.html", failures=["9 negative flips, more than 0"])
    return folder / "compare.html"


def checked(pictures: Path, folder: Path) -> Path:
    index = read_source(FolderData(root=pictures, val_fraction=0, test_fraction=0.3))
    report = with_suspects(check(index), Suspects((Suspect(row=1, label=0, suggested=1, p_label=0.04, p_suggested=0.93),), 1))
    assert report.near
    assert report.unreadable
    assert report.tiny
    (folder / "check.html").write_text(data_page(report), encoding="utf-8")
    return folder / "check.html"


def test_pages_fit_phone_desk_and_paper(pictures: Path, tmp_path: Path) -> None:
    pages = [compared(pictures, tmp_path), checked(pictures, tmp_path)]
    for page in pages:
        assert page.read_text(encoding="utf-8").count('<img src="data:image/jpeg;base64,') >= 6
    with browser() as chrome:
        for page in pages:
            for width in (390, 1280):
                assert problems(chrome, page, width=width) == [], page.name
            content, sheets = pdf(chrome)
            assert content.startswith(b"%PDF")
            assert 1 <= sheets <= 10
