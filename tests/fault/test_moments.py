"""Killed before, or in the middle of, any change that saving or creating a run makes on the disk, the next process finds a whole
state and ends with that of one that was never killed. Every change goes through `fgvc.io.files`, whose `os` is watched here: what
a kill would leave is what the folder holds at that moment."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from fgvc.config.data import FolderData
from fgvc.config.loading import dump, validate
from fgvc.config.recipe import Recipe
from fgvc.data.sources.read import read_source
from fgvc.io import files as disk
from fgvc.runs import checkpoint
from fgvc.runs.checkpoint import Progress, State
from fgvc.runs.folder import NAME, claim_run, continue_run, start_run
from fgvc.runs.record import Record

CHANGES = ("open", "write", "pwrite", "fsync", "replace", "symlink", "unlink", "mkdir", "rmdir", "ftruncate")


class Watched:
    """The `os` of `fgvc.io.files`, watched: `look` is called before each change, and in the middle of a write."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)

        def change(*arguments: Any, **named: Any) -> Any:
            half = 0
            if name == "write":
                half = real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                arguments = (arguments[0], arguments[1][half:])
            self.look()
            return half + real(*arguments, **named) if name == "write" else real(*arguments, **named)

        return change if name in CHANGES else real


def moments(do: Callable[[], object], folder: Path, copies: Path) -> list[Path]:
    """Copies of `folder`, in `copies`, as a kill at each moment of `do` could leave it, in order; the last is the end."""
    states: list[dict[str, bytes | Path | None]] = []
    places: list[Path] = []

    def look() -> None:
        now = contents_of(folder)
        if not states or now != states[-1]:  # as before a file is waited for, or opened to read
            states.append(now)
            places.append(copies / f"{len(places):03d}")
            if folder.is_dir():
                shutil.copytree(folder, places[-1], symlinks=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "os", Watched(look))
        do()
    look()
    return places


def contents_of(folder: Path) -> dict[str, bytes | Path | None]:
    """What is in a folder: bytes of files, targets of links."""
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in [folder, *folder.rglob("*")]
        if os.path.lexists(path)
    }


def restore(copy: Path, folder: Path) -> None:
    """Make `folder` what it was when it was copied."""
    shutil.rmtree(folder, ignore_errors=True)
    if copy.is_dir():
        copy.rename(folder)


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where the system has such a place: on a disk, half of the time goes by in removing folders."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as place:
        yield Path(place)


@cache
def dumped(recipe: str) -> str:
    """The YAML of one of the two recipes here, made once: it takes longer than all the rest."""
    return dump(Recipe.model_validate_json(recipe))


@pytest.fixture(autouse=True)
def alone_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.runs.folder.environment", dict)
    monkeypatch.setattr("fgvc.runs.folder.dump", lambda recipe: dumped(recipe.model_dump_json()))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # counted, but the machine itself does not die


def state(step: int, best: float = 0.0) -> State:
    net = {"w": torch.full((50,), float(step))}
    return State(net, {}, {"w": net["w"] + 1}, {"buffer": net["w"]}, Progress(step=step, best=best))


def saved(folder: Path, step: int, *, best: bool) -> None:
    """Save a checkpoint as the loop does: on top of what is there."""
    score = float(step) if best else checkpoint.best_score(folder)
    checkpoint.save(folder, state(step, score or 0.0), best=best, start=step == 0)


def facts(folder: Path) -> dict[str, Any]:
    """The checkpoints that the names lead to, and all names that are there."""
    loaded = {name: checkpoint.load(folder, name, say=pytest.fail) for name in ("last", "best", "start")}
    return {name: (one.net["w"][0].item(), one.progress) for name, one in loaded.items()} | {
        "all": sorted(path.name.partition(".")[0] for path in folder.iterdir() if path.name.startswith("step-"))
    }


