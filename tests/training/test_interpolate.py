"""The net between a start and an end, beside one made by hand from the two files; and a run like others around it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.loader import evaluation_loader
from fgvc.errors import FgvcError
from fgvc.evaluation import metrics
from fgvc.runs import checkpoint
from fgvc.runs.folder import read_run, recorded_preprocess
from fgvc.runs.images import read_index
from fgvc.runs.loaded import load_run
from fgvc.training import trainer

TENTHS = [round(0.1 * at, 1) for at in range(11)]


def recipe(tree: dict, **sections: dict) -> Recipe:
    """It ships what training ends with."""
    merged = tree | {"select": "ema" if "ema" in sections else "last"}
    return validate(Recipe, merged | {k: tree.get(k, {}) | v for k, v in sections.items()}, where="test")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> dict:
    place = tmp_path_factory.mktemp("start")
    torch.manual_seed(5)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), place / "start.safetensors")
    (place / "start.safetensors.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    return {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_resnet", "weights": str(place / "start.safetensors"), "head": "probe", "batch_norm": "batch"},
        "train": {"epochs": 2, "batch_size": 8, "workers": 0, "device": "cpu"},
        "optim": {"lr": 0.02, "warmup_epochs": 0.5},
        "export": {"exporter": "torchscript"},
    }


@pytest.fixture(scope="module")
def ema_run(tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trainer.train(recipe(tree, ema={"decay": 0.8}), tmp_path_factory.mktemp("made") / "run")


def by_hand(run: Path, share: float, end: str = "ema") -> dict[str, torch.Tensor]:
    start = load_file(run / "ckpt" / "start" / "net.safetensors")
    ends = load_file(run / "ckpt" / "last" / f"{end}.safetensors")
    mixed = {}
    for name, last in ends.items():
        a, b = start[name].numpy().astype(np.longdouble), last.numpy().astype(np.longdouble)
        of_both = np.asarray((1 - np.longdouble(share)) * a + np.longdouble(share) * b)
        mixed[name] = torch.from_numpy(of_both.astype(np.float32)) if last.is_floating_point() else last
    return mixed


def logits(run: Path, select: str | None = None) -> np.ndarray:
    loaded = load_run(run, select)
    return loaded.answers(loaded.rows("val")).logits


def answers(run: Path, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the validation split by timm alone."""
    net, index = timm.create_model("test_resnet", num_classes=3).eval(), read_index(read_run(run))
    net.load_state_dict(weights)
    with torch.inference_mode():
        batches = list(evaluation_loader(index, index.rows("val"), spec=recorded_preprocess(run), batch_size=64, workers=0))
        return torch.cat([net(batch.images) for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_every_tensor_lies_between_and_counts_are_the_ends(ema_run: Path, tmp_path: Path, share: float) -> None:
    result = api.interpolate(ema_run, tmp_path / "between", share=share)
    assert (result.share, result.select, dict(result.scores)) == (share, "ema", {})
    written, expected = load_file(tmp_path / "between" / "ckpt" / "last" / "net.safetensors"), by_hand(ema_run, share)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(written[name], value, rtol=1.3e-7, atol=1e-12)  # one bit
    start = load_file(ema_run / "ckpt" / "start" / "net.safetensors")
    assert written["bn1.num_batches_tracked"] != start["bn1.num_batches_tracked"]
    assert not torch.equal(written["bn1.running_var"], start["bn1.running_var"])


@pytest.mark.parametrize("techniques", [{}, {"acb": {}}])
def test_at_its_ends_the_way_is_the_start_and_the_end_bit_for_bit(tree: dict, tmp_path: Path, techniques: dict) -> None:
    run = trainer.train(recipe(tree, techniques=techniques), tmp_path / "run")
    for share, select in ((0.0, "start"), (1.0, None)):
        api.interpolate(run, tmp_path / f"at{share:g}", share=share)
        assert np.array_equal(logits(tmp_path / f"at{share:g}"), logits(run, select))
    assert not np.array_equal(logits(tmp_path / "at0"), logits(tmp_path / "at1"))
    api.interpolate(run, tmp_path / "half", share=0.5)
    half, ends = logits(tmp_path / "half"), [logits(tmp_path / name) for name in ("at0", "at1")]
    assert not any(np.allclose(half, end, atol=1e-4) for end in ends)
    assert api.export(tmp_path / "half", tmp_path / "bundle").bundle.is_dir()  # and folded


@pytest.mark.parametrize("by", ["top1", "loss"])
def test_validation_chooses_the_share(tree: dict, tmp_path: Path, by: str) -> None:
    run = trainer.train(recipe(tree | {"select_by": by}, ema={"decay": 0.8}), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = api.interpolate(run, tmp_path / "between")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert list(result.scores) == TENTHS
    expected = {}
    for share in TENTHS:
        z, y = answers(run, by_hand(run, share))
        top1 = float((z.argmax(1) == y).double().mean())
        loss = float(torch.nn.functional.cross_entropy(z, y))
        assert result.scores[share].top1 == pytest.approx(top1)
        assert result.scores[share].loss == pytest.approx(loss, rel=1e-5)
        expected[share] = -top1 if by == "top1" else loss
    best = min(expected.values())
    assert result.share == min(share for share, value in expected.items() if value <= best + 1e-12)
    assert len(set(expected.values())) > 1
    record = json.loads((tmp_path / "between" / "interpolation.json").read_text())
    assert (record["run"], record["share"], record["by"], record["select"]) == (str(run.resolve()), result.share, by, "ema")
    assert [row["share"] for row in record["scores"]] == TENTHS
    assert record["scores"][3]["loss"] == pytest.approx(result.scores[0.3].loss)
    assert record["start"] == checkpoint.identity(run / "ckpt", "start")
    assert record["end"] == checkpoint.identity(run / "ckpt", "last")


def test_of_equals_the_smallest_share_is_taken(ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shares = metrics.evaluate, iter(TENTHS)

    def scored(*arguments: object, **named: object) -> object:
        tops = {0.2: 0.75, 0.5: 0.9, 0.6: 0.9, 1.0: 0.9}
        return replace(real(*arguments, **named), top1=tops.get(next(shares), 0.5))

    monkeypatch.setattr("fgvc.training.interpolate.metrics.evaluate", scored)
    assert api.interpolate(ema_run, tmp_path / "between").share == 0.5


def test_it_is_a_run_that_every_verb_takes(
    tree: dict, ema_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], colours: Path
) -> None:
    out, bundle = tmp_path / "between", tmp_path / "bundle"

    def fgvc(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    output = fgvc("interpolate", ema_run, "-o", out)
    assert output.count("chosen") == 1
    assert f"fgvc export {out} -o {out}-bundle" in output
    for word in ("0.1", "0.9", "top-1 %", "the smallest of equals"):
        assert word in output
    share = json.loads((out / "interpolation.json").read_text())["share"]
    for select in (None, "last", "best", "ema"):
        assert np.array_equal(logits(out, select), logits(out))
    assert np.array_equal(logits(out, "start"), logits(ema_run, "start"))
    scored = api.evaluate(out, "val").scores
    z, y = answers(ema_run, by_hand(ema_run, share))
    assert scored.top1 == pytest.approx(float((z.argmax(1) == y).double().mean()))
    fgvc("export", out, "-o", bundle)
    fgvc("verify", bundle)
    assert "red" in fgvc("predict", bundle, colours / "val" / "red" / "00.png", "--json")
    fgvc("report", ema_run, out, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    way = f"share {share:g} of the way from the start of {ema_run.resolve()} to its ema weights"
    assert f"{way} (validation top1 by share: 0: " in page
    assert api.compare(ema_run, out).paired is not None
    assert {path.name for path in (out / "ckpt").iterdir() if not path.is_symlink()} >= {"start"}
    again = api.interpolate(out, tmp_path / "again", share=1.0)
    assert np.array_equal(logits(again.out), logits(out))


def test_no_training_goes_on_from_there(
    tree: dict, ema_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = api.interpolate(ema_run, tmp_path / "between", share=0.5).out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    trainer.train(recipe(tree, ema={"decay": 0.8}), out)
    assert "this run is finished" in capfd.readouterr().err
    longer = recipe(tree, ema={"decay": 0.8}, train={"epochs": 3})
    with pytest.raises(FgvcError, match="lies between two nets.*begin a new run: another --out and model.weights="):
        trainer.train(longer, out)
    with pytest.raises(FgvcError, match="lies between two nets"):
        trainer.train(longer, tmp_path / "copy", resume=str(out))
    assert {path: path.read_bytes() for path in before} == before
    weights = {"weights": str(out / "ckpt" / "last" / "net.safetensors"), "head": "timm"}
    new = trainer.train(recipe(tree, model=weights, train={"max_steps": 1}), tmp_path / "new")
    api.interpolate(new, tmp_path / "newer", share=0.5)  # its head came with the weights
    trainer.train(recipe(tree, ema={"decay": 0.8}), out, overwrite=True)
    assert not (out / "interpolation.json").exists()


def refused(run: Path, out: Path, message: str, **options: object) -> None:
    before = sorted(path for path in out.parent.rglob("*") if path.name != ".measured.lock")
    with pytest.raises(FgvcError, match=message):
        api.interpolate(run, out, **options)
    assert sorted(path for path in out.parent.rglob("*") if path.name != ".measured.lock") == before


@pytest.mark.parametrize("head", ["timm", "zero"])
def test_a_start_without_a_trained_head_is_refused(tree: dict, tmp_path: Path, head: str) -> None:
    run = trainer.train(recipe(tree, model={"head": head}, train={"max_steps": 1}), tmp_path / "run")
    refused(run, tmp_path / "out", rf"head without training \(model\.head: {head}\).*Train with model\.head=probe")


def test_few_images_that_choose_the_share_are_said(
    ema_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fewest, warned in ((13, 1), (12, 0)):  # there are 12
        monkeypatch.setattr("fgvc.training.interpolate.FEWEST_TO_CHOOSE", fewest)
        with pytest.raises(SystemExit) as ended:
            main(["interpolate", str(ema_run), "-o", str(tmp_path / str(fewest))])
        assert not ended.value.code
        assert capsys.readouterr().out.count("warning: the best of 11 by 12 images") == warned


def test_without_validation_the_share_is_asked_for(
    tree: dict, tmp_path: Path, colours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(colours / "train")
    data = {"kind": "folder", "root": str(tmp_path / "set"), "val_fraction": 0.0}
    run = trainer.train(recipe(tree, data=data, train={"max_steps": 1}), tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["interpolate", str(run), "-o", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "no validation split to choose the share by; give it: --share 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "set")  # with a share no image is looked at
    with pytest.raises(SystemExit) as ended:
        main(["interpolate", str(run), "-o", str(tmp_path / "out"), "--share", "0.5"])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert "share 0.5 (given; not scored)" in output
    assert "luck" not in output


def test_what_can_not_be_written_or_read_is_refused_and_nothing_is_written(ema_run: Path, tmp_path: Path) -> None:
    refused(ema_run, ema_run, "inside of")
    refused(ema_run, ema_run / "new", "inside of")
    (tmp_path / "there").mkdir()
    refused(ema_run, tmp_path / "there", "exists already; remove it, or choose another --out")
    (tmp_path / "file").write_text("")
    refused(ema_run, tmp_path / "file" / "out", "can't write: Not a directory")
    refused(ema_run, tmp_path / ("n" * 300), "File name too long")
    refused(tmp_path / "there", tmp_path / "out", "not a run of fgvc")
    for share in (-0.1, 1.5, float("nan")):
        refused(ema_run, tmp_path / "out", "from 0 .the start. to 1", share=share)
    run = Path(shutil.copytree(ema_run, tmp_path / "run", symlinks=True))
    content = bytearray((run / "ckpt" / "start" / "net.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "ckpt" / "start" / "net.safetensors").write_bytes(content)
    refused(run, tmp_path / "out", "ckpt/start: damaged checkpoint .*put a copy of it there")
    shutil.rmtree(run / "ckpt" / "start")
    refused(run, tmp_path / "out", "ckpt/start: no checkpoint here: the run is of an earlier fgvc, which kept none, or it is")


def test_what_fails_midway_leaves_nothing(ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save

    def full(*arguments: object, start: bool = False, **named: object) -> None:
        if not start:
            raise FgvcError("No space left on device")
        real(*arguments, start=start, **named)

    monkeypatch.setattr("fgvc.training.interpolate.checkpoint.save", full)
    refused(ema_run, tmp_path / "out", "No space left", share=0.5)


def test_an_unfinished_run_is_taken_with_a_warning(
    tree: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgvc.training import trainer as loop

    real, steps = loop.optimizer_step, iter(range(99))

    def stopped(*arguments: object) -> object:
        if next(steps) == 7:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "optimizer_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(recipe(tree), tmp_path / "run")
    result = api.interpolate(tmp_path / "run", tmp_path / "between")
    assert "its training is not finished; its end is that of step 6" in capsys.readouterr().err
    assert checkpoint.read_progress(result.out / "ckpt").finished


def test_the_way_leads_to_the_end_of_training_where_another_epoch_ships(tree: dict, tmp_path: Path) -> None:
    one = recipe(tree, ema={"decay": 0.8})
    run = trainer.train(one.model_copy(update={"select": None}), tmp_path / "run")
    assert read_run(run).select == "best"
    result = api.interpolate(run, tmp_path / "all", share=1)
    assert result.select == "ema"
    assert np.array_equal(logits(tmp_path / "all"), logits(run, "ema"))
