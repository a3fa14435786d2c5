"""What the command line prints fits 80 columns without a character lost, and names the next command."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from fgvc.cli import show
from fgvc.cli.app import main
from fgvc.evaluation.metrics import Scores
from fgvc.training.forecast import Forecast


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(show, "console", Console(file=text, width=80, highlight=False))
    return text


def test_the_scores_are_one_line(screen: io.StringIO) -> None:
    scores = Scores(
        confusion=np.diag([5000, 5000]), top1=1.0, top5=1.0, macro_f1=1.0, balanced_accuracy=1.0, ece=0.1234, loss=12.3456,
        images=10000,
    )  # fmt: skip
    result = SimpleNamespace(
        split="test", select="floor", scores=scores, classes=("a", "b"), calibrated=None, stored=False, unreadable=(), judged="",
        over_floor=None,
    )  # fmt: skip
    show.scores(result)  # type: ignore[arg-type]
    head, row, *_ = screen.getvalue().splitlines()
    assert head.split()[0] == "split"
    assert head.endswith("loss")
    assert row.split() == ["test", "floor", "10000", "100.00", "100.00", "100.00", "100.00", "12.34", "12.3456"]
    assert max(len(head), len(row)) <= 80


def test_a_long_name_is_folded_and_not_cut(screen: io.StringIO) -> None:
    name = "the_very_long_name_of_a_class_" * 6
    table = show.make_table("most changed", "images", "A %", "B %", "change", "lost", "won")
    table.add_row(name, "1000", "100.0", "100.0", "+100.0", "1000", "1000")
    show.console.print(table)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in screen.getvalue()
    assert "".join(line.split()[0] for line in lines[1:]) == name


def test_times_are_about_so_long(screen: io.StringIO) -> None:
    parts = {"start-up": 20.0, "training": 3000.0, "validation": 130.0, "export": 41.0}
    costs = Forecast(
        recipe=None, images={"train": 10}, steps=3, forwards=1, parameters=1, step_seconds=0.1, hours=1, parts=parts,
        peak_bytes=1, techniques={}, notes=(),
    )  # type: ignore[arg-type]  # fmt: skip
    show.forecast(costs)
    rows = dict(line.strip().split(None, 1) for line in screen.getvalue().splitlines() if not line.startswith("all"))
    assert rows["start-up"] == "about 20 s"
    assert rows["training"] == "about 50 min"
    assert rows["validation"] == "about 2 min"
    assert "about 55 min, from the start to the bundle" in screen.getvalue()


@pytest.mark.parametrize(
    ("command", "following"),
    [
        ("recipes", "next: fgvc init any/plain my.yaml"),
        ("init any/plain my.yaml", "next: fgvc data check my.yaml data.root=IMAGES"),
        ("data check {data}", "next: fgvc train {data}"),
    ],
)
def test_a_verb_names_the_next_command(
    command: str,
    following: str,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.format(data=colours).split())
    assert not ended.value.code
    assert capsys.readouterr().err.splitlines()[-1] == following.format(data=colours)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_recipes_and_settings(shell: str) -> None:
    from fgvc.cli.option import complete_recipe, complete_setting

    assert complete_recipe("any/") == ["any/best", "any/fast", "any/good", "any/plain"]
    assert "train.epochs=" in complete_setting("train.")
    assert complete_setting("nothing.") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELL", f"/bin/{shell}")
        patch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
        with pytest.raises(SystemExit) as ended:
            main(["--show-completion", shell])
    assert not ended.value.code
