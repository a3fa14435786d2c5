"""The folder of a run: `config.yaml index.npz env.json events.jsonl metrics.csv ckpt/ plots/ .lock`, and who may write to it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fgvc.config.images import Preprocess
from fgvc.config.loading import differences, dump, load, read_tree, validate
from fgvc.config.recipe import Recipe
from fgvc.config.techniques import Techniques
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.files import (
    as_json,
    file_lock,
    holder,
    make_folder,
    remove,
    remove_empty,
    rename,
    sync,
    write_atomic,
    writing,
)
from fgvc.io.places import what_it_is
from fgvc.runs import checkpoint, deployed, trackers
from fgvc.runs.environment import absent_packages, environment
from fgvc.runs.images import resumed_index
from fgvc.runs.measured import remove_measured, sweep_run
from fgvc.runs.record import NAME, Record
from fgvc.runtime.bundle import read_labels

MAY_CHANGE = (  # when a run goes on; where its images lie, as long as they are the same
    "train.epochs", "train.max_steps", "train.patience", "train.refit", "train.workers", "train.device", "log.", "checkpoint.",
    "export.", "cache", "cache_dir", "techniques.distill.cache", "data.root", "data.file", "data.download", "data.max_unreadable",
    "data.max_megapixels", "deploy.labels", "deploy.unseen",
)  # fmt: skip
LOCK = ".lock"  # of the process that trains
INTERPOLATION = "interpolation.json"  # of a run that `fgvc interpolate` made


RunStatus = Literal["new", "on", "finished"]


@contextmanager
def lock_run(out: Path) -> Iterator[None]:
    """Lock `out`, so that this process alone trains there until the context or the process ends. Where no run was begun, the
    folder and its parents are removed again.

    Raises FgvcError that names the process which holds it, or says why there is no lock.
    """
    missing = [path for path in (out, *out.parents) if not path.exists()]
    with writing(out):
        make_folder(out)
    try:
        with file_lock(lock := out / LOCK) as locked:
            if not locked:
                raise FgvcError(f"{out}: is being trained by {holder(lock)}; wait for it, or choose another --out")
            try:
                if (out / "config.yaml").is_file():
                    sweep_run(out)
                yield
            finally:
                if not (out / "config.yaml").is_file():
                    remove(lock)
    finally:
        for path in missing:
            remove_empty(path)


@contextmanager
def claim_run(
    out: Path,
    recipe: Recipe,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    recorded: bool = False,
    say: checkpoint.Say | None = None,
) -> Iterator[RunStatus]:
    """Lock `out` and yield its status (`run_status`); with the path of another run for `resume`, copy that run there first.

    Raises FgvcError as these do, where `out` is locked, and for `overwrite` with such a path."""
    if from_other := resume not in ("auto", "never"):
        if overwrite:
            raise FgvcError("--overwrite loses a run, --resume PATH goes on with one: give one of the two")
        copy_run(Path(resume), out, recipe, recorded=recorded)
    with lock_run(out):
        yield run_status(out, recipe, resume="auto" if from_other else resume, overwrite=overwrite, say=say)


def run_status(
    out: Path, recipe: Recipe, *, resume: str = "auto", overwrite: bool = False, say: checkpoint.Say | None = None
) -> RunStatus:
    """Whether the run in `out` is new, goes on from its checkpoint, or is finished, by these settings. Destroys
    nothing and writes nothing; the caller holds `out`.

    `resume`: auto (go on if `out` holds a run), never (start anew; refuses an existing run unless `overwrite`).
    Raises FgvcError for a run that ends otherwise, a changed recipe, or a folder that is no run, or holds no whole checkpoint.
    """
    if overwrite or not checkpoint.has_checkpoint(out / "ckpt"):
        _refuse_foreign_folder(out)
        if not overwrite and is_run(out):  # killed before its first one, or somebody has taken them away
            (say or _warn)(f"{out / 'ckpt'}: holds no checkpoint: this run begins anew")
        return "new"
    if resume == "never":
        raise FgvcError(
            f"{out}: holds a run already; choose another --out, give --overwrite, or let it go on with --resume auto"
        )
    return _check_continues(out, recipe, say)


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _refuse_foreign_folder(out: Path) -> None:
    """Raise FgvcError where the folder holds something else than a run."""
    if (out / "config.yaml").is_file() or not out.is_dir():
        return
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise FgvcError(f"{out}: not empty and not a run of fgvc; choose another --out")


def _check_continues(out: Path, recipe: Recipe, say: checkpoint.Say | None = None) -> RunStatus:
    """Whether the run in `out` goes on or is finished. Raises FgvcError where it can't go on with this recipe."""
    old = read_run(out)
    recipe = resumed_recipe(recipe, old)
    if refused := changed_settings(old, recipe):
        rows = "\n".join(f"  {key}: {a!r} in the run, {b!r} now" for key, (a, b) in refused.items())
        raise FgvcError(
            f"{out}: this run was started with other settings:\n{rows}\n{new_run_advice(out)}, or give --overwrite to lose this "
            f"run.\nWhat may change: {', '.join(key.rstrip('.') for key in MAY_CHANGE)}"
        )
    progress = checkpoint.read_progress(out / "ckpt", say=say)
    then, now = ((old.train.epochs, old.train.last_step), (recipe.train.epochs, recipe.train.last_step))
    more_patience = progress.ended_early(old.train) and not progress.ended_early(recipe.train)
    if progress.finished and then == now and not more_patience:
        return "finished"
    if progress.finished and now[0] <= then[0] and now[1] <= then[1] and not more_patience:
        raise FgvcError(
            f"{out}: this run is finished; raise {end_setting(recipe, progress)} to go on, give --overwrite to lose it, or "
            "choose another --out"
        )
    if (out / INTERPOLATION).is_file():
        raise FgvcError(
            f"{out}: lies between two nets (fgvc interpolate): no training can go on from there. {new_run_advice(out)}"
        )
    return "on"