@pytest.mark.parametrize("best", [True, False])
def test_killed_at_any_moment_of_saving(tmp_path: Path, best: bool) -> None:
    end, here = tmp_path / "end", tmp_path / "here"
    for step in (0, 1, 2, 3):
        saved(here, step, best=step == 2)
    before = facts(here)
    shutil.copytree(here, end, symlinks=True)
    saved(end, 4, best=best)
    after, states = facts(end), moments(lambda: saved(here, 4, best=best), here, tmp_path)
    assert len(states) > 20
    for state in states:
        restore(state, here)
        files = facts(here)
        assert {name: files[name] for name in ("last", "best")} in (
            {name: one[name] for name in ("last", "best")} for one in (before, after)
        ), f"both at once, or neither: {state.name}"
        assert files["last"][1].best == files["best"][1].best, "the recorded score is that of the link"
        assert files["start"] == before["start"]
        if files["last"] == before["last"]:
            saved(here, 4, best=best)  # the next process trains the step again
        saved(here, 5, best=False)
        assert facts(here)["last"][0] == 5
        assert facts(here)["best"] == after["best"]
        assert {path.name for path in here.iterdir() if not path.name.startswith("step-")} == {
            "last", "best", "start", "links", (here / "links").readlink().name,
        }, "nothing of the killed process stays"  # fmt: skip


@pytest.fixture
def recipe(recipe_tree: dict) -> Recipe:
    return validate(Recipe, recipe_tree, where="test")


FACTS = {"labels.json": ["a", "b"], "preprocess.json": {"size": [8, 8]}}


@cache
def images_of(root: Path) -> Record:
    return Record.of(read_source(FolderData(root=root)))


def begun(out: Path, recipe: Recipe, *, overwrite: bool = False) -> None:
    """Begin a run, or go on with it, for its first moments."""
    with claim_run(out, recipe, overwrite=overwrite) as going:
        if going == "new":
            start_run(out, recipe, FACTS, images_of(recipe.data.root))
            saved(out / "ckpt", 0, best=False)
            saved(out / "ckpt", 1, best=True)
        elif going == "on":
            step = checkpoint.load(out / "ckpt").progress.step
            checkpoint.repair(out / "ckpt")
            continue_run(out, recipe, images_of(recipe.data.root).index)
            if step == 0:
                saved(out / "ckpt", 1, best=True)


def content(out: Path) -> dict[str, bytes]:
    weights = [f"ckpt/{name}/net.safetensors" for name in ("last", "best", "start")]
    return {name: (out / name).read_bytes() for name in ("config.yaml", NAME, *FACTS, *weights)}


@pytest.mark.parametrize("old", [None, "to be overwritten", "to go on with"])
def test_killed_at_any_moment_of_creating_a_run(tmp_path: Path, recipe: Recipe, old: str | None) -> None:
    end, out = tmp_path / "end", tmp_path / "out"
    overwrite = old == "to be overwritten"
    if old is not None:
        begun(out, recipe)
        (out / "tables").mkdir()
        for name in ("events.jsonl", "metrics.json", "tables/classes-val.csv"):
            (out / name).write_text("{}\n")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 9})})
    begun(end, longer)
    expected, states = content(end), moments(lambda: begun(out, longer, overwrite=overwrite), out, tmp_path)
    assert len(states) > 10
    for state in states:
        restore(state, out)
        begun(out, longer, overwrite=overwrite)
        assert content(out) == expected, state.name
        assert not [path for path in out.rglob(".[0-9]*")], "half-written files stay"
        assert not (out / "metrics.json").exists()
        assert not (out / "tables").exists()


def test_every_file_of_a_run_goes_through_the_one_writer(tmp_path: Path, recipe_tree: dict) -> None:
    """By the interpreter's own audit of what is opened to write, renamed, linked and removed."""
    from fgvc import api

    tree = recipe_tree | {"ema": {"decay": 0.9}, "techniques": {"ae_psl": {"rounds": 2}}, "image": {"size": 64}}
    recipe, out, strange = validate(Recipe, tree, where="test"), tmp_path / "run", tmp_path / "strange"
    writer = disk.__file__

    def audit(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate"):
            return
        paths = [str(one) for one in arguments if isinstance(one, str | os.PathLike)]
        reading = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if reading or not any(str(out) in path for path in paths):
            return
        frame, names = sys._getframe(1), []
        while frame is not None and len(names) < 6:
            names.append(frame.f_code.co_filename)
            frame = frame.f_back
        if writer not in names[:3]:  # pathlib may stand between
            with open(strange, "a") as file:
                file.write(json.dumps([event, paths, names]) + "\n")

    torch.set_num_threads(1)  # a forked process has none of the others
    if not (pid := os.fork()):
        code = 1
        try:
            sys.addaudithook(audit)
            api.train(recipe, out)
            api.evaluate(out, "val")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert (out / "masks" / "round-1.npy").is_file()
    assert (out / "plots" / "confusion-val.png").is_file()
    assert not strange.exists(), strange.read_text()
