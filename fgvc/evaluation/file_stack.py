"""How a deployed file is fed, and what its outputs are: as stated, else as its answers about labelled images show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError, UndecidedError
from fgvc.evaluation.assignment import Order
from fgvc.evaluation.file_preprocessing import (
    UNASSIGNED,
    FileSearch,
    ask_stated,
    search_file,
    shown_labels,
)
from fgvc.evaluation.preprocessing import SECONDS
from fgvc.runtime.labels import Labels

DENIED_SHARE = 0.3  # of the seconds, for what might deny a stated preprocessing


class OtherOrderError(FgvcError):
    """The file's answers show its classes in another order than stated, or leave outputs without one."""

    def __init__(self, message: str, labels: tuple[str, ...]) -> None:
        super().__init__(message)
        self.labels = labels  # a class an output, UNASSIGNED where the images have none


class DeniedStackError(FgvcError):
    """The file's answers deny the stated preprocessing; `spec` is a likelier one."""

    def __init__(self, message: str, spec: Preprocess) -> None:
        super().__init__(message)
        self.spec = spec


class UndecidedStackError(UndecidedError):
    """The images do not tell how the file is fed; `spec` is the likeliest."""

    def __init__(self, message: str, spec: Preprocess) -> None:
        super().__init__(message)
        self.spec = spec


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStack:
    """Preprocessing and labels of a deployed file."""

    preprocess: Preprocess
    labels: tuple[str, ...]  # a class an output
    search: FileSearch | None  # None: there was no need
    doubts: tuple[str, ...] = ()  # what these images leave open and matters little for them, or deny of what was insisted on


def file_stack(
    file: Path,
    images: Path,
    *,
    index: ImageIndex,
    labels: Labels | None,
    preprocess: Preprocess | None,
    size: tuple[int, int] | None = None,
    output: str | None = None,
    insisted: bool = False,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> FileStack:
    """Preprocessing and labels as stated (None: nothing states them), else by the file's answers about the images of `index`,
    which are those of the folder `images`. `size`: height and width, where the file leaves them open; `output`: which of several;
    `insisted`: believe the stated preprocessing, whatever the answers; `seconds`: that asking may take.

    Raises UndecidedStackError where these images do not tell how it is fed, and that matters for them; OtherOrderError and
    DeniedStackError where its answers deny the stated labels, or the stated preprocessing.
    """
    doubts: tuple[str, ...] = ()
    if preprocess is not None:
        names = () if labels is None else labels.names
        asked = ask_stated(file, index, spec=preprocess, labels=names, seconds=DENIED_SHARE * seconds)
        if asked.likelier is not None and not insisted:
            raise DeniedStackError(f"{file}: {asked.words}", asked.likelier)
        doubts, order = (asked.words,) * bool(asked.words), asked.order
        if order is not None and order.other and (order.decided or labels is None):
            source = f"that of the classes of {images}" if labels is None else f"{labels.source} says"
            raise OtherOrderError(f"the answers of {file} show its classes in another order than {source}", shown_labels(order))
        if labels is not None:
            return FileStack(preprocess=preprocess, labels=labels.names, search=None, doubts=doubts)
        if order is not None:
            return FileStack(preprocess=preprocess, labels=_complete(order, file, index), search=None, doubts=doubts)
    search = search_file(
        file, images, index=index, stated=labels, size=size, output=output, seconds=seconds, progress=progress
    )
    lines = "\n".join(search.lines())
    if preprocess is None and search.search.refused:
        raise UndecidedStackError(f"{lines}\nthese images do not tell how the file is fed", search.spec)
    if not search.order_holds:
        raise OtherOrderError(lines, search.labels)
    complete = _complete(search.search.order, file, index, prefix=f"{lines}\n")
    return FileStack(
        preprocess=preprocess or search.spec, labels=complete, search=search,
        doubts=doubts if preprocess is not None else search.doubts,
    )  # fmt: skip


def _complete(order: Order, file: Path, index: ImageIndex, *, prefix: str = "") -> tuple[str, ...]:
    """A class an output. Raises OtherOrderError, its words after `prefix`, where an output is of none."""
    labels = order.stated or shown_labels(order)
    if UNASSIGNED in labels:
        outputs, classes = len(labels), len(index.classes)
        raise OtherOrderError(
            f"{prefix}{file}: has {outputs} outputs, and the images are of {classes} classes: nothing says what the others are",
            labels,
        )
    return labels
