"""README, the tutorial and the how-to pages: every command and every line of Python runs, in the order in which a reader meets
them; the Chinese pages have the same ones."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file

from fgvc.cli.app import main
from fgvc.config.recipe import Techniques
from fgvc.config.techniques import settings_by_kind
from fgvc.data.drawn import beetles
from fgvc.io.files import as_json
from fgvc.techniques.registry import build
from tests.conftest import paint
from tests.trained import Once, copied

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
LEAVES = ("cercospora", "healthy", "leaf_miner", "phoma", "rust")
HOW_TO = sorted(path.name for path in (ROOT / "docs/how-to").glob("*.md"))


def make_small(recipe: Path) -> None:
    """The reader's own recipe, cut down to seconds: a tiny net with weights in a file, three steps."""
    tree = yaml.safe_load(recipe.read_text())
    weights = recipe.with_name("tiny.safetensors").resolve()
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), weights)
    Path(f"{weights}.json").write_text(as_json({"mean": [0.5] * 3, "std": [0.25] * 3}))
    tree["model"] = {"backbone": "test_efficientnet", "weights": str(weights)}
    tree["image"] = {"size": 64}
    tree["train"] = {"epochs": 1, "max_steps": 3, "batch_size": 8, "workers": 0, "device": "cpu"}
    tree["cache"] = "none"
    tree["export"] = {"exporter": "torchscript"}  # of a second; e2e/test_cli.py has the other exporter
    recipe.write_text(yaml.safe_dump(tree))


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "fgvc", f"the page runs something else: {line}"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert not ended.value.code, f"{line}: exit {ended.value.code}"
    if words[1] == "init":
        make_small(Path(words[-1]))


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code on a page."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def run_page(page: str) -> set[str]:
    """Execute the blocks of a page; returns their languages."""
    names: dict[str, object] = {"__name__": "page"}
    for kind, text in blocks(page):
        if kind == "python":
            exec(compile(text, page, "exec"), names)
        elif kind == "bash":
            for line in text.splitlines():
                run(line)
    return {kind for kind, _ in blocks(page)}


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a drawn set of 6 + 3 pictures a class."""
    monkeypatch.setattr(beetles, "draw_demo", partial(beetles.draw_demo, train_per_class=6, test_per_class=3))
    monkeypatch.chdir(tmp_path)
    assert "bash" in run_page("README.md")


@pytest.fixture(scope="module")
def tutorial(once: Once) -> Callable[[Path], Path]:
    """The folder in which somebody has followed the tutorial, as a copy below a folder of one's own."""

    def follow(place: Path) -> None:
        for number, name in enumerate(LEAVES):
            for split, count in (("train", 10), ("test", 3)):
                for i in range(count):
                    colour = (40 * number + 30, 140, 200 - 35 * number)
                    paint(place / "leaves" / split / name / f"{i}.jpg", colour, seed=1000 * number + 10 * len(split) + i)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            assert {"bash", "python"} <= run_page("docs/tutorial.md")

    return lambda folder: copied(once.made("tutorial", follow), folder)


def test_the_tutorial_runs(tutorial: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = tutorial(tmp_path)
    assert (folder / "drop-in" / "model.onnx").is_file()
    assert (folder / "runs" / "plain" / "ckpt" / "start" / "floor.safetensors").is_file()


@pytest.mark.parametrize("page", HOW_TO)
def test_the_how_to_pages_run(
    page: str, tutorial: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the tutorial, with what it made."""
    if {"bash", "python"} & {kind for kind, _ in blocks(f"docs/how-to/{page}")}:
        monkeypatch.chdir(tutorial(tmp_path))
        run_page(f"docs/how-to/{page}")


def test_the_readme_is_read_in_a_few_minutes() -> None:
    for page in ("README.md", "README.zh-CN.md"):
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 150, page


@pytest.mark.parametrize("page", ["README", "docs/tutorial"])
def test_the_chinese_pages_have_the_same_code_and_links(page: str) -> None:
    english, chinese = ((ROOT / f"{page}{suffix}.md").read_text(encoding="utf-8") for suffix in ("", ".zh-CN"))
    without_comments = [
        [(kind, re.sub(r"[ \t]+# .*$", "", code, flags=re.MULTILINE)) for kind, code in BLOCK.findall(text)]
        for text in (english, chinese)
    ]
    assert without_comments[0] == without_comments[1]
    links = [{link.replace(".zh-CN", "") for link in LINK.findall(text) if "#" not in link} for text in (english, chinese)]
    assert links[0] == links[1]
    rows = [re.findall(r"[-+]?\d+(?:\.\d+)?", BLOCK.sub("", text)) for text in (english, chinese)]
    assert sorted(rows[0]) == sorted(rows[1]), "a number stands on one of the pages alone"


def test_all_techniques_can_be_made_together() -> None:
    assert set(build(Techniques(**{kind: {} for kind in settings_by_kind()}))) == set(settings_by_kind())
