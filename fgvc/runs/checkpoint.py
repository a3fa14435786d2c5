"""Checkpoints of a run: written so that a kill at any moment loses none, and checked for damage when they are read.

A checkpoint is a folder `ckpt/step-00000123/` whose `meta.json` holds the SHA-256 of every file beside it and of itself.
`ckpt/last` and `ckpt/best` are links that lead through `ckpt/links`, which is replaced in one step: so both always belong
together, no name ever points at a half-written checkpoint, and the previous one stays until the next is safe on disk.
`ckpt/start` is no link but the checkpoint of step 0 itself, so that no name can be lost on the way to it; it always stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fgvc.config.training import Train
from fgvc.errors import FgvcError
from fgvc.io.files import file_sha256, fill, make_folder, making, remove, rename, writing
from fgvc.runs.links import LINKS, free_path, leads_to, publish, resolved

Name = Literal["last", "best", "start"]
Say = Callable[[str], None]
T = TypeVar("T")

META, START = "meta.json", "start"
OLDER_KEYS = {"step", "epoch", "micro", "finished", "best", "history", "seconds"}  # in meta.json of every fgvc
READ_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, UnpicklingError, SafetensorError)


@dataclass(slots=True)
class Progress:
    """Progress of a run, as JSON can hold it."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # of the next step, from 0
    micro: int = 0  # micro-batches of that epoch already used
    finished: bool = False
    best: float | None = None  # validation score of ckpt/best
    best_epoch: int | None = None  # after how many epochs that was; 0: the start
    score: float | None = None  # validation score of this checkpoint; None between validations
    history: list[dict[str, float]] = field(default_factory=list)  # one row an epoch: metrics.csv
    sums: dict[str, float] = field(default_factory=dict)  # running sums of this epoch's losses
    counts: dict[str, int] = field(default_factory=dict)  # of the steps that had them
    seconds: float = 0.0  # of training so far, over all sessions

    def ended_early(self, train: Train) -> bool:
        """Whether these settings end the run here, before its last epoch, as validation did not get better (`train.patience`)."""
        waited = None if self.best_epoch is None else self.epoch - self.best_epoch
        return train.patience is not None and waited is not None and waited >= train.patience and self.epoch < train.epochs


@dataclass(slots=True)
class State:
    """Contents of one checkpoint: weights as safetensors; the rest is read with torch.load(weights_only=True)."""

    net: Mapping[str, Tensor]  # the trained net, unfused
    branches: Mapping[str, Tensor]  # never ships
    ema: Mapping[str, Tensor] | None  # the average of the weights: the EMA, or SWA's once it holds an epoch
    rest: Mapping[str, Any]  # optimizer, scaler, random generators, techniques, how many epochs SWA holds
    progress: Progress
    identity: str | None = None  # of the checkpoint that it was read from
    floor: Mapping[str, Tensor] | None = None  # head of the logistic regression on the frozen net; in the start alone


def save(
    folder: Path,
    state: State,
    *,
    best: bool = False,
    keep: int = 1,
    keep_best: int = 1,
    smaller: bool = False,
    start: bool = False,
) -> None:
    """Write a checkpoint into the run's `ckpt` folder and point `last` (and `best`) at it; of older ones that neither names the
    newest `keep` stay, and of those that validation scored the `keep_best` best; `smaller`: of these scores is better. `start`:
    it is the first of a new run, and stays by that name. The caller has the run to itself.

    Raises FgvcError when the disk is full, with the earlier checkpoints untouched.
    """
    try:
        make_folder(folder)
        _rename_copies(folder)
        _sweep(folder)
        place = folder / START if start else free_path(folder, f"step-{state.progress.step:08d}")
        best_name = place.name if best else leads_to(folder / "best")
        if first := leads_to(folder / "last") is None:  # a kill must not leave it without its names
            publish(folder, last=place.name, best=best_name)
        with making(place) as scratch:
            parts = {"net": state.net, "branches": state.branches, "ema": state.ema, "floor": state.floor}
            files = {
                f"{name}.safetensors": fill(scratch / f"{name}.safetensors", _serialised(tensors))
                for name, tensors in parts.items()
                if tensors is not None
            }
            files["state.pt"] = fill(scratch / "state.pt", partial(torch.save, dict(state.rest)))
            fill(scratch / META, _with_digest(asdict(state.progress) | {"files": files}))
        if not first:
            publish(folder, last=place.name, best=best_name)
        _prune(folder, keep=keep, keep_best=keep_best, smaller=smaller)
    except (FgvcError, OSError, RuntimeError, SafetensorError) as error:
        raise FgvcError(
            f"{folder}: can't save a checkpoint ({error}); the earlier one is intact. "
            "Free some space and run the same command again"
        ) from error


