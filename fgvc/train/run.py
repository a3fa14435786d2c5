"""The folder of a run: `config.yaml env.json events.jsonl metrics.csv ckpt/ plots/`, and who may write to it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgvc import __version__
from fgvc.config import Preprocess, differences, dump, load, validate
from fgvc.naming import refuse_breaking
from fgvc.recipe import Recipe, Selected
from fgvc.train import checkpoint
from fgvc.train.events import write_atomic
from fgvc.types import FgvcError

MAY_CHANGE = ("train.epochs", "train.max_steps", "log.")  # when a run goes on
MEASURED = ("metrics.json", "localisation.json")  # of weights that change when a run goes on
PACKAGES = ("torch", "torchvision", "timm", "albumentations", "numpy", "pillow", "onnx", "onnxruntime", "onnxscript")


def open_run(out: Path, recipe: Recipe, *, resume: str = "auto", overwrite: bool = False) -> bool:
    """Whether a run in `out` goes on from its checkpoint. Destroys nothing and, but for a copied run, writes nothing.

    `resume`: auto (go on if `out` holds an unfinished run), never (start anew; refuses an existing run unless
    `overwrite`), or a path of another run to go on from, whose checkpoint and history are copied into `out`; given
    again, the copy goes on.
    Raises FgvcError for a finished run without `overwrite`, a changed recipe, or a folder that is no run.
    """
    if resume not in ("auto", "never"):
        if overwrite:
            raise FgvcError("--overwrite loses a run, --resume PATH goes on with one: give one of the two")
        if _adopt(Path(resume), out, recipe):
            return True
    config = out / "config.yaml"
    if not config.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise FgvcError(f"{out}: not empty and not a run of fgvc; choose another --out")
        return False
    if overwrite:
        return False
    if not (out / "ckpt" / "last" / "meta.json").is_file():
        return False  # killed before its first checkpoint: nothing is lost by starting anew
    if resume == "never":
        raise FgvcError(
            f"{out}: holds a run already; choose another --out, give --overwrite, or let it go on with --resume auto"
        )
    _check_continues(out, recipe)
    return True


def _check_continues(out: Path, recipe: Recipe) -> None:
    """Raises FgvcError where the run in `out` can't go on with this recipe."""
    old = read_run(out)
    changed = differences(old.model_dump(mode="json"), recipe.model_dump(mode="json"))
    refused = {key: pair for key, pair in changed.items() if not key.startswith(MAY_CHANGE)}
    if refused:
        rows = "\n".join(f"  {key}: {a!r} in the run, {b!r} now" for key, (a, b) in refused.items())
        raise FgvcError(
            f"{out}: this run was started with other settings:\n{rows}\n"
            "Only train.epochs, train.max_steps and log may change; "
            "choose another --out, or give --overwrite to lose the old run"
        )
    state = checkpoint.load(out / "ckpt")
    longer = recipe.train.epochs > old.train.epochs or (recipe.train.max_steps or 10**12) > (
        old.train.max_steps or 10**12
    )
    if state.progress.finished and not longer:
        raise FgvcError(
            f"{out}: this run is finished; give --overwrite to lose it, raise train.epochs to go on, "
            "or choose another --out"
        )


