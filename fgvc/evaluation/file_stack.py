"""How a deployed file is fed, and what its outputs are: as stated, else as its answers about labelled images show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgvc.config.images import Preprocess
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError, UndecidedError
from fgvc.evaluation.file_preprocessing import UNASSIGNED, FileSearch, other_labels, search_file
from fgvc.evaluation.preprocessing import SECONDS
from fgvc.runtime.labels import Labels


class OtherOrderError(FgvcError):
    """The file's answers show its classes in another order than stated, or leave outputs without one."""

    def __init__(self, message: str, labels: tuple[str, ...]) -> None:
        super().__init__(message)
        self.labels = labels  # a class an output, UNASSIGNED where the images have none


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
    search: FileSearch | None  # None: both are stated
    doubts: tuple[str, ...] = ()  # choices that these images leave open, and that matter little for them


def file_stack(
    file: Path,
    images: Path,
    *,
    index: ImageIndex,
    labels: Labels | None,
    preprocess: Preprocess | None,
    size: tuple[int, int] | None = None,
    output: str | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda line: None,
) -> FileStack:
    """Preprocessing and labels as stated (None: nothing states them), else by the file's answers about the images of `index`,
    which are those of the folder `images`. `size`: height and width, where the file leaves them open; `output`: which of several;
    `seconds`: that asking may take.

    Raises UndecidedStackError where these images do not tell how it is fed, and that matters for them; OtherOrderError where its
    answers deny the stated labels.
    """
    if labels is not None and preprocess is not None:
        shown = other_labels(file, index, stated=labels.names, spec=preprocess)
        if shown is not None:
            raise OtherOrderError(f"the answers of {file} show its classes in another order than {labels.source} says", shown)
        return FileStack(preprocess=preprocess, labels=labels.names, search=None)
    search = search_file(
        file, images, index=index, stated=labels, size=size, output=output, seconds=seconds, progress=progress
    )
    lines = "\n".join(search.lines())
    if preprocess is None and search.search.refused:
        raise UndecidedStackError(f"{lines}\nthese images do not tell how the file is fed", search.spec)
    if not search.order_holds:
        raise OtherOrderError(lines, search.labels)
    if UNASSIGNED in search.labels:
        outputs, classes = len(search.labels), len(index.classes)
        raise OtherOrderError(
            f"{lines}\n{file}: has {outputs} outputs, and the images are of {classes} classes: nothing says what the others are",
            search.labels,
        )
    return FileStack(
        preprocess=preprocess or search.spec, labels=search.labels, search=search,
        doubts=() if preprocess is not None else search.doubts,
    )  # fmt: skip
