"""Who may write into a run, and what is never lost there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fgvc import api
from fgvc.cli.app import main
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.sources.read import read_source
from fgvc.errors import FgvcError
from fgvc.io import files as disk
from fgvc.runs import checkpoint
from fgvc.runs.folder import lock_run
from fgvc.runs.measured import read_measured, store_measured
from fgvc.training import trainer

HOLD = """
import sys
from pathlib import Path
from fgvc.runs.folder import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def recipe(tree: dict, **sections: dict) -> Recipe:
    return validate(Recipe, tree | {key: tree.get(key, {}) | value for key, value in sections.items()}, where="test")


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "ckpt" / name / "net.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, colours: Path) -> tuple[dict, Path, Path]:
    """A recipe, a run of it that stopped at step 8 of 18 with checkpoints at 4, 6 and 8, and an uninterrupted one."""
    tree = {
        "data": {"kind": "folder", "root": str(colours)},
        "image": {"size": 32},
        "model": {"backbone": "test_resnet"},
        "train": {"epochs": 3, "batch_size": 8, "workers": 0, "device": "cpu"},
        "ema": {"decay": 0.9},
        "select": "ema",
        "checkpoint": {"every_steps": 2},
        "export": {"exporter": "torchscript"},
    }
    place = tmp_path_factory.mktemp("made")
    trainer.train(recipe(tree, train={"max_steps": 8}), place / "begun")
    return tree, place / "begun", trainer.train(recipe(tree), place / "whole")


