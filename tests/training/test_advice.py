"""What a message advises can be done: settings that a run may go on with, and how to train on with others."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.models.weights import load_weights
from fgvc.runs import checkpoint
from fgvc.runs.build import build_net
from fgvc.runs.folder import new_run_advice, read_run
from fgvc.training import optimizer_step as training_step
from fgvc.training import trainer
from tests.conftest import paint


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> Path:
    """Three of its twelve steps are done."""
    tree = {
        "data": {"kind": "folder", "root": str(colours)}, "image": {"size": 32}, "model": {"backbone": "test_resnet"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu", "max_steps": 3},
        "deploy": {"mean": [0.2, 0.3, 0.4], "std": [0.3, 0.2, 0.25]},
    }  # fmt: skip
    return trainer.train(recipe(tree), tmp_path_factory.mktemp("begun") / "run")


@pytest.fixture
def run(tmp_path: Path, begun: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run", symlinks=True))


def changed(run: Path, *overrides: str) -> Recipe:
    return api.load_recipe(run / "config.yaml", ["train.max_steps=4", *overrides])


FREE = [
    "train.workers=1", "train.device=auto", "data.max_unreadable=0.5", "checkpoint.every_steps=5", "export.exporter=torchscript",
    "export.opset=18", "log.every_steps=3", "train.epochs=3",
]  # fmt: skip


def test_what_does_not_change_a_run_may_change(run: Path, tmp_path: Path) -> None:
    trainer.train(changed(run, *FREE, "cache=disk", f"cache_dir={tmp_path / 'cache'}"), run)
    assert checkpoint.read_progress(run / "ckpt").step == 4
    assert read_run(run).export.opset == 18
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        "train.grad_accum_steps=2", "train.batch_size=4", "image.size=48", "optim.lr=0.001", "optim.clip_grad=1",
        "train.precision=bf16", "data.val_fraction=0.2", "data.split_seed=1", "data.first_classes=2",
    ],
)  # fmt: skip
def test_for_what_must_stay_the_message_says_how_to_go_on(run: Path, setting: str) -> None:
    key, weights = setting.partition("=")[0], run / "ckpt/last/net.safetensors"
    with pytest.raises(FgvcError, match=re.escape(f"{key}: ")) as caught:
        trainer.train(changed(run, setting), run)
    assert f"model.weights={weights}" in str(caught.value)
    if key not in ("data.val_fraction", "data.split_seed", "data.first_classes"):
        anew = trainer.train(changed(run, setting, f"model.weights={weights}", "train.max_steps=1"), run.with_name("new"))
        assert checkpoint.read_progress(anew / "ckpt").step == 1


def test_a_new_run_begins_with_what_the_old_one_learnt(run: Path, colours: Path) -> None:
    """Its normalisation, too, although the recipe says nothing of it."""
    weights = run / "ckpt/last/net.safetensors"
    tree = read_run(run).model_dump(mode="json") | {"deploy": {}}
    built = build_net(recipe(tree, model={"weights": str(weights)}), 3)
    assert built.weights.doubts == ()
    assert built.preprocess == build_net(read_run(run), 3).preprocess
    for key, value in load_file(weights).items():
        assert torch.equal(value, built.step.net.state_dict()[key]), key


def test_weights_that_know_the_images_set_aside_are_doubted(
    run: Path, tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the parts are drawn anew, because a picture came to the set."""
    weights = f"model.weights={run / 'ckpt/last/net.safetensors'}"
    trainer.train(changed(run, weights), tmp_path / "same")
    assert "was trained on" not in capsys.readouterr().err
    whole = read_run(run).model_dump(mode="json") | {"data": {"kind": "folder", "root": str(colours / "train")}}
    first = trainer.train(recipe(whole), tmp_path / "first")
    capsys.readouterr()
    trainer.train(
        changed(first, f"model.weights={first / 'ckpt/last/net.safetensors'}", "data.split_seed=1"), tmp_path / "anew"
    )
    assert re.search(r"WARNING: .*first, .* was trained on \d+ of the \d+ images that", capsys.readouterr().err)


@pytest.mark.parametrize(("order", "white"), [("bgr", 255), ("rgb", 255), ("bgr", 1)])
def test_its_normalisation_is_read_in_other_units(run: Path, order: str, white: int) -> None:
    deploy = {
        "channel_order": order,
        "input_range": white,
        "mean": [0.1 * white, 0.2 * white, 0.4 * white],
        "std": [white] * 3,
    }
    tree = read_run(run).model_dump(mode="json") | {"deploy": deploy}
    spec = build_net(recipe(tree), 3).preprocess
    (run / "preprocess.json").write_text(spec.model_dump_json())
    config = recipe(tree, model={"weights": str(run / "ckpt/last/net.safetensors")})
    weights = load_weights(build_net(config, 3).step.net, config.model)
    assert weights.mean == pytest.approx([0.4, 0.2, 0.1] if order == "bgr" else [0.1, 0.2, 0.4])