def has_checkpoint(folder: Path) -> bool:
    """Whether a `ckpt` folder holds a checkpoint, intact or not, of whatever name. Raises FgvcError where it is unreadable."""
    try:
        entries = list(folder.iterdir()) if os.path.lexists(folder) else []
    except OSError as error:
        raise FgvcError(
            f"{folder}: can't be read ({error.strerror}); make it readable (is its disk mounted?), or remove it to begin anew"
        ) from error
    return any(path.is_dir() and not path.name.startswith((".", LINKS)) for path in entries)


def read_progress(folder: Path, *, say: Say | None = None) -> Progress:
    """Progress in a run's newest intact checkpoint; see `load`. Raises FgvcError where there is none."""
    return _newest(folder, "last", lambda path, meta: meta.progress, say)


def is_finished(folder: Path) -> bool:
    """Whether a run's newest intact checkpoint is its last; not where it has none yet. Raises FgvcError where all are damaged."""
    return (folder / "last").exists() and read_progress(folder).finished


def load(folder: Path, name: Name = "last", *, device: torch.device | str = "cpu", say: Say | None = None) -> State:
    """Read the checkpoint that `ckpt/<name>` points at, each file checked by its SHA-256. Where `last` is damaged or gone it is
    the newest whole one, and `say` (by default stderr) is told so. Raises FgvcError where there is none."""
    return _newest(folder, name, partial(_read_state, device=str(device)), say)


def intact_checkpoints(folder: Path) -> Iterator[tuple[Path, State]]:
    """Yield the intact checkpoints of a `ckpt` folder with their paths: the last, then the newest first."""
    for path in _candidates(folder, "last"):
        try:
            state = _read_state(path, _checked_meta(path), device="cpu")
        except READ_ERRORS:
            continue
        yield path, state


def identity(folder: Path, name: Name = "last") -> str | None:
    """Identity of a checkpoint: the SHA-256 of its meta.json. None where there is none."""
    try:
        return _identity(resolved(folder / name))
    except OSError:
        return None


def slot(select: str) -> Name:
    """Name of the checkpoint that holds the weights of a selection."""
    return "best" if select == "best" else "start" if select in ("start", "floor") else "last"


def fault(folder: Path, name: Name) -> str | None:
    """Reason why the checkpoint of that name can't be read; None where it is intact."""
    try:
        _checked_meta(resolved(folder / name))
    except READ_ERRORS as error:
        return "it is not there" if isinstance(error, FileNotFoundError) else str(error)
    return None


def best_score(folder: Path) -> float | None:
    """Score by which `ckpt/best` was chosen; None where there is none, it is damaged, or the score was no number."""
    try:
        score = _checked_meta(resolved(folder / "best")).progress.best
    except READ_ERRORS:
        return None
    return score if score is not None and math.isfinite(score) else None  # nothing is better than a NaN


def choose_best(folder: Path, name: Literal["start", "last"]) -> None:
    """Point `best` at the checkpoint that goes by another name. The caller has the run to itself."""
    last = leads_to(folder / "last")
    best = START if name == "start" else last
    if last is not None and leads_to(folder / "best") != best:
        publish(folder, last=last, best=best)


