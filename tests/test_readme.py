"""Every command and every line of Python in the README runs, in the order in which a reader meets them."""

from __future__ import annotations

import re
import runpy
import shlex
from functools import partial
from pathlib import Path

import pytest
import yaml

from fgvc.cli.app import main
from fgvc.config.recipe import Techniques
from fgvc.config.techniques import settings_by_kind
from fgvc.data.drawn import beetles
from fgvc.techniques.registry import build

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def make_small(recipe: Path) -> None:
    """The reader's own recipe, cut down to seconds: a tiny net, three steps."""
    tree = yaml.safe_load(recipe.read_text())
    tree["model"] = {"backbone": "test_efficientnet"}
    tree["image"] = {"size": 64}
    tree["train"] = {"epochs": 1, "max_steps": 3, "batch_size": 8, "workers": 0, "device": "cpu"}
    tree["cache"] = "none"
    tree["export"] = {"exporter": "torchscript"}  # of a second; e2e/test_cli.py has the other exporter
    recipe.write_text(yaml.safe_dump(tree))


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "fgvc", f"the README runs something else: {line}"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert not ended.value.code, f"{line}: exit {ended.value.code}"
    if words[1] == "init":
        make_small(Path(words[3]))


def test_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a drawn set of 6 + 3 pictures a class."""
    monkeypatch.setattr(beetles, "draw_demo", partial(beetles.draw_demo, train_per_class=6, test_per_class=3))
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
        else:
            for line in text.splitlines():
                run(line)


def test_all_techniques_can_be_made_together() -> None:
    assert set(build(Techniques(**{kind: {} for kind in settings_by_kind()}))) == set(settings_by_kind())


def test_the_tables_of_the_docs_are_those_of_the_csv_files(capsys: pytest.CaptureFixture[str]) -> None:
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    assert tables["main"](["--check"]) == 0, capsys.readouterr().out
