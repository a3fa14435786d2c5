"""SWA: which epochs are averaged, with which batch norms, and what ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.models.backbone import plain_model
from fgvc.models.norms import reestimate_norms
from fgvc.runs.folder import recorded_preprocess
from fgvc.runs.images import read_index
from fgvc.training import trainer as loop
from fgvc.training.session import Session

Tensors = dict[str, torch.Tensor]


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


def swa(tree: dict, *, epochs: int = 4, start: float = 0.5, **sections: object) -> Recipe:
    sections["train"] = {"epochs": epochs} | sections.get("train", {})
    sections["optim"] = {"schedule": "constant", "lr": 0.05}
    return recipe(tree, swa={"start": start}, **({"select": "swa"} | sections))


def weights(run: Path, name: str, which: str = "last") -> Tensors:
    return load_file(run / "ckpt" / which / f"{name}.safetensors")


def has_average(run: Path) -> bool:
    return (run / "ckpt" / "last" / "ema.safetensors").is_file()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """The net's state at the end of every epoch that is trained from here on."""
    states: list[Tensors] = []
    real = loop._end_epoch

    def note(session: Session, *rest: object) -> None:
        states.append({key: value.clone() for key, value in session.step.net.state_dict().items()})
        real(session, *rest)

    monkeypatch.setattr(loop, "_end_epoch", note)
    return states


def learned(run: Path) -> list[str]:
    return [key for key, _ in plain_model("test_resnet", 3).named_parameters()]


def is_mean_of(run: Path, epochs: list[Tensors]) -> None:
    average = weights(run, "ema")
    for key in learned(run):
        mean = torch.stack([state[key].double() for state in epochs]).mean(0)
        torch.testing.assert_close(average[key].double(), mean, rtol=1e-5, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("epochs", "start", "last"), [(4, 0.5, 2), (4, 0.0, 4), (4, 0.74, 2), (4, 0.75, 1), (5, 0.6, 2)]
)
def test_it_is_the_mean_of_the_last_epochs(
    tmp_path: Path, recipe_tree: dict, ends: list[Tensors], epochs: int, start: float, last: int
) -> None:
    run = loop.train(swa(recipe_tree, epochs=epochs, start=start), tmp_path / "run")
    assert len(ends) == epochs
    is_mean_of(run, ends[-last:])


def test_the_average_watches_and_does_not_steer(tmp_path: Path, recipe_tree: dict) -> None:
    config = swa(recipe_tree)
    run = loop.train(config, tmp_path / "run")
    plain = loop.train(config.model_copy(update={"swa": None}), tmp_path / "plain")
    assert all(torch.equal(value, weights(run, "net")[key]) for key, value in weights(plain, "net").items())


def test_its_batch_norms_are_those_of_the_clean_images(tmp_path: Path, recipe_tree: dict) -> None:
    config = swa(recipe_tree, techniques={"dcl": {"grid": 4, "bn": "shared"}})
    run = loop.train(config, tmp_path / "run")
    net, state = plain_model("test_resnet", 3), weights(run, "ema")
    net.load_state_dict(state)
    index = read_index(config)
    loader = evaluation_loader(index, index.rows("train"), spec=recorded_preprocess(run), batch_size=64, workers=0)
    reestimate_norms(net, (batch.images for batch in loader))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-5, msg=key)
    assert not torch.equal(state["bn1.running_mean"], weights(run, "net")["bn1.running_mean"])


@pytest.mark.parametrize("stops", [[3], [6, 7], [12, 15], [18, 21], [23]])
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bits(
    tmp_path: Path, recipe_tree: dict, stops: list[int]
) -> None:
    config = swa(recipe_tree)
    whole = loop.train(config, tmp_path / "whole")
    for stop in stops:
        loop.train(
            config.model_copy(update={"train": config.train.model_copy(update={"max_steps": stop})}), tmp_path / "run"
        )
        assert has_average(tmp_path / "run") == (stop >= 18), "six steps an epoch: the third is the first"
    loop.train(config, tmp_path / "run")
    for name in ("net", "ema"):
        again = weights(tmp_path / "run", name)
        assert all(torch.equal(value, again[key]) for key, value in weights(whole, name).items()), name
    assert (tmp_path / "run" / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_longer_run_begins_the_average_anew_or_goes_on(
    tmp_path: Path, recipe_tree: dict, ends: list[Tensors]
) -> None:
    run = loop.train(swa(recipe_tree), tmp_path / "run")
    loop.train(swa(recipe_tree, epochs=5), run)  # epochs 3 and 4 stay among the last, and 5 joins
    is_mean_of(run, ends[2:5])
    loop.train(swa(recipe_tree, epochs=12), run)  # epoch 6 is none of the last: 7 is the first again
    is_mean_of(run, ends[6:12])
    other = loop.train(swa(recipe_tree), tmp_path / "other")
    loop.train(swa(recipe_tree, epochs=6), other)  # 3 is none of the last any more, and can't be taken out
    is_mean_of(other, ends[4:6])


def test_validation_and_what_ships_are_the_net_until_there_is_an_average(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(swa(recipe_tree, train={"max_steps": 6}), tmp_path / "run")
    history = json.loads((run / "ckpt/last/meta.json").read_text())["history"]
    assert api.evaluate(run, "val", select="last").scores.loss == pytest.approx(history[-1]["val_loss"], rel=1e-5)
    with pytest.raises(FgvcError, match="SWA holds no epoch yet"):
        api.evaluate(run, "val")
    loop.train(swa(recipe_tree), run)
    history = json.loads((run / "ckpt/last/meta.json").read_text())["history"]
    evaluation = api.evaluate(run, "val")
    assert evaluation.select == "swa"
    assert evaluation.scores.loss == pytest.approx(history[-1]["val_loss"], rel=1e-4)
    assert api.evaluate(run, "val", select="last").scores.loss != pytest.approx(history[-1]["val_loss"], rel=1e-4)


def test_best_is_read_as_it_was_scored(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(swa(recipe_tree, select="best", select_by="loss"), tmp_path / "run")
    best = json.loads((run / "ckpt/best/meta.json").read_text())["best"]
    assert api.evaluate(run, "val").scores.loss == pytest.approx(best, rel=1e-4)


def test_it_is_exported_with_all_proofs(tmp_path: Path, recipe_tree: dict) -> None:
    config = swa(recipe_tree, epochs=2, techniques={"acb": {}}, export={"exporter": "torchscript"})
    run = loop.train(config, tmp_path / "run")
    exported = api.export(run, tmp_path / "bundle")
    assert exported.select == "swa"
    assert exported.proven.structural.passed


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"swa": {}, "ema": {}}, "ema and swa: a run has one average"),
        ({"select": "swa"}, "select: swa needs a `swa:` section"),
        ({"swa": {}, "select": "ema"}, "select: ema needs an `ema:` section"),
        ({"swa": {"start": 1}}, "must be below 1 "),
        ({"swa": {"images": 1}}, "must be at least 2 "),
        ({"swa": {}, "techniques": {"cam_erasing": {"source": "ema"}}}, "SWA has none until its first epoch"),
        ({"swa": {}, "model": {"backbone": "test_resnet", "freeze": 1}}, "set model.freeze to 0, or use ema"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe_tree: dict, sections: dict, message: str) -> None:
    with pytest.raises(FgvcError, match=message):
        recipe(recipe_tree, **sections)


def test_a_run_without_it_says_so(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree, train={"max_steps": 1}), tmp_path / "run")
    with pytest.raises(FgvcError, match=r"has no SWA; train with swa.start=0.75"):
        api.evaluate(run, "val", select="swa")