def test_re_parameterised_blocks_are_folded(tmp_path: Path, begun: Path) -> None:
    config = recipe(read_run(begun).model_dump(mode="json"), techniques={"acb": {}}, train={"max_steps": 2})
    run = trainer.train(config, tmp_path / "replaced")
    weights = run / "ckpt/last/net.safetensors"
    assert load_file(weights).keys() != build_net(read_run(begun), 3).step.net.state_dict().keys()
    plain = recipe(read_run(begun).model_dump(mode="json"), model={"weights": str(weights)})
    net = build_net(plain, 3).step.net.eval()
    trained = build_net(config, 3).step.net.eval()
    trained.load_state_dict(load_file(weights))
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(net(x), trained(x), rtol=1e-4, atol=1e-4)


def test_a_run_of_other_processes_is_told_how(run: Path) -> None:
    state = checkpoint.load(run / "ckpt")
    state.rest = {**state.rest, "rng": list(state.rest["rng"]) * 2}
    checkpoint.save(run / "ckpt", state)
    with pytest.raises(FgvcError, match=r"trained by 2 process.*--nproc-per-node=2 .*model\.weights="):
        trainer.train(changed(run), run)


def test_a_finished_run_names_the_setting_that_ended_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.train(read_run(run), run)
    assert "To go on raise train.max_steps" in capsys.readouterr().err
    with pytest.raises(FgvcError, match=r"is finished; raise train\.max_steps"):
        trainer.train(changed(run, "train.max_steps=2"), run)
    with pytest.raises(FgvcError, match=r"nothing is left to do\. Raise train\.max_steps"):
        trainer.train(changed(run, "train.epochs=3", "train.max_steps=3"), run)
    trainer.train(changed(run), run)
    assert checkpoint.read_progress(run / "ckpt").step == 4


def test_too_many_bad_files_and_a_higher_limit(tmp_path: Path, begun: Path, colours: Path) -> None:
    root = Path(shutil.copytree(colours, tmp_path / "set"))
    bad = [root / f"train/red/{i:02d}.png" for i in range(6)]
    for path in bad:
        path.write_bytes(b"x")
    config = recipe(
        read_run(begun).model_dump(mode="json"), data={"root": str(root), "max_unreadable": 0.05},
        checkpoint={"every_steps": 1}, train={"max_steps": 6},
    )  # fmt: skip
    with pytest.raises(FgvcError, match="Raise it, and the run goes on"):
        trainer.train(config, tmp_path / "run")
    if (tmp_path / "run/ckpt/last").exists():
        paint(bad[0], (200, 70, 60), seed=1)
        with pytest.raises(FgvcError, match="1 of another size"):
            trainer.train(config, tmp_path / "run")
        bad[0].write_bytes(b"x")
    trainer.train(recipe(config.model_dump(mode="json"), data={"max_unreadable": 0.5}), tmp_path / "run")


def test_a_killed_loader_goes_on_with_fewer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> object:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed")

    monkeypatch.setattr(training_step, "to_batch", killed)
    with pytest.raises(FgvcError, match=r"Lower train\.workers"):
        trainer.train(changed(run, "train.workers=1"), run)
    monkeypatch.undo()
    trainer.train(changed(run, "train.workers=0"), run)


def test_nothing_saved_yet_starts_anew(tmp_path: Path) -> None:
    assert "starts anew" in new_run_advice(tmp_path / "run")


def test_export_takes_another_exporter(run: Path, tmp_path: Path) -> None:
    exported = api.export(run, tmp_path / "bundle", exporter="torchscript", opset=17)
    contract = json.loads((exported.bundle / "contract.json").read_text())
    assert (contract["exporter"], contract["interface"]["opset"]) == ("torchscript", 17)


def test_a_loss_that_is_no_number_names_weights_that_a_new_run_takes(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training_step, "to_batch", lambda *args, real=training_step.to_batch: replace(real(*args), x=real(*args).x * math.nan)
    )
    with pytest.raises(FgvcError, match="NaN or infinite") as caught:
        trainer.train(changed(run, "train.max_steps=5"), run)
    monkeypatch.undo()
    (weights,) = re.findall(r"model\.weights=\S+\.safetensors", str(caught.value))
    trainer.train(changed(run, weights, "optim.lr=0.001", "train.max_steps=1"), run.with_name("new"))
