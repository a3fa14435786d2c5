"""The report in a real browser, on a phone, on a desk and on paper."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from fgvc.api import report
from fgvc.config.recipe import Recipe
from fgvc.training import trainer
from tests.report.browser import browser, pdf, problems

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"])  # where selenium's driver listens


@pytest.fixture
def pages(recipe_tree: dict, tmp_path: Path) -> list[Path]:
    """A report of one run and one of two, whose names are long."""
    folder = tmp_path / "reports"
    runs = [folder / "a", folder / ("a_name_without_a_single_place_to_break_it_" * 2)]
    for run, techniques in zip(runs, ({}, {"dcl": {"grid": 2}}), strict=True):
        tree = recipe_tree | {"techniques": techniques, "train": recipe_tree["train"] | {"epochs": 1, "max_steps": 2}}
        trainer.train(Recipe.model_validate(tree), run)
    return [report(runs[1:], folder / "one.html", images=2), report(runs, folder / "two.html", images=2)]


def test_pages_fit_phone_desk_and_paper(pages: list[Path]) -> None:
    with browser() as chrome:
        for page in pages:
            for width in (390, 1280):
                assert problems(chrome, page, width=width) == []
            content, sheets = pdf(chrome)
            assert content.startswith(b"%PDF")
            assert 2 <= sheets <= 40


def test_problems_lists_all_that_is_wrong_with_a_page(tmp_path: Path) -> None:
    """The check itself can fail."""
    page = tmp_path / "page.html"
    broken = base64.b64encode(b"no picture").decode()
    page.write_text(
        f'<div style="width: 2000px">wide</div><img alt="gone" src="data:image/png;base64,{broken}">'
        '<img alt="fetched" src="other.png"><script>console.error("oh")</script>'
    )
    with browser() as chrome:
        faults = "\n".join(problems(chrome, page, width=390))
        assert problems(chrome, tmp_path / "none.html", width=390)
    for expected in ("pixels wide", "missing: gone", "oh", "asked for file://"):
        assert expected in faults
