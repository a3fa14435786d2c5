"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `ckpt/step-00000123/`; `ckpt/last` and `ckpt/best` are links to such folders, swapped atomically.
So no name ever points at a half-written one, and the previous checkpoint stays until the next is safe on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fgvc.config import Section
from fgvc.disk import sync
from fgvc.types import FgvcError

Name = Literal["last", "best"]


class Checkpoint(Section):
    """How often a run saves what it needs to continue."""

    every_steps: int | None = Field(None, ge=1, description="beside the end of every epoch; counted in optimizer steps")


@dataclass(slots=True)
class Progress:
    """Where a run is, in words that JSON can hold."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # of the next step, from 0
    micro: int = 0  # micro-batches of that epoch already used
    finished: bool = False
    best: float | None = None  # validation score of ckpt/best
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch: metrics.csv
    sums: dict[str, float] = field(default_factory=dict)  # running sums of this epoch's losses
    counts: dict[str, int] = field(default_factory=dict)  # of the steps that had them
    seconds: float = 0.0  # of training so far, over all sessions


@dataclass(slots=True)
class State:
    """What one checkpoint holds. Weights as safetensors; the rest with torch.load(weights_only=True)."""

    net: Mapping[str, Tensor]  # the trained net, unfused
    branches: Mapping[str, Tensor]  # never ships
    ema: Mapping[str, Tensor] | None  # the average of the weights: the EMA, or SWA's once it holds an epoch
    rest: Mapping[str, Any]  # optimizer, scaler, random generators, techniques, how many epochs SWA holds
    progress: Progress


def save(folder: Path, state: State, *, best: bool = False) -> None:
    """Write a checkpoint into the run's `ckpt` folder and point `last` (and `best`) at it.

    Raises FgvcError when the disk is full, with the earlier checkpoints untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"step-{state.progress.step:08d}{suffix}" for suffix in ("", *(f".{n}" for n in range(1, 1000))))
    target = next(folder / name for name in names if not (folder / name).exists())
    scratch = folder / f".{target.name}.{os.getpid()}"
    try:
        _sweep(folder)
        scratch.mkdir()
        for name, tensors in (("net", state.net), ("branches", state.branches), ("ema", state.ema)):
            if tensors is not None:
                save_file({k: v.detach().contiguous() for k, v in tensors.items()}, scratch / f"{name}.safetensors")
        torch.save(dict(state.rest), scratch / "state.pt")
        (scratch / "meta.json").write_text(json.dumps(asdict(state.progress), indent=1) + "\n")
        for path in scratch.iterdir():
            sync(path)
        sync(scratch)
        os.replace(scratch, target)
        for name in ("last", "best") if best else ("last",):
            _point(folder / name, target.name)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise FgvcError(
            f"{folder}: can't save a checkpoint ({error}); the earlier one is intact. "
            "Free some space and run the same command again"
        ) from error
    _prune(folder, keep=target.name)


def read_progress(folder: Path) -> Progress:
    """How far a run is by its last checkpoint. Raises FgvcError where there is none or it is damaged."""
    with _reading(folder / "last") as path:
        return _progress(path)


def load(folder: Path, name: Name = "last", *, device: torch.device | str = "cpu") -> State:
    """Read the checkpoint that `ckpt/<name>` points at. Raises FgvcError where there is none or it is damaged."""
    with _reading(folder / name) as path:
        progress, where = _progress(path), str(device)
        ema = path / "ema.safetensors"
        return State(
            net=load_file(path / "net.safetensors", where),
            branches=load_file(path / "branches.safetensors", where),
            ema=load_file(ema, where) if ema.is_file() else None,
            rest=torch.load(path / "state.pt", map_location="cpu", weights_only=True),
            progress=progress,
        )


@contextmanager
def _reading(link: Path) -> Iterator[Path]:
    """The checkpoint's own folder, followed once: a run that trains on may move the link meanwhile."""
    path = link.resolve()
    if not (path / "meta.json").is_file():
        raise FgvcError(f"{link}: no checkpoint here")
    try:
        yield path
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise FgvcError(f"{link}: damaged checkpoint ({error}); start again with --resume never") from error


def _progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "meta.json").read_text()))


def _point(link: Path, target: str) -> None:
    """Make `link` a link to `target` (a sibling) in one atomic step."""
    scratch = link.with_name(f".{link.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.symlink_to(target, target_is_directory=True)
    os.replace(scratch, link)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for path in folder.glob(".*"):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)


def _prune(folder: Path, *, keep: str) -> None:
    """Keep what `last` and `best` point at and one older checkpoint; newest first."""
    kept = {keep} | {os.readlink(link) for link in (folder / "last", folder / "best") if link.is_symlink()}
    older = sorted((p for p in folder.glob("step-*") if p.name not in kept), reverse=True)
    for path in older[1:]:
        shutil.rmtree(path)
