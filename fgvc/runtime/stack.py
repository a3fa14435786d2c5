"""Preprocessing and order of labels around a deployed model, and whether two models agree in them.

Equal graphs give equal answers only where both agree. Imports no torch and no onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from fgvc.config.images import Preprocess
from fgvc.errors import FgvcError
from fgvc.images.preprocess import described, differences
from fgvc.io.names import few, label_differences, sort_order_remark
from fgvc.runtime.bundle import load_bundle, read_labels, read_preprocess
from fgvc.runtime.labels import labels_of

if TYPE_CHECKING:
    from fgvc.runtime.engine import OnnxSession

T = TypeVar("T")
Verdict = Literal["the same", "other", "not known"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A model's file with the preprocessing and labels that belong to it, as far as they are known."""

    path: Path  # a run, a bundle or an .onnx file
    preprocess: Preprocess | None  # None: not known
    labels: tuple[str, ...] | None  # None: not known

    @property
    def model(self) -> Path:
        """Path of the bundle's model, or of the file itself."""
        return self.path / "model.onnx" if self.path.is_dir() else self.path

    def session(self, *, threads: int | None = None) -> OnnxSession:
        """Load the model, of several outputs that with the classes. `threads`: as of OnnxSession, which raises FgvcError."""
        from fgvc.runtime.engine import OnnxSession  # onnxruntime, without which a stack can be read

        output = None if self.preprocess is None else self.preprocess.output
        return OnnxSession(self.model, threads=threads, output=output, classes=None if self.labels is None else len(self.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Whether a model has the preprocessing and labels of the deployed one that it is to replace."""

    preprocess: Verdict
    labels: Verdict
    differences: tuple[str, ...]  # in words, ours before theirs
    unproved: str  # one line on what is not known and therefore assumed; empty where all is known
    answers: str = ""  # what the deployed file's answers about images said, where nothing states its stack

    @property
    def numbers(self) -> Mapping[str, str]:
        """Verdicts for contract.json."""
        return {"preprocess": self.preprocess, "labels": self.labels} | ({"answers": self.answers} if self.answers else {})


def stack_of(path: Path, *, labels: Path | None = None, preprocess: Path | None = None) -> Stack:
    """Stack of a bundle's model; or of an .onnx file by its metadata and the files beside it, else by `labels` and `preprocess`.

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
    labels_file, preprocess_file = (beside[key] if beside[key].is_file() else stated[key] for key in ("labels", "preprocess"))
    return Stack(
        path=path,
        preprocess=read_preprocess(preprocess_file) if preprocess_file is not None else None,
        labels=read_labels(labels_file) if labels_file is not None else own.names if (own := labels_of(path)) else None,
    )


def agreement(ours: Stack, theirs: Stack) -> Agreement:
    """Compare the stack of a model with the deployed one's."""
    preprocess = _differences(ours.preprocess, theirs.preprocess, differences)
    labels = _differences(ours.labels, theirs.labels, label_differences)
    return Agreement(
        preprocess=_verdict(preprocess),
        labels=_verdict(labels),
        differences=(*(preprocess or ()), *(labels or ())),
        unproved=_unproved(ours, theirs),
    )


def _differences(mine: T | None, other: T | None, compare: Callable[[T, T], list[str]]) -> list[str] | None:
    """Differences, or None where one of the two is not known."""
    return None if mine is None or other is None else compare(mine, other)


def _verdict(lines: list[str] | None) -> Verdict:
    return "not known" if lines is None else "other" if lines else "the same"


def _unproved(ours: Stack, theirs: Stack) -> str:
    """Line on what is not known, with the assumed values, which can then be compared with the other stack."""
    gaps, options = [], []
    for key, subject in (("preprocess", "its preprocessing"), ("labels", "the order of its labels")):
        sides = {side.path: getattr(side, key) for side in (ours, theirs)}
        incomplete = [str(path) for path, value in sides.items() if value is None]
        if not incomplete:
            continue
        stated = next((value for value in sides.values() if value is not None), None)
        gaps.append(f"{' and '.join(incomplete)}: says nothing of {subject} (assumed: {_assumption(stated)})")
        options += [f"--{key} FILE"] if getattr(theirs, key) is None else []
    if not gaps:
        return ""
    hint = f"; state it with {' and '.join(options)}, or name a bundle" if options else "; name a bundle"
    return f"not proved: {'; '.join(gaps)}{hint}"


def _assumption(value: Preprocess | tuple[str, ...] | None) -> str:
    if value is None:
        return "the same for both"
    if isinstance(value, Preprocess):
        return described(value)
    remark = sort_order_remark(value)
    return few(value) + f"; {remark}" * bool(remark)
