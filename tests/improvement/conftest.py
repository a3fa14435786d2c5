"""A small deployed file, and pictures: a train split to learn from, and a test split that it has not seen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fgvc.improvement import work
from fgvc.improvement.improve import run_improvement
from fgvc.improvement.ladder import BASE, Plan, plan_ladder
from fgvc.improvement.request import Request
from fgvc.improvement.side_by_side import Workers
from fgvc.improvement.task import look
from fgvc.improvement.work import Timing
from fgvc.io.files import as_json
from tests.models.onnxnet import small
from tests.processes import Piped
from tests.stand_ins import ForReal, stand_ins
from tests.trained import Once

NAMES = ("red", "purple", "green", "blue", "yellow")  # of the outputs
COLOURS = dict(zip(NAMES, [(200, 60, 60), (150, 60, 190), (60, 180, 60), (60, 80, 200), (200, 190, 60)], strict=True))
SPEC = {
    "size": [8, 8], "resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "channel_order": "rgb", "input_range": 1,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "fill": [0, 0, 0],
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def new_python_for_rungs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForReal]:
    """What begins the rungs is forked, and paints no chart (tests/processes.py): within `with new_python_for_rungs():` it is a
    new Python, as in the product."""

    def forked(pool: Workers) -> Any:
        if pool._server is None:
            server: Any = Piped(tmp_path_factory.mktemp("rungs"), work.serve)
            os.set_blocking(server.stdout.fileno(), False)
            pool._server = server
        return pool._server

    with stand_ins((Workers, "_started", forked)) as for_real:
        yield for_real


def draw(place: Path, name: str, seed: int) -> None:
    """A picture like no other, in the colour of its class."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(COLOURS[name]) + rng.normal(0, 70, (6, 6, 3)), 0, 255).astype(np.uint8)
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC).save(place)


def draw_set(root: Path, *, train: int, test: int) -> Path:
    """So many pictures a class in train/ and test/."""
    seed = 0
    for split, count in (("train", train), ("test", test)):
        for name in NAMES:
            for n in range(count):
                draw(root / split / name / f"{n:03d}.png", name, seed := seed + 1)
    return root


@pytest.fixture(scope="session")
def pictures(once: Once) -> Path:
    """12 pictures a class to learn from, 48 that the file has not seen: enough to choose by."""
    return once.made("improvement/pictures", lambda folder: draw_set(folder, train=12, test=48))


@pytest.fixture(scope="session")
def few(once: Once) -> Path:
    """As many to learn from, and 20 a class that the file has not seen: none chooses."""
    return once.made("improvement/few", lambda folder: draw_set(folder, train=12, test=20))


@pytest.fixture(scope="session")
def deployed(once: Once) -> Path:
    """A classifier with random weights, its labels and its preprocessing beside it."""

    def make(folder: Path) -> None:
        small.saved(small.plain(), folder)
        (folder / "labels.txt").write_text("\n".join(NAMES))
        (folder / "preprocess.json").write_text(json.dumps(SPEC))

    return once.made("improvement/deployed", make) / "deployed.onnx"


def request_for(deployed: Path, pictures: Path, **more: object) -> Request:
    return Request(target=str(deployed), data=pictures, budget=600, **more)  # type: ignore[arg-type]


def planned(request: Request, out: Path, *others: str, step: float = 0.01) -> Plan:
    """Look, and fix a plan of the plain recipe and of `others` that cost the same, by figures instead of a clock."""
    task = look(request, out, lambda line: None)
    timing = Timing(start=5, step=step, batch=32, look=0.001, peak_bytes=10**8, device="cpu")
    timings = dict.fromkeys((BASE, *others), timing)
    plan = plan_ladder(task, timings, budget=request.budget, spent=10, slots=2, search=request.search)
    (out / "plan.json").write_text(as_json(plan.record))
    (out / "clock.json").write_text('{"seconds": 10}')
    return plan


@pytest.fixture(scope="session")
def better(once: Once, deployed: Path, pictures: Path, new_python_for_rungs: ForReal) -> Path:
    """The folder of a finished improvement, all of it as the product does it."""

    def make(folder: Path) -> None:
        request = request_for(deployed, pictures)
        plan = planned(request, folder / "better")
        assert [rung.name for rung in plan.rungs] == ["probe-deployed", "base", "final"]
        with new_python_for_rungs():
            run_improvement(request, folder / "better")

    return once.made("improvement/better", make) / "better"
