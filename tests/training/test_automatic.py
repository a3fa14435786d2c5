"""What is left to a measurement is settled once, said, recorded, and the same when the run goes on; patience, the best epochs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.training import Train
from fgvc.errors import FgvcError
from fgvc.evaluation.metrics import Scores
from fgvc.runs import checkpoint
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import read_run
from fgvc.training import automatic, trainer
from fgvc.training.images import training_index
from fgvc.training.noise import open_noise_step
from fgvc.training.session import Session, open_session


def recipe(colours: Path, **more: object) -> Recipe:
    tree = {
        "data": {"kind": "folder", "root": str(colours), "copies_together": False},
        "image": {"size": 32},
        "model": {"backbone": "test_efficientnet"},
        "train": {"epochs": 6, "batch_size": 24, "workers": 0, "device": "cpu"},
    }
    for section, settings in more.items():
        tree[section] = {**tree.get(section, {}), **settings} if isinstance(settings, dict) else settings  # type: ignore[dict-item]
    return validate(Recipe, tree, where="test")


@pytest.mark.parametrize(
    ("images", "world", "batch"),
    [(40, 1, 8), (159, 1, 8), (160, 1, 16), (319, 1, 16), (320, 1, 32), (10**6, 1, 32), (320, 3, 33)],
)
def test_a_small_set_has_small_batches_and_ranks_equal_shares(images: int, world: int, batch: int) -> None:
    assert automatic.batch_for(images, world) == batch


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (0.97, "fp32"), (3.0, "fp32")])
def test_the_faster_precision_is_taken_and_recorded(
    bf16: float, chosen: str, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(automatic, "precision_seconds", lambda step: {"fp32": 1.0, "bf16": bf16})
    config = recipe(colours, train={"precision": "auto", "batch_size": "auto", "max_steps": 1})
    out = tmp_path / "run"
    trainer.train(config, out)
    recorded = read_run(out).train
    assert (recorded.precision, recorded.batch_size) == (chosen, 8)
    printed = capsys.readouterr().err
    assert f"train.precision: {chosen}, the faster of both by a step of a few images here: fp32 1000 ms, bf16" in printed
    assert "train.batch_size: 8, of" in printed
    monkeypatch.setattr(automatic, "precision_seconds", lambda step: pytest.fail("a run that goes on measures nothing"))
    trainer.train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 2})}), out)
    assert read_run(out).train.precision == chosen


def test_both_are_measured_for_real_and_losses_stay_fp32(colours: Path) -> None:
    config = recipe(colours, train={"precision": "auto"})
    with process_group(config.train) as process:
        settled = automatic.settle(config, training_index(config), process)
        assert settled.recipe.train.precision in ("fp32", "bf16")
        assert "fp32" in settled.notes[0]
        techniques = {"centre_loss": {}, "multiscale_head": {}, "distill": {}}
        half = recipe(colours, train={"precision": "bf16"}, techniques=techniques, ema={"decay": 0.9})
        noise = open_noise_step(half, training_index(half), automatic.settled_process(process, half.train))
        losses, _, _ = noise._forward(noise._batch(4, 0.0), 0.0, torch.autocast("cpu", torch.bfloat16))
        assert {value.dtype for value in losses.values()} == {torch.float32}
    with process_group(config.train) as process, open_session(half, process) as session:
        assert session.process.precision == "bf16"


def test_nothing_is_measured_for_sheets(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "open_noise_step", lambda *_: pytest.fail("measured"))
    config = recipe(colours, train={"precision": "auto", "batch_size": "auto"})
    with process_group(config.train) as process:
        settled = automatic.settle(config, training_index(config), process, measure=False)
    assert (settled.recipe.train.precision, settled.recipe.train.batch_size) == ("fp32", 8)


class _Parts:
    """A step whose forward keeps a known number of bytes an image."""

    def __init__(self, per_image: int) -> None:
        self.per_image, self.step = per_image, nn.Linear(1, 1)
        self.process = type("process", (), {"device": torch.device("cpu")})()

    def saved_bytes(self, images: int) -> int:
        return self.per_image * images


@pytest.mark.parametrize(("free", "parts"), [(33 * 10**6, 1), (17 * 10**6, 2), (9 * 10**6, 4), (1, 16)])
def test_a_step_is_divided_as_memory_needs(free: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "free_bytes", lambda device: free)
    per_image = 10**6 * automatic.SHARE / automatic.HEADROOM
    assert automatic.micro_batches_for(_Parts(round(per_image)), Train(batch_size=32), 1) == parts  # type: ignore[arg-type]


def test_the_bytes_of_a_forward_are_counted_once_each_without_the_nets_own(colours: Path) -> None:
    config = recipe(colours)
    with process_group(config.train) as process:
        noise = open_noise_step(config, training_index(config), process)
        two, four = noise.saved_bytes(2), noise.saved_bytes(4)
    images = 3 * 32 * 32 * 4
    assert two > 2 * images
    assert four == pytest.approx(2 * two, rel=0.05)


def test_free_memory_is_that_of_the_machine_or_less() -> None:
    import os

    assert 0 < automatic.free_bytes(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


SCORE, NUMBERS = trainer.score, Scores.numbers


def scored(monkeypatch: pytest.MonkeyPatch, values: list[float], by: str = "top1") -> None:
    """Let validation say these values of a score in turn, the start's first."""
    answers = iter(values)

    def score(session: Session, out: Path) -> Scores:
        scores = SCORE(session, out)
        numbers = {**NUMBERS(scores), by: next(answers)}
        monkeypatch.setattr(Scores, "numbers", lambda self: numbers)
        return scores

    monkeypatch.setattr(trainer, "score", score)