@pytest.fixture
def run(runs: tuple[dict, Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs[1], tmp_path / "run", symlinks=True))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that trains in `tmp_path/run`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_says_who_holds_the_run_and_changes_nothing(
    runs: tuple[dict, Path, Path], run: Path, other: subprocess.Popen, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_file = run.parent / "recipe.yaml"
    recipe_file.write_text(json.dumps(runs[0]))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more in ([], ["--overwrite"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", str(recipe_file), "--out", str(run), *more])
        assert ended.value.code == 2
        message = capsys.readouterr().err
        assert f"is being trained by process {other.pid} on {os.uname().nodename}, since 20" in message
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    other.kill()
    other.communicate()
    trainer.train(recipe(runs[0]), run)  # the system let go of it
    assert equal(weights(run), weights(runs[2]))


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """As a loading process does for some seconds after a SIGKILL."""
    lock, (reading, writing) = tmp_path / "lock", os.pipe()
    if not (parent := os.fork()):
        with disk.file_lock(lock):
            if not os.fork():
                os.close(writing)
                os.read(reading, 1)  # until the test ends
            os._exit(0)
    os.waitpid(parent, 0)
    with disk.file_lock(lock) as mine:
        assert mine
        assert str(os.getpid()) in disk.holder(lock)
        with disk.file_lock(lock) as twice:
            assert not twice
    os.close(reading)
    os.close(writing)


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with disk.file_lock(lock):
        lock.unlink()
        with disk.file_lock(lock) as mine:
            assert mine, "of another file than the one that is gone"


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with pytest.raises(FgvcError, match=r"its file system knows no locks"), lock_run(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / "config.yaml").exists()


def read_only(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: int, **named: Any) -> int:
        if str(place) in str(path) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


def test_in_a_read_only_run_verbs_print_and_say_that_nothing_was_stored(
    runs: tuple[dict, Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    read_only(monkeypatch, run)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(run)])
    assert not ended.value.code
    captured = capsys.readouterr()
    assert captured.err.count("nothing was stored") == 1
    assert "top-1" in captured.out
    assert "tables" not in captured.out
    with pytest.raises(FgvcError, match="Read-only file system"):
        trainer.train(recipe(runs[0]), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_is_left_is_merged_and_of_its_checkpoint_alone(runs: tuple[dict, Path, Path], run: Path) -> None:
    now = checkpoint.identity(run / "ckpt")
    store_measured(run, {}, rows={"metrics.json": {"val.last": {"top1": 0.5}}}, identity="of another")
    store_measured(run, {"tables/x.csv": "a\n"}, rows={"metrics.json": {"test.ema": {"top1": 0.25}}}, identity=now)
    assert set(json.loads((run / "metrics.json").read_text())) == {"val.last", "test.ema"}
    assert read_measured(run, "metrics.json") == {"test.ema": {"top1": 0.25}}
    assert (run / "tables" / "x.csv").read_text() == "a\n"
    api.evaluate(run, "val")
    api.evaluate(run, "test", select="best")
    assert read_measured(run, "metrics.json").keys() == {"test.ema", "val.ema", "test.best"}


DAMAGE = {
    "a link that is gone": lambda ckpt: (ckpt / "last").unlink(),
    "a link that leads nowhere": lambda ckpt: shutil.rmtree((ckpt / "last").resolve()),
    "both links": lambda ckpt: [(ckpt / name).unlink() for name in ("last", "links")],
    "no meta.json": lambda ckpt: (ckpt / "last" / "meta.json").unlink(),
    "no ema": lambda ckpt: (ckpt / "last" / "ema.safetensors").unlink(),
    "one more file": lambda ckpt: shutil.copy(ckpt / "last" / "net.safetensors", ckpt / "last" / "more.safetensors"),
    **{f"a bit of {name}": lambda ckpt, name=name: flip(ckpt / "last" / name) for name in (
        "net.safetensors", "branches.safetensors", "ema.safetensors", "state.pt", "meta.json",
    )},
    "a cut state.pt": lambda ckpt: os.truncate(ckpt / "last" / "state.pt", 1000),
}  # fmt: skip


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 2
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_last_checkpoint_is_passed_over_for_the_newest_whole_one(
    runs: tuple[dict, Path, Path], run: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[kind](run / "ckpt")
    trainer.train(recipe(runs[0]), run)
    message = capfd.readouterr().err
    assert "the newest checkpoint that is whole" in message
    assert message.count("WARNING") == 1 + message.count("ckpt/best")
    assert equal(weights(run), weights(runs[2]))
    assert equal(weights(run, "best"), weights(runs[2], "best"))
    assert (run / "metrics.csv").read_text() == (runs[2] / "metrics.csv").read_text()


def test_numbers_of_a_damaged_last_checkpoint_are_not_those_of_the_one_that_is_used_instead(
    runs: tuple[dict, Path, Path], run: Path
) -> None:
    api.evaluate(run, "val")
    flip(run / "ckpt" / "last" / "net.safetensors")
    api.export(run, run.parent / "bundle")
    assert json.loads((run.parent / "bundle" / "metrics.json").read_text()) == {}
    api.evaluate(run, "val")  # of the older one, and kept as such
    api.export(run, run.parent / "again")
    assert json.loads((run.parent / "again" / "metrics.json").read_text()).keys() == {"val"}


def test_where_no_checkpoint_is_whole_that_is_said_and_nothing_deleted(runs: tuple[dict, Path, Path], run: Path) -> None:
    for path in (run / "ckpt").glob("st*"):
        flip(path / "state.pt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FgvcError, match=r"(?s)damaged checkpoint.*state\.pt: its SHA-256 is another.*no other is whole"):
        trainer.train(recipe(runs[0]), run)
    (run / "ckpt" / "last").unlink()
    with pytest.raises(FgvcError, match="no other is whole"):
        trainer.train(recipe(runs[0]), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    trainer.train(recipe(runs[0]), run, overwrite=True)
    assert equal(weights(run), weights(runs[2]))


def test_a_changed_preprocessing_is_refused_by_training_and_said_by_readers(
    runs: tuple[dict, Path, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = run / "preprocess.json"
    file.write_text(file.read_text().replace("0.5", "0.4", 1))
    with pytest.raises(FgvcError, match=r"preprocess\.json: not what the run began with"):
        trainer.train(recipe(runs[0]), run)
    api.evaluate(run)
    assert "preprocess.json: not what the run began with" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["preprocess.json", "labels.json"])
def test_what_is_recorded_of_the_net_and_is_gone_or_damaged_is_named(
    runs: tuple[dict, Path, Path], run: Path, name: str
) -> None:
    content_before = (run / name).read_text()
    for content in (None, content_before[:-3]):
        (run / name).unlink(missing_ok=True)
        if content is not None:
            (run / name).write_text(content)
        with pytest.raises(FgvcError, match=f"{name}: gone or damaged .*put a copy of it there"):
            api.evaluate(run, "val")
    (run / name).write_text(content_before)
    api.evaluate(run, "val")


def test_a_damaged_best_is_said_by_every_reader(runs: tuple[dict, Path, Path], run: Path) -> None:
    flip(run / "ckpt" / "best" / "ema.safetensors")
    with pytest.raises(FgvcError, match=r"ckpt/best: damaged checkpoint .*ema\.safetensors: its SHA-256 is another"):
        api.evaluate(run, select="best")
    with pytest.raises(FgvcError, match="ckpt/best: damaged checkpoint"):
        api.export(run, run.parent / "bundle", select="best")
    assert not (run.parent / "bundle").exists()


def test_a_checkpoint_by_a_name_of_its_own_is_not_lost(runs: tuple[dict, Path, Path], run: Path) -> None:
    mine = (run / "ckpt" / "last").resolve().rename(run / "ckpt" / "the good one")
    for path in (run / "ckpt").glob("st*"):
        shutil.rmtree(path)
    with pytest.raises(FgvcError, match="no checkpoint here"):
        trainer.train(recipe(runs[0]), run)
    assert (mine / "net.safetensors").is_file()


@pytest.mark.parametrize("what", ["a link to a disk that is away", "a file"])
def test_checkpoints_that_can_not_be_looked_at_are_an_error_and_nothing_is_lost(
    runs: tuple[dict, Path, Path], run: Path, what: str
) -> None:
    away = (run / "ckpt").rename(run.parent / "away")
    if what == "a file":
        (run / "ckpt").write_text("")
    else:
        (run / "ckpt").symlink_to(run.parent / "disk")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(FgvcError, match=r"ckpt: can't be read .*or remove it to begin anew"):
        trainer.train(recipe(runs[0]), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    if what != "a file":
        away.rename(run.parent / "disk")
        trainer.train(recipe(runs[0]), run)
        assert equal(weights(run), weights(runs[2]))


def test_a_run_whose_checkpoints_were_taken_away_says_that_it_begins_anew(
    runs: tuple[dict, Path, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "ckpt")
    trainer.train(recipe(runs[0]), run)
    assert f"{run / 'ckpt'}: holds no checkpoint: this run begins anew" in capfd.readouterr().err
    assert equal(weights(run), weights(runs[2]))


@pytest.mark.parametrize("name", ["last", "best", "links"])
def test_a_link_that_leads_round_in_a_circle_is_one_that_leads_nowhere(
    runs: tuple[dict, Path, Path], run: Path, name: str
) -> None:
    (run / "ckpt" / name).unlink()
    (run / "ckpt" / name).symlink_to(name)
    assert checkpoint.identity(run / "ckpt", "best" if name == "best" else "last") is None
    trainer.train(recipe(runs[0]), run)
    assert equal(weights(run), weights(runs[2]))


def test_a_meta_json_without_its_content_is_no_checkpoint_of_an_older_fgvc(
    runs: tuple[dict, Path, Path], run: Path
) -> None:
    (run / "ckpt" / "last" / "meta.json").write_text("{}")
    trainer.train(recipe(runs[0]), run)
    assert equal(weights(run), weights(runs[2]))


@pytest.mark.parametrize("place", ["run", "runs/mine", "red/run"])
def test_a_run_among_its_own_images_goes_on_without_its_own_pictures(
    runs: tuple[dict, Path, Path], tmp_path: Path, place: str
) -> None:
    data = Path(shutil.copytree(Path(runs[0]["data"]["root"]) / "train", tmp_path / "data"))
    run, own = data / place, {"kind": "folder", "root": str(data)}
    trainer.train(recipe(runs[0], data=own, train={"max_steps": 5}), run)
    assert (run / "plots" / "confusion.png").is_file()
    trainer.train(recipe(runs[0], data=own, train={"max_steps": 6}), run)
    index = read_source(recipe(runs[0], data=own).data)
    assert len(index) == 48
    assert "runs of fgvc are no images of the set" in " ".join(index.warnings)
    assert checkpoint.load(run / "ckpt").progress.step == 6


def test_checkpoints_without_digests_are_read_and_that_is_said_once(
    runs: tuple[dict, Path, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (run / "ckpt").glob("step-*/meta.json"):
        tree = json.loads(path.read_text())
        path.write_text(json.dumps({key: tree[key] for key in tree if key not in ("files", "sha256")}))
    last, best = ((run / "ckpt" / name).resolve().name for name in ("last", "best"))
    shutil.rmtree(run / "ckpt" / "links-1", ignore_errors=True)
    for name, target in (("last", last), ("best", best)):  # as they were
        (run / "ckpt" / name).unlink()
        (run / "ckpt" / name).symlink_to(target)
    (run / "ckpt" / "links").unlink()
    shutil.rmtree(run / "ckpt" / "links-1.1", ignore_errors=True)
    trainer.train(recipe(runs[0]), run)
    assert capfd.readouterr().err.count("without digests") == 1
    assert equal(weights(run), weights(runs[2]))
    assert (run / "ckpt" / "last").readlink() == Path("links/last")


def test_a_copy_without_links_goes_on(runs: tuple[dict, Path, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[1], tmp_path / "run", symlinks=False))
    assert not (run / "ckpt" / "last").is_symlink()
    trainer.train(recipe(runs[0]), run)
    for name in ("last", "best", "start"):
        assert equal(weights(run, name), weights(runs[2], name))


def required_start(run: Path) -> list[Path]:
    """All that is left of a run that was killed after its first checkpoint."""
    for path in (run / "ckpt").glob("*"):
        if path.name != "start":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return list((run / "ckpt").iterdir())


def test_a_run_goes_on_from_its_start_where_nothing_else_is_left(
    runs: tuple[dict, Path, Path], run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert required_start(run) == [run / "ckpt" / "start"]
    trainer.train(recipe(runs[0]), run)
    assert "Using start, the newest checkpoint that is whole" in capfd.readouterr().err
    for name in ("last", "best", "start"):
        assert equal(weights(run, name), weights(runs[2], name))


@pytest.mark.parametrize("sections", [{}, {"swa": {"start": 0.5}, "ema": None, "select": None}, {"model": {"head": "zero"}}])
def test_every_new_run_keeps_what_it_started_from(runs: tuple[dict, Path, Path], tmp_path: Path, sections: dict) -> None:
    one = recipe(runs[0] | {key: value for key, value in sections.items() if value is None}, **{
        key: value for key, value in sections.items() if value is not None
    }, checkpoint={"keep": 0, "every_steps": 1})  # fmt: skip
    run = trainer.train(one, tmp_path / "run")
    state = checkpoint.load(run / "ckpt", "start")
    assert (state.progress.step, state.progress.finished) == (0, False)
    assert not equal(weights(run, "start"), weights(run))
    assert (weights(run, "start")["fc.weight"].any().item()) == (one.model.head != "zero")
    again = trainer.train(one, tmp_path / "again", resume="never")
    assert equal(weights(again, "start"), weights(run, "start"))


def test_the_start_is_looked_at_by_name(runs: tuple[dict, Path, Path], tmp_path: Path) -> None:
    """Its numbers are of what it holds, whatever becomes of the run."""
    run = Path(shutil.copytree(runs[2], tmp_path / "run", symlinks=True))
    evaluation = api.evaluate(run, "val", select="start")
    assert (run / "tables" / "classes-val-start.csv").is_file()
    assert read_measured(run, "metrics.json")["val.start"]["top1"] == pytest.approx(evaluation.scores.top1)
    begun = Path(shutil.copytree(runs[2], tmp_path / "begun", symlinks=True))
    required_start(begun)
    assert api.evaluate(begun, "val", select="last").scores.loss == evaluation.scores.loss
    exported = api.export(run, tmp_path / "bundle", select="start")
    metrics = json.loads((exported.bundle / "metrics.json").read_text())
    assert metrics["val"]["top1"] == pytest.approx(evaluation.scores.top1)


START = {
    "damaged": (lambda ckpt: flip(ckpt / "start" / "net.safetensors"), r"net\.safetensors: its SHA-256 is another"),
    "gone": (lambda ckpt: shutil.rmtree(ckpt / "start"), "it is not there"),
}


@pytest.mark.parametrize("kind", START)
def test_without_its_start_a_run_goes_on_and_says_so(
    runs: tuple[dict, Path, Path], run: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Gone is it, too, in a run of an fgvc that kept none."""
    lose, why = START[kind]
    lose(run / "ckpt")
    trainer.train(recipe(runs[0]), run)
    message = capfd.readouterr().err
    assert re.search(f"WARNING: .*ckpt/start: {why}; the run goes on without what it started from", message)
    assert equal(weights(run), weights(runs[2]))
    assert (run / "ckpt" / "start").is_dir() == (kind == "damaged"), "what is damaged is not deleted"
    advice = "damaged checkpoint .*put a copy" if kind == "damaged" else "of an earlier fgvc, which kept none, or it is gone"
    with pytest.raises(FgvcError, match=f"ckpt/start: .*{advice}"):
        api.evaluate(run, "val", select="start")


@pytest.mark.parametrize("keep", [0, 3])
def test_older_checkpoints_are_kept_as_asked(tmp_path: Path, keep: int) -> None:
    for step in range(8):
        net = {"w": torch.zeros(3)}
        state = checkpoint.State(net, {}, None, {}, checkpoint.Progress(step=step))
        checkpoint.save(tmp_path, state, best=step == 2, keep=keep, start=step == 0)
    kept = {int(path.name[5:]) for path in tmp_path.glob("step-*")}
    assert kept == {2, 7, *range(7 - keep, 7)}
    assert checkpoint.load(tmp_path, "start").progress.step == 0


def test_a_copy_of_a_run_whose_checkpoints_lie_elsewhere_leaves_those_alone(
    runs: tuple[dict, Path, Path], run: Path, tmp_path: Path
) -> None:
    disk = (run / "ckpt").rename(tmp_path / "disk")
    (run / "ckpt").symlink_to(disk)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    copy = trainer.train(recipe(runs[0]), tmp_path / "copy", resume=str(run))
    assert equal(weights(copy), weights(runs[2]))
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    trainer.train(recipe(runs[0]), run)  # on that disk
    assert (run / "ckpt").is_symlink()
    assert equal(weights(run), weights(runs[2]))


def test_a_copy_goes_on_from_the_last_checkpoint_and_does_not_pretend_otherwise(
    runs: tuple[dict, Path, Path], tmp_path: Path
) -> None:
    ckpt = runs[1] / "ckpt"
    older = next(path for path in ckpt.glob("step-*") if path != (ckpt / "last").resolve())
    with pytest.raises(FgvcError, match="a run goes on from its last checkpoint"):
        trainer.train(recipe(runs[0]), tmp_path / "copy", resume=str(older))
    assert not (tmp_path / "copy").exists()
    assert equal(weights(trainer.train(recipe(runs[0]), tmp_path / "copy", resume=str(ckpt / "last"))), weights(runs[2]))


def test_a_finished_run_that_was_killed_before_its_last_word_is_completed(
    runs: tuple[dict, Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs[2], tmp_path / "run", symlinks=True))
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join(lines[:-1]))
    (run / "plots" / "curves.png").unlink()
    for _ in range(2):
        trainer.train(recipe(runs[0]), run)
        events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
        assert events.count("finished") == 1
        assert (run / "plots" / "curves.png").is_file()
    assert equal(weights(run), weights(runs[2]))


def test_a_copy_of_another_run_that_was_killed_midway_is_made_again(
    runs: tuple[dict, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"

    def half(source: Path, target: Path, **_: object) -> None:
        target.mkdir()
        shutil.copy(source / "config.yaml", target)
        os._exit(9)

    if not (pid := os.fork()):
        monkeypatch.setattr(shutil, "copytree", half)
        try:
            trainer.train(recipe(runs[0]), out, resume=str(runs[1]))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not out.exists()
    trainer.train(recipe(runs[0]), out, resume=str(runs[1]))
    assert equal(weights(out), weights(runs[2]))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
