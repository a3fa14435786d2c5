"""The floor: what it is fitted to and judged by, where it lies, and what is said of a result beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from fgvc import api
from fgvc.config.recipe import Recipe
from fgvc.data.index import ImageIndex
from fgvc.data.loader import evaluation_loader
from fgvc.data.splits import fold_numbers
from fgvc.evaluation.paired import gain_interval
from fgvc.models.backbone import plain_model
from fgvc.runs import checkpoint
from fgvc.runs.distributed import process_group
from fgvc.runs.folder import read_run, recorded_preprocess
from fgvc.runs.images import read_index
from fgvc.training import trainer
from fgvc.training.floor import FOLDS, _cross_fitted
from fgvc.training.session import open_session
from fgvc.training.start import HeadFit, ViewFeatures, fit_net_probe
from tests.training.test_start import pretrained, recipe  # noqa: F401


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def logits(run: Path, weights: dict[str, torch.Tensor], split: str) -> tuple[torch.Tensor, torch.Tensor]:
    one = read_run(run)
    index = read_index(one)
    net = plain_model(one.model.backbone, len(index.classes), one.model.kwargs).eval()
    net.load_state_dict(weights)
    batches = list(evaluation_loader(index, index.rows(split), spec=recorded_preprocess(run), batch_size=8, workers=0))
    with torch.inference_mode():
        return torch.cat([net(batch.images) for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize("head", ["probe", "timm"])
def test_it_is_a_net_that_is_scored_on_what_it_did_not_learn_from(tmp_path: Path, pretrained: dict, head: str) -> None:  # noqa: F811
    run = trainer.train(recipe(pretrained, model={"head": head}, train={"max_steps": 2}), tmp_path / "run")
    start = load_file(run / "ckpt" / "start" / "net.safetensors")
    floor = load_file(run / "ckpt" / "start" / "floor.safetensors")
    assert all(torch.equal(start[key], value) for key, value in floor.items()) == (head == "probe")
    z, y = logits(run, start | floor, "val")
    (event,) = events(run, "floor")
    assert event["top1"] == pytest.approx(float((z.argmax(1) == y).float().mean()), abs=1e-6)
    assert event["of"] == len(y)
    assert api.evaluate(run, "val", select="floor").scores.top1 == pytest.approx(event["top1"], abs=1e-6)


def test_the_result_stands_beside_it_by_the_same_images(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    run = trainer.train(recipe(pretrained, select="last"), tmp_path / "run")
    floor = load_file(run / "ckpt" / "start" / "floor.safetensors")
    z, y = logits(run, load_file(run / "ckpt" / "start" / "net.safetensors") | floor, "val")
    z_end, _ = logits(run, load_file(run / "ckpt" / "last" / "net.safetensors"), "val")
    a, b = (z.argmax(1) == y).numpy(), (z_end.argmax(1) == y).numpy()
    low, high = gain_interval(int((b & ~a).sum()), int((a & ~b).sum()), len(y))
    (event,) = events(run, "finished")
    expected = {"top1": b.mean(), "floor": a.mean(), "gain": b.mean() - a.mean(), "low": low, "high": high}
    assert event["standing"] == pytest.approx(expected, abs=1e-5)


def test_a_report_shows_it_on_any_part(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    run = trainer.train(recipe(pretrained, select="last"), tmp_path / "run")
    start = load_file(run / "ckpt" / "start" / "net.safetensors")
    floor = load_file(run / "ckpt" / "start" / "floor.safetensors")
    (z, y), (z_end, _) = (
        logits(run, weights, "test") for weights in (start | floor, load_file(run / "ckpt" / "last" / "net.safetensors"))
    )
    a, b = (z.argmax(1) == y).numpy(), (z_end.argmax(1) == y).numpy()
    low, high = gain_interval(int((b & ~a).sum()), int((a & ~b).sum()), len(y))
    gain = f"{100 * (b.mean() - a.mean()):+.2f} points, {100 * low:+.1f} to {100 * high:+.1f}"
    scored = api.evaluate(run, "test")
    assert scored.over_floor is not None
    assert (scored.over_floor.a_right.mean(), scored.over_floor.b_right.mean()) == (a.mean(), b.mean())
    assert json.loads((run / "metrics.json").read_text())["test.last"]["floor"]["low"] == pytest.approx(low, abs=1e-6)
    assert api.evaluate(run, "test", select="floor").over_floor is None
    page = api.report([run], tmp_path / "page.html", split="test").read_text(encoding="utf-8")
    assert f"names {100 * a.mean():.2f} %: <b>{gain}</b>" in page
    other = trainer.train(recipe(pretrained, select="last", train={"seed": 1}), tmp_path / "other")
    both = api.report([run, other], tmp_path / "both.html", split="test").read_text(encoding="utf-8")
    assert gain in both


def test_without_a_validation_part_it_is_judged_across_training_images(tmp_path: Path, pretrained: dict) -> None:  # noqa: F811
    run = trainer.train(recipe(pretrained, data={"hold_out": False}, train={"max_steps": 1}), tmp_path / "run")
    (event,) = events(run, "floor")
    index = read_index(read_run(run))
    assert event["of"] == len(index.rows("train"))
    assert "standing" not in events(run, "finished")[0]
    record = checkpoint.load(run / "ckpt", "start").rest["floor"]
    assert record["labels"].tolist() == index.labels[record["answers"][0].numpy()].tolist()
    assert event["top1"] == pytest.approx(float((record["answers"][1] == record["labels"]).float().mean()), abs=1e-6)
    assert read_run(run).select == "last"


def test_held_out_answers_are_those_of_scikit_learn(pretrained: dict) -> None:  # noqa: F811
    """By hand: standardised features, five folds, whole images."""
    one = recipe(pretrained, data={"hold_out": False})
    rng = np.random.default_rng(3)
    with process_group(one.train) as process, open_session(one, process) as session:
        index = session.index
        rows = np.repeat(index.rows("train"), 2)
        labels = index.labels[rows].astype(np.int64)
        vectors = (rng.normal(size=(len(rows), 6)) + labels[:, None] * np.array([1, 0, 0.5, 0, 0, 0])).astype(np.float32)
        predicted = _cross_fitted(session, ViewFeatures(vectors, labels, rows), 0.1)
    fold = np.repeat(fold_numbers(index.labels[rows[::2]], folds=FOLDS, seed=one.data.split_seed), 2)
    for number in range(FOLDS):
        learn, held_out = fold != number, fold == number
        mean, spread = vectors[learn].mean(0), vectors[learn].std(0)
        x = (vectors - mean) / np.maximum(spread, 0.3 * np.median(spread))
        expected = LogisticRegression(C=0.1, max_iter=500).fit(x[learn], labels[learn]).predict(x[held_out])
        assert (predicted[held_out] == expected).mean() > 0.99


def fitted(one: Recipe, features: Callable[..., ViewFeatures], monkeypatch: pytest.MonkeyPatch) -> HeadFit:
    """The fit of the head to features in the place of the net's."""
    monkeypatch.setattr("fgvc.training.start.view_features", features)
    with process_group(one.train) as process, open_session(one, process) as session:
        return fit_net_probe(session, session.step.net, session.preprocess, where="here")[1]


