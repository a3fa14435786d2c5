"""Training again on all images, and runs that ship what they start with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.config.data import SPLITS
from fgvc.errors import FgvcError
from fgvc.runs import checkpoint
from fgvc.runs.folder import read_run
from fgvc.runs.record import NAME, load
from fgvc.training import trainer
from tests.training.test_start import pretrained, recipe  # noqa: F401


def splits(run: Path) -> dict[str, set[str]]:
    index = load(run / NAME, read_run(run).data.root).index
    return {part: set(index.paths[index.splits == k].tolist()) for k, part in enumerate(SPLITS)}


def test_a_refit_learns_from_validation_images_as_well(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    one = recipe(pretrained, train={"refit": True}, ema={"decay": 0.5}, select="ema")
    out = trainer.train(one, tmp_path / "run")
    assert out == tmp_path / "run-refit"
    first, again = splits(tmp_path / "run"), splits(out)
    assert again["train"] == first["train"] | first["val"]
    assert not again["val"]
    assert again["test"] == first["test"]
    assert read_run(out).select == "ema"
    progress = checkpoint.read_progress(out / "ckpt")
    assert (progress.finished, progress.epoch) == (True, one.train.epochs)
    by_hand = one.model_copy(
        update={
            "train": one.train.model_copy(update={"refit": False}),
            "data": one.data.model_copy(update={"hold_out": False}),
        }
    )
    same = trainer.train(by_hand, tmp_path / "by-hand")
    ours, theirs = (load_file(run / "ckpt" / "last" / "net.safetensors") for run in (out, same))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert trainer.train(one, tmp_path / "run") == out  # both are finished


def test_where_no_epoch_was_better_the_refit_is_the_start_on_all_images(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    harm = {"name": "sgd", "lr": 3.0, "warmup_epochs": 0}
    one = recipe(pretrained, model={"head": "probe"}, optim=harm, train={"refit": True}, select_by="loss")
    out = trainer.train(one, tmp_path / "run")
    assert read_run(out).train.max_steps == 0
    net, start = (load_file(out / "ckpt" / name / "net.safetensors") for name in ("last", "start"))
    assert all(torch.equal(value, start[key]) for key, value in net.items())
    other = load_file(tmp_path / "run" / "ckpt" / "start" / "net.safetensors")
    assert not torch.equal(start["fc.weight"], other["fc.weight"]), "it was fitted to more images"
    assert all(torch.equal(value, other[key]) for key, value in start.items() if not key.startswith("fc."))
    assert checkpoint.read_progress(out / "ckpt").finished
    assert api.evaluate(out, "test").scores.images
    assert api.report([out], tmp_path / "page.html", split="test").is_file()


def test_the_refit_of_a_run_with_patience_trains_for_all_epochs(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    one = recipe(pretrained, train={"refit": True, "patience": 1}, select="last")
    out = trainer.train(one, tmp_path / "run")
    assert checkpoint.read_progress(out / "ckpt").epoch == one.train.epochs
    assert read_run(tmp_path / "run").train.patience == 1


def test_a_start_whose_head_is_not_fitted_has_no_refit(
    tmp_path: Path, pretrained: dict, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    harm = {"name": "sgd", "lr": 3.0, "warmup_epochs": 0}
    one = recipe(pretrained, model={"head": "zero"}, optim=harm, train={"refit": True}, select_by="loss")
    out = trainer.train(one, tmp_path / "run")
    assert out == tmp_path / "run"
    assert not (tmp_path / "run-refit").exists()
    assert "no epoch was clearly better than its start, which ships" in capsys.readouterr().err
    assert checkpoint.load(out / "ckpt", "best").progress.step == 0


def test_the_start_alone_may_ship_where_a_run_trained_its_head(pretrained: dict, tmp_path: Path) -> None:  # noqa: F811
    weights = str(tmp_path / "gone" / "ckpt" / "best" / "net.safetensors")
    one = recipe(pretrained, model={"weights": weights, "head": "timm"}, train={"max_steps": 0})
    assert one.train.max_steps == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"refit": True}, "data": {"hold_out": False}}, "data.hold_out: false leaves none"),
        ({"data": {"hold_out": False, "fold": [0, 3]}}, "hold_out: false leaves none"),
        ({"train": {"max_steps": 0}, "model": {"head": "timm"}}, "whose head is not fitted"),
        ({"train": {"max_steps": 0}, "model": {"head": "zero", "weights": "a/ckpt/last/net.safetensors"}}, "head is not fitted"),
    ],
)
def test_what_contradicts_is_refused(pretrained: dict, sections: dict, message: str) -> None:  # noqa: F811
    with pytest.raises(FgvcError, match=message):
        recipe(pretrained, **sections)


def test_without_a_validation_part_there_is_nothing_to_add(tmp_path: Path, pretrained: dict, colours: Path) -> None:  # noqa: F811
    alone = {"kind": "folder", "root": str(colours / "train"), "val_fraction": 0.0, "test_fraction": 0.0}
    one = recipe(pretrained | {"data": alone}, train={"refit": True})
    with pytest.raises(FgvcError, match=r"train\.refit needs a validation split"):
        trainer.train(one, tmp_path / "run")
    assert not (tmp_path / "run").exists()
