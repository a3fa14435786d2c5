"""The search on a Ray cluster, really started on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fgvc.improvement.on_ray import share_on_ray
from fgvc.improvement.search import SPACE, Space, best_trial, open_study
from fgvc.io.files import as_json

pytest.importorskip("ray", reason="needs the extra `ray`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.allow_hosts(["127.0.0.1"]),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own modules among each other
]


def test_tasks_share_the_study(better: Path, tmp_path: Path) -> None:
    for folder in ("recipes", "runs", "logs"):
        (tmp_path / folder).mkdir()
    recipe = json.loads((better / "task.json").read_text())["task"]["recipe"]
    space = Space(recipe=recipe, epochs=1, seconds=5.0, deadline=time.time() + 60)
    (tmp_path / SPACE).write_text(as_json({name: getattr(space, name) for name in ("recipe", "epochs", "seconds", "deadline")}))
    share_on_ray(tmp_path, space, threads=1, seed=0, tick=lambda running: None)
    study = open_study(tmp_path, 0)
    assert len([trial for trial in study.trials if trial.value is not None]) >= 2
    assert best_trial(tmp_path, 0) is not None