def start_run(out: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Begin a new run in `out`: what an earlier run wrote there is removed, all else stays.

    `facts`: file name -> what JSON is to hold; `continue_run` compares them when the run goes on.
    """
    for name in ("ckpt", "masks", "plots", "tables"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("config.yaml", "env.json", "events.jsonl", "metrics.csv", *MEASURED):
        (out / name).unlink(missing_ok=True)
    try:
        (out / "ckpt").mkdir(parents=True, exist_ok=True)
        (out / "plots").mkdir(exist_ok=True)
        write_atomic(out / "config.yaml", dump(recipe))
        write_atomic(out / "env.json", _json(environment() | {"command": sys.argv[1:]}))
        for name, value in facts.items():
            write_atomic(out / name, _json(value))
    except OSError as error:
        raise FgvcError(f"{out}: can't make the run's folder: {error.strerror}") from error


def recorded_preprocess(out: Path) -> Preprocess:
    """What turned images into the input of this run's net from its start. Raises FgvcError where that is not recorded."""
    return validate(Preprocess, _recorded(out, "preprocess.json"), where=str(out / "preprocess.json"))


def recorded_classes(out: Path) -> tuple[str, ...]:
    """The names of this run's classes, in the order of its net's outputs. Raises FgvcError where they are not recorded."""
    found = _recorded(out, "labels.json")
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise FgvcError(f"{out / 'labels.json'}: expected a list of class names")
    refuse_breaking(found, where=out / "labels.json")
    return tuple(found)


def _recorded(out: Path, name: str) -> Any:
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FgvcError(f"{out}: the run was not started yet ({error})") from error


def measured(out: Path, name: str) -> dict[str, Any]:
    """What one of MEASURED holds; empty where nothing was measured. Raises FgvcError where it is not as fgvc writes it."""
    path = out / name
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise FgvcError(f"{path}: not as fgvc wrote it ({error}); remove it and measure again") from error
    if not isinstance(found, dict) or not all(isinstance(numbers, dict) for numbers in found.values()):
        raise FgvcError(f"{path}: not as fgvc wrote it (expected an object of objects); remove it and measure again")
    return found


def continue_run(out: Path, recipe: Recipe, facts: Mapping[str, Any]) -> None:
    """Go on with a run. Raises FgvcError where its classes are no longer what they were."""
    for name, value in facts.items():
        if (out / name).is_file() and (out / name).read_text(encoding="utf-8") != _json(value):
            raise FgvcError(
                f"{out}: {name} of this run is not what the data give now, so its weights would be misread; "
                "restore the data, or train anew in another --out"
            )
    for name in MEASURED:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "tables", ignore_errors=True)
    write_atomic(out / "config.yaml", dump(recipe))


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def read_run(out: Path) -> Recipe:
    """The resolved recipe of a run. Raises FgvcError where the folder is none."""
    config = out / "config.yaml"
    if not config.is_file():
        raise FgvcError(f"{out}: not a run of fgvc (no config.yaml)")
    return load(Recipe, config)


@dataclass(frozen=True, slots=True)
class Trained:
    """Of one run: a net's weights, and those of the branches beside it."""

    weights: Mapping[str, Tensor]
    branches: Mapping[str, Tensor]


def selected_weights(out: Path, recipe: Recipe, select: Selected) -> Trained:
    """The weights of a run that `select` names. Raises FgvcError where it has none."""
    if select == "ema" and recipe.ema is None:
        raise FgvcError(f"{out}: has no moving average; train with ema.decay=0.999, or choose --select last")
    if select == "swa" and recipe.swa is None:
        raise FgvcError(f"{out}: has no SWA; train with swa.start=0.75, or choose --select last")
    state = checkpoint.load(out / "ckpt", "best" if select == "best" else "last")
    if select == "swa" and state.ema is None:
        raise FgvcError(f"{out}: SWA holds no epoch yet; train on to the end, or choose --select last")
    averaged = select in ("ema", "swa") or (select == "best" and recipe.selected != "last" and state.ema is not None)
    return Trained((state.ema if averaged else state.net) or {}, state.branches)


def environment() -> dict[str, Any]:
    """Versions and machine, for env.json and for every measured table."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "fgvc": __version__,
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _adopt(source: Path, out: Path, recipe: Recipe) -> bool:
    """Go on from another run: copy it first, in full or not at all, so that it stays as it is. Whether a copy was made:
    then it is known to go on with this recipe."""
    source = source.parent.parent if source.parent.name == "ckpt" else source
    read_run(source)
    if source.resolve() == out.resolve():
        return False
    places = {"a file": out.is_file(), "the working folder": out.resolve() == Path.cwd()}
    places[f"inside of {source}"] = source.resolve() in out.resolve().parents
    if wrong := [place for place, is_so in places.items() if is_so]:
        raise FgvcError(f"{out}: {wrong[0]}: the run can't be copied there; choose another --out")
    out = out.resolve()
    if out.exists() and any(out.iterdir()):
        if _history(source) and _history(out).startswith(_history(source)):
            return False  # the same command once more
        raise FgvcError(f"{out}: not empty; --resume PATH copies the run into a new --out")
    _check_continues(source, recipe)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, scratch, symlinks=True)
        os.replace(scratch, out)
    except OSError as error:  # copytree's own has a list instead of a reason
        raise FgvcError(f"{out}: can't copy {source} there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _history(run: Path) -> bytes:
    events = run / "events.jsonl"
    return events.read_bytes() if events.is_file() else b""
