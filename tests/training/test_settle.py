"""Few validation images choose no epoch: a run ships its end, or its start where that is clearly better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fgvc.config.recipe import Recipe
from fgvc.runs import checkpoint
from fgvc.runs.record import NAME, load
from fgvc.training import settle, trainer
from fgvc.training.settle import chooses_epochs, settle_best
from tests.training.test_start import pretrained, recipe  # noqa: F401

LONG = {"train": {"epochs": 3}}


def ships(run: Path) -> str:
    best = checkpoint.identity(run / "ckpt", "best")
    names = [name for name in ("start", "last") if checkpoint.identity(run / "ckpt", name) == best]
    return names[0] if names else "an epoch"


@pytest.mark.parametrize(("harm", "expected"), [({"lr": 1e-7}, "last"), ({"lr": 1e-3}, "start")])
def test_the_end_ships_where_it_is_not_clearly_worse(
    tmp_path: Path,
    pretrained: dict,  # noqa: F811
    harm: dict,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer.train(recipe(pretrained, **LONG, optim=harm), tmp_path / "run")
    index = load(run / NAME, run).index
    right = {}
    for name in ("start", "last"):
        rows, classes = checkpoint.load(run / "ckpt", name).rest["answers"].numpy()
        right[name] = index.labels[rows] == classes
    assert settle.beats(right["last"], right["start"]) == (expected == "start"), "this run does not show it"
    assert ships(run) == expected
    settle_best(run, trainer.read_run(run))
    assert ships(run) == expected
    (finished,) = [line for line in (run / "events.jsonl").read_text().splitlines() if '"finished"' in line]
    assert f'"top1": {right[expected].mean():.6g}'[:14] in finished


@pytest.mark.parametrize(
    ("head", "rate", "expected"), [("probe", 1e-7, "start"), ("zero", 0.02, "an epoch")]
)
def test_an_epoch_ships_where_enough_images_like_it_clearly_better_than_the_start(
    tmp_path: Path,
    pretrained: dict,  # noqa: F811
    head: str,
    rate: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(settle, "FEWEST_TO_CHOOSE", 5)
    more = {"train": {"epochs": 4}, "optim": {"lr": rate, "warmup_epochs": 0}, "model": {"head": head}}
    run = trainer.train(recipe(pretrained, **more), tmp_path / "run")
    best = checkpoint.load(run / "ckpt", "best").progress.step
    assert (best == 0) == (expected == "start")
    assert ("no epoch was better by more than one standard error" in capfd.readouterr().err) == (expected == "start")
    settle_best(run, trainer.read_run(run))
    assert checkpoint.load(run / "ckpt", "best").progress.step == best


@pytest.mark.parametrize(("gained", "lost", "ships"), [(12, 10, ["start"]), (30, 10, [])])
def test_a_lucky_epoch_is_not_better_than_the_start(
    tmp_path: Path, gained: int, lost: int, ships: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 400 images an epoch names some rightly that the start does not, and the other way round: 2 more are luck, 20 are not."""
    start, best = np.zeros(400, bool), np.zeros(400, bool)
    start[:lost], best[lost : lost + gained] = True, True
    right = {"start": start, "best": best, "last": best}
    chosen: list[str] = []
    monkeypatch.setattr(settle, "named_rightly", lambda run, name="last": (np.arange(400), right[name]))
    monkeypatch.setattr(checkpoint, "choose_best", lambda folder, name: chosen.append(name))
    one = Recipe.model_validate({"data": {"kind": "folder", "root": "x"}, "model": {"backbone": "test_resnet"}, "select": "best"})
    settle_best(tmp_path, one)
    assert chosen == ships


def test_who_asks_for_epochs_gets_them() -> None:
    one = Recipe.model_validate({"data": {"kind": "folder", "root": "x"}, "model": {"backbone": "test_resnet"}})
    assert not chooses_epochs(one, 199)
    assert chooses_epochs(one, 200)
    assert chooses_epochs(one.model_copy(update={"select_by": "loss"}), 10)
    assert chooses_epochs(one.model_copy(update={"train": one.train.model_copy(update={"patience": 3})}), 10)


def test_a_run_whose_start_is_gone_ships_the_best_of_its_epochs(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    run = trainer.train(recipe(pretrained, **LONG, optim={"lr": 1e-7}), tmp_path / "run")
    before = checkpoint.identity(run / "ckpt", "best")
    (run / "ckpt" / "start" / "meta.json").unlink()
    settle_best(run, trainer.read_run(run))
    assert checkpoint.identity(run / "ckpt", "best") == before
