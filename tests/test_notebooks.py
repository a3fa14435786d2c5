"""The notebooks run from top to bottom, in plain Python, on a drawn set of a few pictures."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgvc.data.drawn import beetles
from tests.trained import Once, copied

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
RUN: Callable[[Path], dict[str, Any]] = runpy.run_path(str(EXAMPLES / "notebook.py"))["run"]


@pytest.fixture(scope="module")
def place(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a drawn set of 6 + 3 pictures of each of three classes."""

    def draw(folder: Path) -> None:
        beetles.draw_demo(folder / "beetles", classes=3, train_per_class=6, test_per_class=3)

    return copied(once.made("notebooks", draw), tmp_path_factory.mktemp("notebooks"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader does: what the first has trained is not trained again."""
    monkeypatch.chdir(place)
    cells = [cell for cell in RUN(EXAMPLES / name)["cells"] if cell["cell_type"] == "code"]
    shown = [
        output["data"] for cell in cells for output in cell["outputs"] if output["output_type"] == "execute_result"
    ]
    assert len([data for data in shown if "text/html" in data]) >= 5
    assert all("\n" not in "".join(data["text/plain"]) for data in shown)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_short_cells_of_prose_and_code(name: str) -> None:
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert cells[0]["cell_type"] == "markdown"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(len(cell["source"]) <= 10 for cell in code)
    assert len((EXAMPLES / name).read_bytes()) < 1_000_000