def repair(folder: Path) -> None:
    """Point `last` at the newest intact checkpoint; damaged ones are renamed to `damaged-step-...` and never deleted. The
    caller has the run to itself. Raises FgvcError where the system can't."""
    with writing(folder):
        _rename_copies(folder)
        for path in _candidates(folder, "last"):
            try:
                _checked_meta(path)
            except READ_ERRORS:
                rename(path, free_path(folder, f"damaged-{path.name}"))
            else:
                break
        else:
            return
        _sweep(folder)
        if leads_to(folder / "last") != path.name:
            publish(folder, last=path.name, best=leads_to(folder / "best"))


@dataclass(frozen=True, slots=True)
class _Meta:
    """Contents of a checkpoint's meta.json, checked against its files."""

    progress: Progress
    files: Mapping[str, str] | None  # name -> SHA-256; None in a checkpoint of an older fgvc, which took none


def _newest(folder: Path, name: Name, read: Callable[[Path, _Meta], T], say: Say | None) -> T:
    say = say or partial(print, file=sys.stderr, flush=True)
    link, failed = folder / name, {}
    for path in _candidates(folder, name):
        try:
            meta = _checked_meta(path)
            content = read(path, meta)
        except READ_ERRORS as error:
            failed[path.name] = str(error)
            continue
        if failed:
            faults = "; ".join(f"{damaged_name} is damaged ({reason})" for damaged_name, reason in failed.items())
            say(f"WARNING: {folder}: {faults}. Using {path.name}, the newest checkpoint that is whole")
        elif path != resolved(link):
            say(
                f"WARNING: {link}: missing, or it leads nowhere. Using {path.name}, the newest checkpoint that is whole"
            )
        if meta.files is None and path not in _warned:
            _warned.add(path)
            say(f"{path}: written by an older fgvc, without digests; damage to it would not be noticed")
        return content
    if not failed:
        older = ": the run is of an earlier fgvc, which kept none, or it is gone" if name == "start" else ""
        raise FgvcError(f"{link}: no checkpoint here{older}")
    faults = "; ".join(f"{damaged_name}: {reason}" for damaged_name, reason in failed.items())
    advice = {
        "last": "no other is whole. Train anew with --overwrite",
        "best": "choose --select last, or train on",
        "start": "choose --select last, or put a copy of it there",
    }[name]
    raise FgvcError(f"{link}: damaged checkpoint ({faults}); {advice}")


_warned: set[Path] = set()  # checkpoints without digests that were warned of


def _candidates(folder: Path, name: Name) -> list[Path]:
    """Checkpoints to read, in turn: the named one; for `last` then all others, the newest first, the start at the end."""
    first = resolved(folder / name)
    paths = [first] if first.is_dir() else []
    if name != "last":
        return paths
    others = [*_steps(folder), *([folder / START] if (folder / START).is_dir() else [])]
    return paths + [path for path in others if path.resolve() != first]