def epochs(run: Path) -> list[int]:
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["epoch"] for event in events if event["event"] == "epoch"]


def test_a_run_ends_where_its_patience_does_and_goes_on_with_more(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, config = tmp_path / "run", recipe(colours, train={"patience": 2})
    scored(monkeypatch, [0.1, 0.5, 0.5, 0.4])
    trainer.train(config, out)
    assert epochs(out) == [1, 2, 3]
    assert "ended early: validation (top1) was the best after epoch 1, and train.patience is 2" in capsys.readouterr().err
    trainer.train(config, out)
    assert "this run is finished. To go on raise train.patience" in capsys.readouterr().err
    assert epochs(out) == [1, 2, 3]
    scored(monkeypatch, [0.6, 0.4, 0.4])
    trainer.train(recipe(colours, train={"patience": 3}), out)
    assert epochs(out) == [1, 2, 3, 4, 5, 6]
    assert checkpoint.read_progress(out / "ckpt").best_epoch == 4


def test_an_interrupted_run_keeps_its_patience(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, config = tmp_path / "run", recipe(colours, train={"patience": 2})
    scored(monkeypatch, [0.1, 0.5, 0.4])
    with pytest.raises(StopIteration):  # killed in its third epoch's validation
        trainer.train(config, out)
    scored(monkeypatch, [0.3])
    trainer.train(config, out)
    assert epochs(out) == [1, 2, 3]


@pytest.mark.parametrize(
    ("by", "values", "best_epochs"),
    [("top1", [0.0, 0.5, 0.9, 0.7, 0.8, 0.1, 0.2], [2, 4, 6]), ("loss", [9.0, 0.5, 0.9, 0.7, 0.2, 0.6, 0.8], [1, 4, 6])],
)
def test_the_best_epochs_stay(
    by: str, values: list[float], best_epochs: list[int], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "run", recipe(colours, checkpoint={"keep": 0, "keep_best": 2}, select_by=by)
    scored(monkeypatch, values, by)
    trainer.train(config, out)
    steps = sorted(int(path.name.removeprefix("step-")) for path in (out / "ckpt").glob("step-*"))
    a_epoch = checkpoint.read_progress(out / "ckpt").step // 6
    assert steps == [a_epoch * epoch for epoch in best_epochs]
    # By top-1 so few images choose no epoch: the end ships.
    assert checkpoint.load(out / "ckpt", "best").progress.epoch == (6 if by == "top1" else best_epochs[1])


def test_a_forecast_counts_all_parts(colours: Path) -> None:
    costs = api.forecast(recipe(colours, train={"precision": "auto"}))
    assert list(costs.parts) == ["start-up", "training", "validation", "export"]
    assert all(seconds > 0 for seconds in costs.parts.values())
    assert costs.seconds == pytest.approx(sum(costs.parts.values()))
    assert costs.parts["training"] >= 3600 * costs.hours
    assert any("train.precision" in note for note in costs.notes)
    assert np.isfinite(costs.seconds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {"hold_out": False}, "train": {"patience": 2}}, "train.patience: goes by validation"),
        ({"data": {"hold_out": False}, "select": "best"}, "select: best: goes by validation"),
        ({"train": {"patience": 2, "precise_bn": 64}}, "train.patience and train.precise_bn"),
        ({"train": {"batch_size": 10, "grad_accum_steps": 4}}, "train.batch_size: 10 images can't be divided"),
        ({"techniques": {"box_head": {}}}, "techniques.box_head: .*data.kind: folder has no boxes"),
        ({"techniques": {"dcl": {"grid": 32}}, "image": {"size": 24}}, "techniques.dcl: needs images of 32 pixels a side"),
    ],
)
def test_settings_that_can_not_go_together_are_refused_when_they_are_read(
    colours: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(FgvcError, match=message):
        recipe(colours, **settings)
