"""The loop: what must not change the result, what must stop it, and what it says."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fgvc import api
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.config.training import Log
from fgvc.data.loader import TrainBatch, evaluation_loader
from fgvc.errors import FgvcError
from fgvc.io.files import write_atomic
from fgvc.models.backbone import plain_model
from fgvc.models.norms import reestimate_norms
from fgvc.runs.folder import recorded_preprocess
from fgvc.runs.images import read_index
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch
from fgvc.techniques.centre_loss.technique import CentreLoss
from fgvc.training import optimizer_step as training_step
from fgvc.training import trainer as loop
from fgvc.training.batch import Normalise, to_batch
from fgvc.training.log import Events
from tests.trained import Once, copied


def recipe(tree: dict, **sections: object) -> Recipe:
    merged = tree | {k: (tree.get(k, {}) | v if isinstance(v, dict) else v) for k, v in sections.items()}
    return validate(Recipe, merged, where="test")


def net(run: Path, name: str = "net") -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / "last" / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **close: float) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(
            value, b[key], msg=lambda text, key=key: f"{key}: {text}", **(close or {"rtol": 0, "atol": 0})
        )


def test_the_average_watches_and_does_not_steer(tmp_path: Path, recipe_tree: dict, once: Once) -> None:
    loop.train(recipe(recipe_tree, ema={"decay": 0.9}), tmp_path / "with")
    same(net(once.run(recipe(recipe_tree))), net(tmp_path / "with"))
    assert any(not torch.equal(v, net(tmp_path / "with", "ema")[k]) for k, v in net(tmp_path / "with").items())


def test_accumulated_parts_are_one_batch_where_no_norm_mixes_images(tmp_path: Path, recipe_tree: dict) -> None:
    tree = recipe_tree | {"model": {"backbone": "test_vit", "kwargs": {"img_size": 32}}}
    loop.train(recipe(tree), tmp_path / "whole")
    loop.train(recipe(tree, train={"grad_accum_steps": 4}), tmp_path / "parts")
    same(net(tmp_path / "whole"), net(tmp_path / "parts"), rtol=1e-3, atol=2e-5)


def test_workers_do_not_change_the_result(tmp_path: Path, recipe_tree: dict, once: Once) -> None:
    loop.train(recipe(recipe_tree, train={"workers": 2}), tmp_path / "processes")
    same(net(once.run(recipe(recipe_tree))), net(tmp_path / "processes"))


def test_the_cache_changes_nothing_where_nothing_is_shrunk(tmp_path: Path, recipe_tree: dict, once: Once) -> None:
    loop.train(recipe(recipe_tree, cache="disk", cache_dir=str(tmp_path / "cache")), tmp_path / "cached")
    same(net(once.run(recipe(recipe_tree))), net(tmp_path / "cached"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_keeps_fp32_weights(tmp_path: Path, recipe_tree: dict, precision: str) -> None:
    tree = recipe(
        recipe_tree, train={"precision": precision}, optim={"lr": 0.02, "clip_grad": 1.0}, techniques={"acb": {}}
    )
    run = loop.train(tree, tmp_path / "run")
    assert {v.dtype for v in net(run).values() if v.is_floating_point()} == {torch.float32}
    rows = [float(row.split(",")[4]) for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert rows[-1] < rows[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"kind": "focal", "class_weights": "balanced"}},
        {"loss": {"kind": "bce"}, "techniques": {"mixup": {}}},
        {"train": {"sampling": "balanced"}},
    ],
    ids=str,
)
def test_other_losses_and_sampling_learn(tmp_path: Path, recipe_tree: dict, sections: dict, precision: str) -> None:
    sections = sections | {"train": sections.get("train", {}) | {"precision": precision, "epochs": 3}}
    run = loop.train(recipe(recipe_tree, **sections), tmp_path / "run")
    rows = [float(row.split(",")[4]) for row in (run / "metrics.csv").read_text().splitlines()[1:]]
    assert rows[-1] < rows[0]
    assert api.evaluate(run, "test").scores.images == 12, "rebuilt without the images' counts"


def test_a_term_of_some_steps_is_averaged_over_those(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(recipe_tree, techniques={"centre_loss": {}}, train={"grad_accum_steps": 2})
    numbers = iter(range(1, 100))

    def losses(step: StepModule, outputs: dict, progress: float) -> dict[str, torch.Tensor]:
        number = next(numbers)
        always = original(step, outputs, progress)
        return always if number % 3 else always | {"centre_loss.centre": torch.tensor(float(number))}

    original = StepModule._losses
    monkeypatch.setattr(CentreLoss, "losses", lambda self, outputs, ctx: {})
    monkeypatch.setattr(StepModule, "_losses", losses)
    run = loop.train(config, tmp_path / "run")
    with (run / "metrics.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    calls = range(1, 2 * int(first["step"]) + 1)  # two parts a step, of which one at most has the term
    reported = [number for number in calls if number % 3 == 0]
    assert len({(number + 1) // 2 for number in reported}) == len(reported)
    assert float(first["centre_loss.centre"]) == pytest.approx(sum(reported) / len(reported))


def test_clipping_bounds_the_step(tmp_path: Path, recipe_tree: dict) -> None:
    tree = recipe_tree | {
        "optim": {"name": "momentum", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "warmup_epochs": 0}
    }
    start = loop.train(recipe(tree, train={"max_steps": 1}, optim={"lr": 1e-12}), tmp_path / "start")
    end = loop.train(recipe(tree, train={"max_steps": 1}, optim={"clip_grad": 0.01}), tmp_path / "end")
    parameters = [k for k in net(start) if "running" not in k and "num_batches" not in k]
    moved = sum(float((net(end)[k] - net(start)[k]).square().sum()) for k in parameters) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path: Path, recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match=r"step \d+: NaN or infinite, and not saved: the loss.* with optim\.lr=0\.03"):
        loop.train(recipe(recipe_tree, optim={"lr": 1e30, "warmup_epochs": 0}), tmp_path / "run")


def test_out_of_memory_names_the_way_out(tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    run, small = tmp_path / "run", recipe(recipe_tree, checkpoint={"every_steps": 2})
    calls, real = [0], training_step.to_batch

    def greedy(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return real(*arguments)

    monkeypatch.setattr(training_step, "to_batch", greedy)
    with pytest.raises(FgvcError, match="out of memory with train.batch_size=8.*Raise train.grad_accum_steps"):
        loop.train(small, run)
    monkeypatch.undo()
    assert json.loads((run / "ckpt/last/meta.json").read_text())["step"] == 2
    loop.train(small, run)
    same(net(run), net(loop.train(small, tmp_path / "whole")))


def test_broken_pictures_are_named_once_and_too_many_stop_it(
    tmp_path: Path, recipe_tree: dict, colours: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(colours, root)
    broken = root / "train" / "red" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root)}}
    run = loop.train(recipe(tree), tmp_path / "run")
    assert capfd.readouterr().err.count("03.png") == 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [Path(e["path"]).name for e in events if e["event"] == "unreadable"] == ["03.png"]
    with pytest.raises(FgvcError, match=r"(?s)1 of 48 images can't be read.*03\.png"):
        loop.train(recipe(tree, data={"max_unreadable": 0.01}), tmp_path / "strict")


def test_best_needs_a_validation_part(tmp_path: Path, recipe_tree: dict, colours: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(colours / "train", root / "train")
    shutil.copytree(colours / "test", root / "test")
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root), "val_fraction": 0.0}, "select": "best"}
    with pytest.raises(FgvcError, match="select: best needs a validation split"):
        loop.train(recipe(tree), tmp_path / "run")


def test_best_is_the_checkpoint_that_scored_highest(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree, train={"epochs": 5}, select="best", ema={"decay": 0.8}), tmp_path / "run")
    meta = json.loads((run / "ckpt/best/meta.json").read_text())
    scores = [row["val_top1"] for row in json.loads((run / "ckpt/last/meta.json").read_text())["history"]]
    assert meta["history"][-1]["val_top1"] == max(scores) == meta["best"]
    assert api.evaluate(run, "val").scores.top1 == pytest.approx(max(scores)), "scored on the weights that would ship"


def test_validation_is_as_rare_as_asked_and_changes_no_weight(tmp_path: Path, recipe_tree: dict) -> None:
    rare = loop.train(recipe(recipe_tree, train={"epochs": 5, "validate_every": 3}), tmp_path / "rare")
    often = loop.train(recipe(recipe_tree, train={"epochs": 5}), tmp_path / "often")
    rows, others = (list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (rare, often))
    assert [row["epoch"] for row in rows if row["val_top1"]] == ["3", "5"]
    assert rows[2::2] == others[2::2]
    weights, same = (load_file(run / "ckpt/last/net.safetensors") for run in (rare, often))
    assert all(torch.equal(weights[name], same[name]) for name in same)


def test_a_longer_budget_goes_on_from_a_finished_run(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree), tmp_path / "run")
    loop.train(recipe(recipe_tree, train={"epochs": 3}), run)
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("changed", [{"optim": {"lr": 0.5}}, {"techniques": {"mixup": {}}}, {"train": {"seed": 3}}])
def test_other_settings_are_refused_with_the_difference(tmp_path: Path, recipe_tree: dict, changed: dict) -> None:
    run = loop.train(recipe(recipe_tree, train={"max_steps": 3}), tmp_path / "run")
    with pytest.raises(FgvcError, match=r"other settings:\n  \w+\.\w+: .* in the run, .* now"):
        loop.train(recipe(recipe_tree, **changed), run)


def test_going_on_in_another_folder_leaves_the_first_as_it_is(tmp_path: Path, recipe_tree: dict, once: Once) -> None:
    first = loop.train(recipe(recipe_tree, train={"max_steps": 5}), tmp_path / "first")
    before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    second = loop.train(recipe(recipe_tree), tmp_path / "second", resume=str(first))
    same(net(second), net(once.run(recipe(recipe_tree))))
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before


def test_a_run_in_another_folder_may_be_resumed_by_the_same_command(tmp_path: Path, recipe_tree: dict, once: Once) -> None:
    first = loop.train(recipe(recipe_tree, train={"max_steps": 3}), tmp_path / "first")
    second = tmp_path / "second"
    with pytest.raises(FgvcError, match=r"other settings:\n  optim.lr"):
        loop.train(recipe(recipe_tree, optim={"lr": 0.5}), second, resume=str(first))
    assert list(tmp_path.glob("*second*")) == [], "a refusal copies nothing"
    loop.train(recipe(recipe_tree, train={"max_steps": 5}), second, resume=str(first))
    loop.train(recipe(recipe_tree), second, resume=str(first))
    whole = copied(once.run(recipe(recipe_tree)), tmp_path / "whole")
    same(net(second), net(whole))
    with pytest.raises(FgvcError, match="not empty; --resume PATH copies"):
        loop.train(recipe(recipe_tree), whole, resume=str(first))


def test_going_on_needs_no_first_weights(tmp_path: Path, recipe_tree: dict) -> None:
    weights = tmp_path / "first.safetensors"
    model = {"weights": str(weights)}
    save_file(plain_model(recipe_tree["model"]["backbone"], 1000).state_dict(), weights)
    weights.with_name("first.safetensors.json").write_text('{"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}')
    run = loop.train(recipe(recipe_tree, model=model, train={"max_steps": 3}), tmp_path / "run")
    whole = loop.train(recipe(recipe_tree, model=model), tmp_path / "whole")
    for path in tmp_path.glob("first.*"):
        path.unlink()
    same(net(loop.train(recipe(recipe_tree, model=model), run)), net(whole))


def test_a_full_disk_is_an_error_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(FgvcError, match=r"/dev/full/x: can't write"):
        write_atomic(Path("/dev/full/x"), "text")
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    events = Events(tmp_path, Log())
    with pytest.raises(FgvcError, match=r"events.jsonl: can't write: No space left"):
        events.write("step", step=1)


def test_a_folder_that_is_no_run_is_not_touched(tmp_path: Path, recipe_tree: dict) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FgvcError, match="not empty and not a run"):
        loop.train(recipe(recipe_tree), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_sizes_that_the_net_can_not_take_are_named(tmp_path: Path, recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match=r"(?s)vit_tiny_patch16_224 can't take images of 32 x 32.*img_size"):
        loop.train(recipe(recipe_tree | {"model": {"backbone": "vit_tiny_patch16_224"}}), tmp_path / "run")


def test_an_opset_that_the_exporter_does_not_write_is_refused_before_training(
    tmp_path: Path, recipe_tree: dict
) -> None:
    for exporter, opset, other in (("dynamo", 17, "torchscript"), ("torchscript", 24, "dynamo")):
        with pytest.raises(FgvcError, match=rf"export\.opset={opset}: .* set export\.exporter={other}"):
            loop.train(recipe(recipe_tree, export={"exporter": exporter, "opset": opset}), tmp_path / "run")
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_set_of_fewer_images_than_a_batch_is_one_step(
    tmp_path: Path, recipe_tree: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(recipe(recipe_tree, train={"batch_size": 64, "epochs": 2}), tmp_path / "run")
    assert "train.batch_size: 64 is more than there are: a step takes 48 images" in capsys.readouterr().err
    steps = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in steps if "step" in row) == 2
    loop.train(recipe(recipe_tree, train={"batch_size": 64, "epochs": 3}), tmp_path / "run")  # goes on


def test_parts_of_a_step_that_would_be_empty_are_refused(tmp_path: Path, recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match=r"train\.batch_size: 64 over 1 processes x train\.grad_accum_steps 64 leaves 1 image"):
        loop.train(recipe(recipe_tree, train={"batch_size": 64, "grad_accum_steps": 64}), tmp_path / "run")


def test_overwrite_loses_nothing_where_the_new_run_is_refused(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree, train={"max_steps": 3}), tmp_path / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(FgvcError, match="a batch norm needs two"):
        loop.train(recipe(recipe_tree, train={"batch_size": 8, "grad_accum_steps": 8}), run, overwrite=True)
    with pytest.raises(FgvcError, match="give one of the two"):
        loop.train(recipe(recipe_tree), run, overwrite=True, resume=str(run))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path: Path, recipe_tree: dict) -> None:
    run = loop.train(recipe(recipe_tree), tmp_path / "run")
    api.evaluate(run, "test")
    loop.train(recipe(recipe_tree, train={"max_steps": 2}), run, overwrite=True)
    assert not (run / "metrics.json").exists()
    assert json.loads((run / "ckpt/last/meta.json").read_text())["step"] == 2


def test_an_extended_run_that_dies_at_once_still_goes_on(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, longer = loop.train(recipe(recipe_tree), tmp_path / "run"), recipe(recipe_tree, train={"epochs": 3})

    def dies(*_: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(loop, "_run_epochs", dies)
    with pytest.raises(RuntimeError, match="killed"):
        loop.train(longer, run)
    monkeypatch.undo()
    loop.train(longer, run)
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_a_run_whose_classes_changed_does_not_go_on(tmp_path: Path, recipe_tree: dict, colours: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(colours, root)
    tree = recipe_tree | {"data": {"kind": "folder", "root": str(root)}}
    run = loop.train(recipe(tree, train={"max_steps": 3}), tmp_path / "run")
    labels = (run / "labels.json").read_bytes()
    for split in ("train", "val", "test"):
        (root / split / "red").rename(root / split / "amber")
    with pytest.raises(FgvcError, match="the classes are others: new amber, gone red"):
        loop.train(recipe(tree), run)
    assert (run / "labels.json").read_bytes() == labels


def test_an_interruption_in_the_last_step_still_ends_with_a_validation(
    tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", loop._end_epoch

    def dies(session, *arguments: object) -> None:
        if session.progress.step == session.total_steps:
            loop._save(session, run)
            raise KeyboardInterrupt
        real(session, *arguments)

    monkeypatch.setattr(loop, "_end_epoch", dies)
    with pytest.raises(KeyboardInterrupt):
        loop.train(recipe(recipe_tree), run)
    monkeypatch.undo()
    loop.train(recipe(recipe_tree), run)
    whole = loop.train(recipe(recipe_tree), tmp_path / "whole")
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_best_is_read_as_it_was_scored(tmp_path: Path, recipe_tree: dict) -> None:
    tree = recipe(recipe_tree, train={"epochs": 4}, select="last", ema={"decay": 0.99, "warmup": False})
    run = loop.train(tree, tmp_path / "run")
    best = json.loads((run / "ckpt/best/meta.json").read_text())["best"]
    assert api.evaluate(run, "val", select="best").scores.top1 == pytest.approx(best)
    assert {path.name for path in (run / "tables").glob("classes-*")} == {"classes-val-best.csv"}


def test_precise_norms_are_the_statistics_of_the_clean_images(tmp_path: Path, recipe_tree: dict) -> None:
    dcl = {"grid": 4, "bn": "shared"}
    config = recipe(recipe_tree, techniques={"dcl": dcl}, ema={"decay": 0.5}, train={"precise_bn": 48})
    run = loop.train(config, tmp_path / "run")
    first = plain_model(recipe_tree["model"]["backbone"], 3)
    for name in ("net", "ema"):
        state = net(run, name)
        first.load_state_dict(state)
        rows = read_index(config).rows("train")
        spec = recorded_preprocess(run)
        batch = next(iter(evaluation_loader(read_index(config), rows, spec=spec, batch_size=64, workers=0)))
        inputs: dict = {}
        first.bn1.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.update(x=args[0].detach()))
        first.eval()
        first(batch.images)
        torch.testing.assert_close(state["bn1.running_mean"], inputs["x"].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state["bn1.running_var"], inputs["x"].var((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_images_grow_epoch_by_epoch(tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    step = StepModule.forward

    def note(self: StepModule, batch: Batch, *rest: object) -> object:
        sizes.append(tuple(batch.x.shape[2:]))
        return step(self, batch, *rest)

    monkeypatch.setattr(StepModule, "forward", note)
    image = {"size": [64, 48], "train_scale": [[0, 0.5], [0.5, 1]]}
    loop.train(recipe(recipe_tree | {"image": image}, train={"epochs": 4}), tmp_path / "run")
    assert sizes == [(32, 24)] * 6 + [(48, 32)] * 6 + [(64, 48)] * 12


def test_a_reduced_batch_still_knows_where_it_came_from() -> None:
    ramp = torch.arange(64).repeat(48, 1)
    images = torch.stack([ramp, torch.arange(48)[:, None].expand(48, 64), ramp], -1)[None].to(torch.uint8)
    label, boxes = torch.zeros(1).long(), torch.rand(1, 4)
    raw = TrainBatch(images, label, label, torch.eye(3)[None, :2] * 1.0, [], boxes)
    spec = Preprocess(size=(48, 64), mean=(0, 0, 0), std=(1 / 255,) * 3)
    batch = to_batch(raw, Normalise(spec, torch.device("cpu"), torch.contiguous_format), (24, 16))
    assert batch.x.shape == (1, 3, 24, 16)
    assert torch.equal(batch.boxes, boxes), "of the stored image, whatever the size"
    x, y = batch.geometry[0].double() @ torch.tensor([8.5, 12.5, 1.0]).double()
    assert float(batch.x[0, 0, 12, 8]) + 0.5 == pytest.approx(float(x), abs=0.6), "in bytes"
    assert float(batch.x[0, 1, 12, 8]) + 0.5 == pytest.approx(float(y), abs=0.6)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"epochs": 3, "max_steps": 12}, {"epochs": 2}),
        ({"epochs": 3, "max_steps": 8}, {"epochs": 1}),
        ({"epochs": 2, "max_steps": 100}, {"epochs": 2, "max_steps": 200}),
    ],
)
def test_a_run_with_nothing_left_to_do_says_so_and_stays_as_it_is(
    tmp_path: Path, recipe_tree: dict, first: dict, then: dict
) -> None:
    run = loop.train(recipe(recipe_tree, train=first), tmp_path / "run")
    api.evaluate(run, "test")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(FgvcError, match="nothing is left to do|is finished"):
        loop.train(recipe(recipe_tree, train=then), run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_that_goes_on_or_starts_anew_drops_the_tables_of_the_old_weights(
    tmp_path: Path, recipe_tree: dict
) -> None:
    run = loop.train(recipe(recipe_tree), tmp_path / "run")
    for change in ({"epochs": 3}, {"seed": 5}):
        api.evaluate(run, "test")
        assert (run / "tables").is_dir()
        (run / "localisation.json").write_text("{}")
        loop.train(recipe(recipe_tree, train=change), run, overwrite="seed" in change)
        assert not (run / "tables").exists()
        assert not (run / "metrics.json").exists()
        assert not (run / "localisation.json").exists()


def test_places_where_no_copy_can_go(tmp_path: Path, recipe_tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loop.train(recipe(recipe_tree, train={"max_steps": 3}), tmp_path / "first")
    (tmp_path / "file").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, reason in ((tmp_path / "file", "a file"), (first / "x" / "y", "inside of"), (Path(), "the working folder")):
        with pytest.raises(FgvcError, match=f"{reason}.*: the run can't be copied there"):
            loop.train(recipe(recipe_tree), out, resume=str(first))


def test_precise_norms_need_no_even_batches_and_let_no_dropout_act(tmp_path: Path, recipe_tree: dict) -> None:
    model = plain_model("test_resnet", 3, {"drop_path_rate": 0.9})
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.ones_(norm.weight)
    x = torch.randn(33, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        reestimate_norms(model, (x[:16], x[16:32], x[32:]))
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    same(states[0], states[1])
    with pytest.raises(FgvcError, match="one image has no statistics"):
        recipe(recipe_tree, train={"precise_bn": 1})


def test_sizes_between_the_knots_are_tried_before_training(tmp_path: Path, recipe_tree: dict) -> None:
    tree = recipe_tree | {"image": {"size": 64, "train_scale": [[0, 0.5], [1, 1]]}}
    tree |= {"model": {"backbone": "test_vit", "kwargs": {"dynamic_img_size": True, "img_size": 64}}}
    with pytest.raises(FgvcError, match=r"test_vit can't take images of \d+ x \d+: Input height"):
        loop.train(recipe(tree, train={"epochs": 4}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parts_of_one_image_are_refused_where_norms_need_two(tmp_path: Path, recipe_tree: dict) -> None:
    with pytest.raises(FgvcError, match="leaves 1 image a forward"):
        loop.train(recipe(recipe_tree, train={"batch_size": 4, "grad_accum_steps": 4}), tmp_path / "run")


def test_parts_of_one_image_are_refused_where_only_a_branch_has_a_norm(tmp_path: Path, recipe_tree: dict) -> None:
    sections = {
        "model": {"backbone": "test_convnext"},
        "image": {"size": 64},
        "train": {"batch_size": 2, "grad_accum_steps": 2},
    }
    loop.train(recipe(recipe_tree, **sections, checkpoint={}), tmp_path / "plain")
    with pytest.raises(FgvcError, match="leaves 1 image a forward"):
        loop.train(recipe(recipe_tree, **sections, techniques={"attention_crop_drop": {"maps": 2}}), tmp_path / "run")


def test_what_techniques_ask_for_is_not_rendered_beyond_all_bounds(tmp_path: Path, recipe_tree: dict) -> None:
    config = recipe(
        recipe_tree, image={"size": [64, 2800]}, techniques={"attention_crop_drop": {"maps": 2, "render": 1.5}}
    )
    with pytest.raises(FgvcError, match=r"rendered at \(96, 4200\) pixels .* at most 4096"):
        loop.train(config, tmp_path / "run")
