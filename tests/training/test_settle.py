"""Few validation images choose no epoch: a run ships its end, or its start where that is clearly better."""

from __future__ import annotations

from pathlib import Path

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
