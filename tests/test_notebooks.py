"""The notebooks run from top to bottom, in plain Python, on a drawn set of a few pictures and with a tiny net."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from fgvc.data.drawn import beetles
from fgvc.io.files import as_json
from tests.trained import Once, copied

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
RUN: Callable[[Path], dict[str, Any]] = runpy.run_path(str(EXAMPLES / "notebook.py"))["run"]
SMALL = {
    "model": {"backbone": "test_efficientnet", "weights": "tiny.safetensors"},
    "image": {"size": 64},
    "train": {"epochs": 1, "batch_size": 8, "workers": 0, "device": "cpu"},
    "export": {"exporter": "torchscript"},
}  # of settings: seconds instead of minutes


@pytest.fixture(scope="module")
def place(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a drawn set of 6 + 3 pictures of each of three classes, and weights of a tiny net."""

    def draw(folder: Path) -> None:
        beetles.draw_demo(folder / "beetles", classes=3, train_per_class=6, test_per_class=3)
        save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), folder / "tiny.safetensors")
        (folder / "tiny.safetensors.json").write_text(as_json({"mean": [0.5] * 3, "std": [0.25] * 3}))

    return copied(once.made("notebooks", draw), tmp_path_factory.mktemp("notebooks"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, as a reader does: what the first has trained is not trained again."""
    monkeypatch.chdir(place)
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    (cell,) = (cell for cell in notebook["cells"] if any(line.startswith("settings = ") for line in cell["source"]))
    at = next(at for at, line in enumerate(cell["source"]) if line.startswith("settings = "))
    cell["source"][at : at + 1] = [cell["source"][at].rstrip() + "\n", f"settings |= {SMALL}\n"]
    Path(name).write_text(json.dumps(notebook), encoding="utf-8")
    cells = [cell for cell in RUN(Path(name))["cells"] if cell["cell_type"] == "code"]
    results = [
        output["data"] for cell in cells for output in cell["outputs"] if output["output_type"] == "execute_result"
    ]
    assert len([data for data in results if "text/html" in data]) >= 5
    assert all("\n" not in "".join(data["text/plain"]) for data in results)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_notebook_is_short_cells_of_prose_and_code(name: str) -> None:
    notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert cells[0]["cell_type"] == "markdown"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(len(cell["source"]) <= 10 for cell in code)
    assert len((EXAMPLES / name).read_bytes()) < 1_500_000
