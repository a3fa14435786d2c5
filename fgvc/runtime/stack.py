"""Preprocessing and order of labels around a deployed model, and whether two models agree in them.

Equal graphs give equal answers only where both agree. Imports no torch and no onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.images.preprocess import described, differences
from fgvc.io.names import few, relabelled, sort_order_remark
from fgvc.runtime.bundle import load_bundle, read_labels, read_preprocess

T = TypeVar("T")
Verdict = Literal["the same", "other", "not known"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """What is known around one model."""

    path: Path  # a run, a bundle or an .onnx file
    preprocess: Preprocess | None  # None: nobody says
    labels: tuple[str, ...] | None  # None: nobody says

    @property
    def model(self) -> Path:
        """The file of a bundle, or the file itself."""
        return self.path / "model.onnx" if self.path.is_dir() else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Whether a model that takes another's place is fed as that one, and its outputs mean the same."""

    preprocess: Verdict
    labels: Verdict
    differences: tuple[str, ...]  # in words, ours before theirs
    unproved: str  # on one line, what is not known and what is assumed of it; empty where all is known

    @property
    def numbers(self) -> Mapping[str, str]:
        """For contract.json."""
        return {"preprocess": self.preprocess, "labels": self.labels}


def stack_of(path: Path, *, labels: Path | None = None, preprocess: Path | None = None) -> Stack:
    """Around a bundle's model; or around an .onnx file by what lies beside it, else by what `labels` and `preprocess` state.

    Raises FgvcError for a bundle or a file that can't be read, a preprocessing that is stated in part, and an option for what
    is known already.
    """
    if not path.exists():
        raise FgvcError(f"{path}: no such bundle or .onnx file")
    stated = {"labels": labels, "preprocess": preprocess}
    beside = {key: path / f"{key}.json" if path.is_dir() else path.parent / f"{key}.json" for key in stated}
    for key, file in stated.items():
        if file is not None and beside[key].is_file():
            raise FgvcError(f"--{key} {file}: {path} has its own, {beside[key]}; leave the option out")
    if path.is_dir():
        bundle = load_bundle(path)
        return Stack(path=path, preprocess=bundle.preprocess, labels=bundle.labels)
    names, seen = (beside[key] if beside[key].is_file() else stated[key] for key in ("labels", "preprocess"))
    return Stack(
        path=path,
        preprocess=read_preprocess(seen) if seen is not None else None,
        labels=read_labels(names) if names is not None else None,
    )


def agreement(ours: Stack, theirs: Stack) -> Agreement:
    """Of the model that is to take a place, and the deployed one."""
    fed = _apart(ours.preprocess, theirs.preprocess, differences)
    read = _apart(ours.labels, theirs.labels, relabelled)
    return Agreement(
        preprocess=_verdict(fed),
        labels=_verdict(read),
        differences=(*(fed or ()), *(read or ())),
        unproved=_unproved(ours, theirs),
    )


def _apart(mine: T | None, other: T | None, apart: Callable[[T, T], list[str]]) -> list[str] | None:
    """None: not known."""
    return None if mine is None or other is None else apart(mine, other)


def _verdict(lines: list[str] | None) -> Verdict:
    return "not known" if lines is None else "other" if lines else "the same"


def _unproved(ours: Stack, theirs: Stack) -> str:
    """Names of classes are shown: whoever knows the other stack sees whether its order is this one."""
    told, options = [], []
    for key, what in (("preprocess", "its preprocessing"), ("labels", "the order of its labels")):
        sides = {side.path: getattr(side, key) for side in (ours, theirs)}
        silent = [str(path) for path, value in sides.items() if value is None]
        if not silent:
            continue
        known = next((value for value in sides.values() if value is not None), None)
        told.append(f"{' and '.join(silent)}: says nothing of {what} (assumed: {_said(known)})")
        options += [f"--{key} FILE"] if getattr(theirs, key) is None else []
    if not told:
        return ""
    hint = f"; state it with {' and '.join(options)}, or name a bundle" if options else "; name a bundle"
    return f"not proved: {'; '.join(told)}{hint}"


def _said(known: Preprocess | tuple[str, ...] | None) -> str:
    if known is None:
        return "the same for both"
    if isinstance(known, Preprocess):
        return described(known)
    remark = sort_order_remark(known)
    return few(known) + f"; {remark}" * bool(remark)
