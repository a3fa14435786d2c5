"""The measurement itself, on a small scale: it ends, counts everything, and knows its bounds."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pytest

from fgvc.errors import FgvcError
from fgvc.studies import serving_speed as bench
from fgvc.studies.serving_speed import bench_serve, show_figures, write_figures
from tests.serving.small import save_bundle

pytestmark = pytest.mark.allow_hosts(["127.0.0.1", "localhost", "::1"])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the server needs a core of its own")
def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "BLOCK", 4)
    cpus = os.sched_getaffinity(0)
    figures = {figure.name: figure for figure in bench_serve(save_bundle(tmp_path / "a"), seconds=0.3)}
    assert os.sched_getaffinity(0) == cpus
    assert figures["overload: neither answered nor refused"].value == 0
    assert figures["overload: offered"].value <= bench.OVERLOAD * figures["classify: peak goodput"].value
    # What the times are is the machine's affair, and of whoever else uses it.
    assert all(math.isfinite(figure.value) for name, figure in figures.items() if name.startswith("infer"))
    assert figures["infer: p50, one at a time"].value <= figures["infer: p95, one at a time"].value
    assert math.isfinite(figures["overload: p99 of the answered"].value)
    show_figures(list(figures.values()))
    assert "throughput" in capsys.readouterr().out
    write_figures(tmp_path / "out/figures.csv", list(figures.values()))
    with (tmp_path / "out/figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(figures)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save_bundle(tmp_path / "a")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(FgvcError, match="needs two CPUs"):
        bench_serve(bundle)