def _steps(folder: Path) -> list[Path]:
    """Checkpoints of steps, the newest first; of one step the one written last comes first."""
    entries = [(path.name.removeprefix("step-").partition("."), path) for path in folder.glob("step-*") if path.is_dir()]
    numbered = [((int(step), int(copy or 0)), path) for (step, _, copy), path in entries if step.isdigit()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _read_state(path: Path, meta: _Meta, *, device: str) -> State:
    ema = path / "ema.safetensors"
    averaged = ema.is_file() if meta.files is None else ema.name in meta.files
    load_file = safetensors.torch.load_file
    return State(
        net=load_file(path / "net.safetensors", device),
        branches=load_file(path / "branches.safetensors", device),
        ema=load_file(ema, device) if averaged else None,
        rest=torch.load(path / "state.pt", map_location="cpu", weights_only=True),
        progress=meta.progress,
        identity=_identity(path),
        floor=load_file(floor, device) if (floor := path / "floor.safetensors").is_file() else None,
    )


def _identity(path: Path) -> str:
    return hashlib.sha256((path / META).read_bytes()).hexdigest()


def _checked_meta(path: Path) -> _Meta:
    """Read meta.json and check every file by it. Raises one of READ_ERRORS where a file is not what was written."""
    raw = (path / META).read_bytes()
    tree = json.loads(raw)
    progress = {key: tree[key] for key in [field.name for field in fields(Progress)] if key in tree}
    if progress == tree and progress.keys() >= OLDER_KEYS:
        return _Meta(Progress(**progress), None)
    if tree.pop("sha256", None) is None or raw != _with_digest(tree).encode():
        raise ValueError(f"{META}: its SHA-256 is another")
    files = tree["files"]
    present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {META}
    if missing := sorted(files.keys() - present):
        raise ValueError(f"{missing[0]} is gone")
    if foreign := sorted(present - files.keys()):
        raise ValueError(f"{foreign[0]} was not written with it")
    for name, expected in files.items():
        if file_sha256(path / name) != expected:
            raise ValueError(f"{name}: its SHA-256 is another")
    return _Meta(Progress(**progress), files)


def _with_digest(tree: Mapping[str, Any]) -> str:
    """Dump as JSON that holds its own SHA-256."""
    digest = hashlib.sha256(json.dumps(tree, indent=1).encode()).hexdigest()
    return json.dumps({**tree, "sha256": digest}, indent=1, allow_nan=False) + "\n"


def _serialised(tensors: Mapping[str, Tensor]) -> bytes:
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in tensors.items():  # one that a net reads under two names is written under both
        place = value.untyped_storage().data_ptr()
        own[key] = value.detach().clone() if place in storages else value.detach().contiguous()
        storages.add(place)
    return safetensors.torch.save(own)


def _rename_copies(folder: Path) -> None:
    """Rename `last` and `best` where they are folders, as in a copy that was made without links, and link to them."""
    copies = [*(folder / name for name in ("last", "best")), *folder.glob(f"{LINKS}*/*")]
    named: dict[str, str] = {}
    for path in [path for path in copies if path.is_dir() and not path.is_symlink()]:
        if path.parent.is_symlink():
            continue
        try:
            name = f"step-{_checked_meta(path).progress.step:08d}"
        except READ_ERRORS:
            name = "damaged-step-copy"
        rename(path, new := free_path(folder, name))
        if path.parent == folder:
            named[path.name] = new.name
    if (folder / LINKS).is_dir() and not (folder / LINKS).is_symlink():
        remove(folder / LINKS)
    if "last" in named:
        publish(folder, last=named["last"], best=named.get("best"))


def _sweep(folder: Path) -> None:
    """Remove what a killed process left behind: checkpoints half written or half removed."""
    for path in _leftovers(folder):
        remove(path)


def _leftovers(folder: Path) -> Iterator[Path]:
    for path in folder.glob(".*"):
        _, _, rest = path.name.removeprefix(".").partition(".")  # .<process>.<name>
        checkpoint = rest.startswith(("step-", START)) or path.name.startswith(".gone-")
        if path.is_symlink() or (path.is_dir() and checkpoint):
            yield path


def _prune(folder: Path, *, keep: int, keep_best: int, smaller: bool) -> None:
    """Remove all checkpoints but the start, those that `last` and `best` name, the `keep_best` best, and the newest `keep` of the
    others."""
    named = {leads_to(folder / name) for name in ("last", "best")}
    if keep_best > 1:
        scored = [(score, path.name) for path in _steps(folder) if (score := _score(path)) is not None]
        ranked = sorted(scored, key=lambda pair: pair[0] if smaller else -pair[0])  # of equals the newest
        named |= {name for _, name in ranked[:keep_best]}
    for path in [path for path in _steps(folder) if path.name not in named][keep:]:
        gone = folder / f".gone-{path.name}"
        rename(path, gone)  # so that no name is ever half a checkpoint's
        remove(gone)


def _score(path: Path) -> float | None:
    """Validation score of a checkpoint; None where it has none, or is damaged."""
    try:
        score = _checked_meta(path).progress.score
    except READ_ERRORS:
        return None
    return score if score is not None and math.isfinite(score) else None