def changed_settings(recorded: Recipe, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings, those of MAY_CHANGE apart, in which a recipe is not that of a run, which would go on with it: dotted key ->
    (in the run, now). Raises FgvcError where it names another deployed file."""
    changed = differences(
        recorded.model_dump(mode="json"), resumed_recipe(recipe, recorded).model_dump(mode="json")
    )
    return {key: pair for key, pair in changed.items() if not key.startswith(MAY_CHANGE)}


def resumed_recipe(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe of a run that goes on, with what the run resolved when it began: its selection, with the average that it ships,
    what was `auto`, and its deployed file. Raises FgvcError where it names another file."""
    recipe = deployed.with_recorded_file(recipe, recorded)
    averages = recipe.select is None and recorded.select == "ema" and recipe.ema is None and recipe.swa is None
    update = {"select": recipe.select or recorded.select, "train": recipe.train.settled_as(recorded.train)}
    return recipe.model_copy(update=update | ({"ema": recorded.ema} if averages else {}))


def end_setting(recipe: Recipe, progress: checkpoint.Progress) -> str:
    """Name of the setting that ends a run where it is now."""
    steps = recipe.train.max_steps
    if steps is not None and steps <= progress.step:
        return "train.max_steps"
    return "train.patience" if progress.ended_early(recipe.train) else "train.epochs"


def new_run_advice(out: Path) -> str:
    """Advice on training a run's weights with other settings than those of MAY_CHANGE: a sentence without its full stop."""
    weights = out / "ckpt" / "last" / "net.safetensors"
    if not weights.is_file():
        return f"Nothing of {out} is saved yet: it starts anew with other settings"
    return f"To go on from its weights with other settings, begin a new run: another --out and model.weights={weights}"


def start_run(out: Path, recipe: Recipe, facts: Mapping[str, Any], images: Record) -> None:
    """Begin a new run in `out`: what an earlier run wrote there is removed, all else stays. Killed at any moment, `out` is one
    that may begin anew (`run_status`).

    `facts`: file name -> what JSON is to hold; `refuse_changed` compares them when the run goes on.
    """
    deployed.refuse_inside(out, recipe)
    with writing(out):
        make_folder(out)
        remove(old_checkpoints := out / ".gone-ckpt")
        if os.path.lexists(out / "ckpt"):  # before the new settings are there, which are not those of its weights
            rename(out / "ckpt", old_checkpoints)
        write_atomic(out / "config.yaml", dump(deployed.as_kept(recipe)))  # the mark of a run
        sweep_run(out)
        old = (NAME, INTERPOLATION, deployed.FOLDER, deployed.RECORD, "masks", "plots", "events.jsonl", "metrics.csv")
        for name in (old_checkpoints.name, *old, trackers.NAME, trackers.FOLDER):
            remove(out / name)
        if recipe.model.onnx is not None:
            deployed.keep_file(out, recipe.model.onnx, images.index.classes)
        remove_measured(out)
        for folder in ("ckpt", "plots"):
            make_folder(out / folder)
        write_atomic(out / "env.json", as_json(environment() | {"command": sys.argv[1:]}))
        for name, value in facts.items():
            write_atomic(out / name, as_json(value))
        write_atomic(out / NAME, images.dump())


def recorded_preprocess(out: Path) -> Preprocess:
    """Read the run's recorded preprocessing. Raises FgvcError where it is not recorded."""
    return validate(Preprocess, _read_json(out, "preprocess.json"), where=str(out / "preprocess.json"))


def recorded_classes(out: Path) -> tuple[str, ...]:
    """Read the names of the run's classes, in the order of its net's outputs. Raises FgvcError where they are not recorded."""
    _read_json(out, "labels.json")  # in a run's words where it is gone or cut short
    return read_labels(out / "labels.json")


def _read_json(out: Path, name: str) -> Any:
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if not checkpoint.has_checkpoint(out / "ckpt"):
            raise FgvcError(f"{out}: the run was not started yet ({error})") from error
        raise FgvcError(
            f"{out / name}: gone or damaged ({error}); put a copy of it there: a bundle that was exported from this run has one"
        ) from error


def refuse_changed(out: Path, facts: Mapping[str, Any]) -> None:
    """Raise FgvcError where the run's classes or preprocessing are no longer what they were."""
    for name, value in facts.items():
        if (out / name).is_file() and (out / name).read_bytes() != as_json(value).encode(errors="backslashreplace"):
            raise FgvcError(
                f"{out}: {name} of this run is not what the data give now, so its weights would be misread; "
                "restore the data, or train anew in another --out"
            )


def continue_run(out: Path, recipe: Recipe, index: ImageIndex) -> None:
    """Write the settings with which a run goes on; a run of an earlier fgvc has its images recorded now."""
    remove_measured(out)
    if not (out / NAME).is_file():
        write_atomic(out / NAME, Record.of(index).dump())
    write_atomic(out / "config.yaml", dump(deployed.as_kept(recipe)))


def update_settings(out: Path, recipe: Recipe, *, recorded: bool = False) -> None:
    """Write a finished run's settings that may change, such as where its images lie now; what was measured stays. Raises
    FgvcError where they are other images."""
    recorded_recipe = read_run(out)
    recipe = resumed_recipe(recipe, recorded_recipe)
    if recipe != recorded_recipe:
        resumed_index(out, recipe, recorded=recorded)
        write_atomic(out / "config.yaml", dump(deployed.as_kept(recipe)))


def logged_finished(out: Path) -> bool:
    """Whether the last event is that the run finished; a run that was killed after its last checkpoint has no such event."""
    lines = _event_log(out).decode(errors="replace").splitlines()
    return bool(lines) and '"event": "finished"' in lines[-1]


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: it has a config.yaml."""
    return (folder / "config.yaml").is_file()


def read_run(out: Path) -> Recipe:
    """Read the resolved recipe of a run. Raises FgvcError where the folder is none, or a technique's package is gone."""
    config = out / "config.yaml"
    if not config.is_file():
        missing = "no config.yaml" if out.is_dir() else "not a folder" if out.exists() else "there is nothing"
        raise FgvcError(f"{out}: not a run of fgvc ({missing}){what_it_is(out)}")
    try:
        recipe = load(Recipe, config)
    except FgvcError as error:
        techniques = read_tree(config)[0].get("techniques") or {}
        absent = [kind for kind, given in techniques.items() if given is not None and kind not in Techniques.model_fields]
        if not absent:
            raise
        packages = absent_packages(out / "env.json")
        advice = f"; the run was made with {' and '.join(packages)}: install it" if packages else f": {Techniques.absent}"
        raise FgvcError(f"{out}: no technique {' or '.join(map(repr, absent))}{advice}") from error
    return deployed.from_kept(recipe, out)


def recorded_file(out: Path, recipe: Recipe) -> Path | None:
    """The run's own copy of its deployed file; None without one. Raises FgvcError where it is not what the run began with."""
    if recipe.model.onnx is not None:
        deployed.refuse_damaged(out, recipe.model.onnx, _read_json(out, deployed.RECORD))
    return recipe.model.onnx


def required_start(out: Path, recipe: Recipe) -> checkpoint.State | None:
    """Read the state that a resumed run began with, which `optim.l2_sp` needs; else None. Raises FgvcError where it is gone or
    damaged."""
    if not recipe.optim.l2_sp:
        return None
    if (reason := checkpoint.fault(out / "ckpt", "start")) is not None:
        raise FgvcError(
            f"{out}: optim.l2_sp draws the weights to those that this run began with, and {out}/ckpt/start: {reason}. Put a "
            f"copy of it there. {new_run_advice(out)}"
        )
    return checkpoint.load(out / "ckpt", "start")


def copy_run(source: Path, out: Path, recipe: Recipe, *, recorded: bool = False) -> None:
    """Copy another run, in full or not at all; the same command once more leaves the copy as it is.
    `recorded`: see `fgvc.runs.images.resumed_index`. Raises FgvcError where it can't go on with this recipe, or can't be copied
    there."""
    if source.parent.name == "ckpt":
        named, source = source, source.parent.parent
        if named.resolve() != (source / "ckpt" / "last").resolve():
            raise FgvcError(
                f"{named}: a run goes on from its last checkpoint: --resume {source}. To train from others' weights, begin "
                f"a new run with model.weights={named / 'net.safetensors'}"
            )
    read_run(source)
    if source.resolve() == out.resolve():
        return
    places = {"a file": out.is_file(), "the working folder": out.resolve() == Path.cwd()}
    places[f"inside of {source}"] = source.resolve() in out.resolve().parents
    if wrong := [place for place, is_so in places.items() if is_so]:
        raise FgvcError(f"{out}: {wrong[0]}: the run can't be copied there; choose another --out")
    out = out.resolve()
    if out.exists() and any(path.name != LOCK for path in out.iterdir()):
        if _event_log(source) and _event_log(out).startswith(_event_log(source)):
            return  # the same command once more
        raise FgvcError(f"{out}: not empty; --resume PATH copies the run into a new --out")
    if _check_continues(source, recipe) == "finished":
        end = end_setting(recipe, checkpoint.read_progress(source / "ckpt"))
        raise FgvcError(f"{source}: this run is finished; raise {end} to go on with it")
    resumed_index(source, recipe, recorded=recorded)  # or a copy would be there that can't go on
    scratch = out.with_name(f".{out.name}.copy")
    try:
        make_folder(out.parent)
        with file_lock(lock := scratch.with_suffix(".lock")) as locked:
            if not locked:
                raise FgvcError(f"{out}: {holder(lock)} copies a run there; choose another --out")
            _copy(source, scratch, out)
    except OSError as error:  # copytree's own has a list instead of a reason
        raise FgvcError(f"{out}: can't copy {source} there: {error.strerror or error}") from error


def _copy(source: Path, scratch: Path, out: Path) -> None:
    remove(scratch)  # of a process that was killed
    try:
        # The copy is a run of its own to trackers.
        shutil.copytree(source, scratch, symlinks=True, ignore=shutil.ignore_patterns(LOCK, trackers.NAME))
        for link in [path for path in scratch.iterdir() if path.is_symlink()]:  # what lies elsewhere is the source's own
            remove(link)
            original = source / link.name
            shutil.copytree(original, link, symlinks=True) if original.is_dir() else shutil.copy2(original, link)
        for path in [*scratch.rglob("*"), scratch]:
            if not path.is_symlink():
                sync(path)
        if out.is_dir():
            remove(out / LOCK)  # of a process that was killed
        os.replace(scratch, out)
        sync(out.parent)
    finally:
        remove(scratch)
        remove(scratch.with_suffix(".lock"))


def _event_log(run: Path) -> bytes:
    events = run / "events.jsonl"
    return events.read_bytes() if events.is_file() else b""
