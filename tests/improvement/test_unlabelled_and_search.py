"""More images without labels, and a search around the winner, from the plan to the verdict."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgvc import api
from fgvc.improvement import rungs
from fgvc.improvement.improve import run_improvement
from fgvc.improvement.ladder import TAUGHT
from fgvc.improvement.search import Space
from tests.improvement.conftest import NAMES, draw, planned, request_for


def test_a_student_learns_from_images_that_a_teacher_has_named(
    deployed: Path, pictures: Path, tmp_path: Path
) -> None:
    for n in range(20):
        draw(tmp_path / "field" / f"{n:02d}.png", NAMES[n % 5], 8000 + n)
    request, out = request_for(deployed, pictures, unlabelled=tmp_path / "field"), tmp_path / "better"
    plan = planned(request, out, TAUGHT, step=9)
    assert [rung.name for rung in plan.rungs] == ["probe-deployed", "base", "student", "final", "plain"]
    result = run_improvement(request, out)
    assert result.verdict is not None
    assert result.exit_code == 0
    rows = list(csv.DictReader((out / "images-named.csv").read_text().splitlines()))
    named = {Path(row["path"]).name: row["label"] for row in rows if "/field/" in row["path"]}
    assert len(named) >= 15
    assert sum(label == NAMES[int(name[:2]) % 5] for name, label in named.items()) >= 0.8 * len(named)
    assert {row["split"] for row in rows if "/field/" in row["path"]} == {"train"}
    student = api.load_recipe(out / "recipes" / "student.yaml")
    assert student.data.model_dump()["file"] == out / "images-named.csv"
    assert f"names {len(named)} of the 20 images without labels" in (out / "improve.log").read_text()


def test_a_search_goes_on_from_the_winner(
    deployed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = rungs.search

    def shorter(out: Path, space: Space, **options: Any) -> None:
        assert space.deadline > time.time() + 60
        search(out, replace(space, seconds=2, deadline=time.time() + 10), **options)

    monkeypatch.setattr(rungs, "search", shorter)
    request, out = request_for(deployed, pictures, search=True), tmp_path / "better"
    assert planned(request, out, TAUGHT, step=5).search
    result = run_improvement(request, out)
    assert result.verdict is not None
    choices = json.loads((out / "rungs.json").read_text())["choices"]
    trials = sorted(path.name for path in (out / "runs").glob("trial-*"))
    assert trials
    assert choices["searched"] in {choices["best"], *trials}
    assert run_improvement(request, out).exit_code == result.exit_code
