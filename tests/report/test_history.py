"""What a run wrote down, whatever happened to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fgvc.errors import FgvcError
from fgvc.report import html_charts
from fgvc.report.html_charts import curves, terms
from fgvc.runs.history import History, read_history


def written(run: Path, events: list[dict], table: str = "", environment: dict | None = None) -> History:
    run.mkdir()
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    (run / "metrics.csv").write_text(table)
    (run / "env.json").write_text(json.dumps(environment or {}))
    return read_history(run)


def step(number: int, lr: float) -> dict:
    return {"event": "step", "step": number, "lr": lr}


def test_of_steps_done_twice_the_last_count_and_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    events = [{"event": "start", "time": 86400 * 365.0}, step(10, 0.1), step(20, 0.3), {"event": "resume", "step": 10}]
    history = written(tmp_path / "run", [*events, step(20, 0.2), {"event": "finished", "seconds": 12.5}])
    assert history.rates == ((10, 0.1), (20, 0.2))
    assert (history.started, history.seconds) == ("1971-01-01", 12.5)


def test_a_run_that_goes_on_is_not_finished_and_one_that_never_began_has_no_past(tmp_path: Path) -> None:
    assert written(tmp_path / "a", [{"event": "finished", "seconds": 1.0}, {"event": "resume"}]).seconds is None
    (tmp_path / "b").mkdir()
    history = read_history(tmp_path / "b")
    assert (history.epochs, history.seconds, history.command, history.machine) == ((), None, "", "")
    assert curves(["b"], [history]) == []


def test_columns_of_techniques_and_the_command_for_a_shell(tmp_path: Path) -> None:
    table = (
        "epoch,step,lr,base,dcl.location,acol.erased,dcl.destroyed,l1,loss,val_top1,val_loss\n1,5,0.1,2,0.1,0.2,0.3,0.4,3,,\n"
    )
    words = ["train", "my recipe.yaml", "data.root=a&b"]
    machine = {"command": words, "cpu": "X", "cores": 2, "torch": "2", "onnx": None}
    history = written(tmp_path / "run", [], table, machine)
    assert history.terms == {"dcl": ["dcl.location", "dcl.destroyed"], "acol": ["acol.erased"]}
    assert "val_top1" not in history.epochs[0]
    assert history.command == "fgvc train 'my recipe.yaml' 'data.root=a&b'"
    assert (history.machine, history.versions) == ("X, 2 cores", "torch 2")
    assert [chart.title for chart in terms(history)] == ["dcl", "acol"]
    assert [chart.title for chart in curves(["run"], [history])] == ["Loss", "Learning rate"]


def test_runs_with_names_in_chinese_are_drawn_without_a_warning(tmp_path: Path) -> None:
    table = "epoch,step,lr,loss,val_top1,val_loss\n1,5,0.1,3,0.5,1\n2,10,0,2,0.6,0.9\n"
    histories = [written(tmp_path / name, [], table) for name in "ab"]
    assert [chart.title for chart in curves(["麻雀", "<b>"], histories)] == [
        "Loss",
        "Validation top-1",
        "Learning rate",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", "epoch,step\n1,many\n"),
        ("metrics.csv", "epoch,step,lr,loss\n1,5,0.1,\n"),
        ("metrics.csv", "a picture, say\n\x00\n"),
        ("env.json", "[1]"),
        ("env.json", "{"),
        ("events.jsonl", '{"event": "step", "step": "ten", "lr": 1}\n'),
        ("events.jsonl", '{"event": "step"}\n'),
        ("events.jsonl", '{"event": "start", "time": 1e30}\n'),
        ("events.jsonl", '{"event": "finished"}\n'),
        ("events.jsonl", '{"event": "finished", "seconds": [1]}\n'),
        ("events.jsonl", '{"event": "start", "time": null}\n'),
    ],
)
def test_what_fgvc_did_not_write_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FgvcError, match=rf"{tmp_path}/{name}: not as fgvc wrote it \(.*; mend or remove it"):
        read_history(tmp_path)


def test_training_is_dotted_beside_a_validated_run_and_solid_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated = written(tmp_path / "a", [], "epoch,step,lr,loss,val_top1,val_loss\n1,5,0.1,3,0.5,1\n2,10,0,2,0.6,0.9\n")
    alone = written(tmp_path / "b", [], "epoch,step,lr,loss\n1,5,0.1,3\n2,10,0,2\n")
    charts: list[list[tuple[str, list[float]]]] = []
    keep = lambda figure: charts.append([(x.get_ls(), list(x.get_ydata())) for x in figure.axes[0].lines])  # noqa: E731
    monkeypatch.setattr(html_charts, "chart", keep)
    curves(["a", "b"], [validated, alone])
    assert charts[0] == [(":", [3, 2]), ("-", [1, 0.9]), (":", [3, 2])]
    charts.clear()
    curves(["b"], [alone])
    assert charts[0] == [("-", [3, 2])]