@pytest.mark.parametrize("most", [1, 2, 10, 48])
def test_every_class_is_among_the_images_that_a_head_is_fitted_to(
    pretrained: dict, monkeypatch: pytest.MonkeyPatch, most: int  # noqa: F811
) -> None:
    def features(net: object, spec: object, index: ImageIndex, rows: np.ndarray, **_: object) -> ViewFeatures:
        counts.append(np.bincount(index.labels[rows], minlength=3))
        return ViewFeatures(np.random.default_rng(0).normal(size=(len(rows), 4)).astype(np.float32), index.labels[rows], rows)

    counts: list[np.ndarray] = []
    monkeypatch.setattr("fgvc.training.start.MAX_IMAGES", most)
    fit = fitted(recipe(pretrained), features, monkeypatch)
    assert counts[0].min() >= max(1, most // 3)
    assert fit.images == counts[0].sum() == max(most, 3)


def test_images_of_one_group_are_held_out_together_where_the_penalty_is_chosen(
    pretrained: dict, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """Features that tell the groups apart and nothing else: another image of the group would make its class look learned."""

    def features(net: object, spec: object, index: ImageIndex, rows: np.ndarray, **_: object) -> ViewFeatures:
        _, group = np.unique(index.groups[rows], return_inverse=True)
        assert len(set(group)) == 12
        vectors = np.random.default_rng(0).normal(size=(12, 50)).astype(np.float32)
        return ViewFeatures(np.repeat(vectors[group], 2, axis=0), np.repeat(index.labels[rows], 2), np.repeat(rows, 2))

    data = {"kind": "folder", "group_size": 4}
    fit = fitted(recipe(pretrained, data=pretrained["data"] | data), features, monkeypatch)
    assert fit.held_out_loss is not None
    assert fit.held_out_loss > 0.9 * np.log(3)


def test_one_image_a_class_leaves_none_to_score_it(tmp_path: Path, pretrained: dict, colours: Path, capfd) -> None:  # noqa: F811
    for place in sorted((colours / "train").iterdir()):
        (tmp_path / "one" / place.name).mkdir(parents=True)
        shutil.copy(place / "00.png", tmp_path / "one" / place.name)
    data = {"kind": "folder", "root": str(tmp_path / "one"), "val_fraction": 0, "test_fraction": 0}
    one = recipe(pretrained | {"data": data}, train={"max_steps": 1, "batch_size": 2})
    trainer.train(one, tmp_path / "run")
    said = capfd.readouterr().err
    assert "not scored: no class has a second image" in said
    assert "deployed file" not in said


def test_random_weights_and_nets_without_a_linear_head_have_none(tmp_path: Path, recipe_tree: dict) -> None:
    run = trainer.train(recipe(recipe_tree, model={"weights": "none"}, train={"max_steps": 1}), tmp_path / "run")
    assert not events(run, "floor")
    assert not (run / "ckpt" / "start" / "floor.safetensors").exists()
    with pytest.raises(Exception, match="has no floor"):
        api.evaluate(run, "val", select="floor")


def test_validation_chooses_among_the_start_and_the_epochs(tmp_path: Path, pretrained: dict, capfd) -> None:  # noqa: F811
    harm = {"name": "sgd", "lr": 3.0, "warmup_epochs": 0}
    ruin = recipe(pretrained, model={"head": "probe"}, optim=harm, select_by="loss")
    run = trainer.train(ruin, tmp_path / "run")
    assert read_run(run).select == "best"
    assert checkpoint.load(run / "ckpt", "best").progress.step == 0
    start = load_file(run / "ckpt" / "start" / "net.safetensors")
    best = load_file(run / "ckpt" / "best" / "net.safetensors")
    assert all(torch.equal(start[key], value) for key, value in best.items())
    assert "the start ships, since no epoch was better" in capfd.readouterr().err
    again = trainer.train(ruin, run)  # select is not given, and best by now
    assert again == run


def test_a_result_below_the_floor_names_the_setting(tmp_path: Path, pretrained: dict, capfd) -> None:  # noqa: F811
    ruin = recipe(pretrained, optim={"lr": 1e-12}, model={"head": "zero"}, train={"max_steps": 1}, select="last")
    trainer.train(ruin, tmp_path / "run")
    assert "below the floor: model.head=probe and model.batch_norm=frozen" in capfd.readouterr().err


def test_a_start_that_is_worse_than_no_answer_is_said(tmp_path: Path, pretrained: dict, capfd) -> None:  # noqa: F811
    trainer.train(recipe(pretrained, model={"head": "zero"}, train={"max_steps": 1}), tmp_path / "zero")
    assert "cross-entropy is" not in capfd.readouterr().err
    weights = load_file(pretrained["model"]["weights"])
    loud = {key: value * (400 if key.startswith("layer4") and key.endswith("weight") else 1) for key, value in weights.items()}
    from safetensors.torch import save_file

    save_file(loud, pretrained["model"]["weights"])
    trainer.train(recipe(pretrained, model={"head": "timm"}, train={"max_steps": 1}, optim={"lr": 1e-9}), tmp_path / "timm")
    assert "the start's cross-entropy is" in capfd.readouterr().err
