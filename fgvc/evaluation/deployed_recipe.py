"""Settings of a recipe that follow from a deployed file and a set of labelled images: its network, preprocessing and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.config.data import AutoData
from fgvc.config.images import Deploy, Preprocess
from fgvc.data.beside import with_folder
from fgvc.data.deployed import PREPROCESS
from fgvc.data.index import ImageIndex
from fgvc.data.labels import as_in_file
from fgvc.data.sources.read import read_source
from fgvc.data.unseen import OPTIONS, all_seen, seen_words
from fgvc.errors import FgvcError, NoUnseenImagesError, UndecidedError
from fgvc.evaluation.file_preprocessing import FileSearch
from fgvc.evaluation.file_stack import OtherOrderError, file_stack
from fgvc.evaluation.judging import evidence
from fgvc.evaluation.side import Side
from fgvc.io.names import few
from fgvc.runtime.bundle import bundle_with_judge, read_preprocess
from fgvc.runtime.labels import labels_of
from fgvc.runtime.stack import Stack


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedRecipe:
    """Sections of a recipe for a deployed file, and what was found out about the file."""

    tree: dict[str, dict[str, Any]]
    labels: tuple[str, ...] | None  # to be written to a file; None: the deployed file, or one beside it, states them
    search: FileSearch | None  # None: a preprocess.json lies beside the file


def deployed_recipe(
    file: Path,
    images: Path,
    *,
    seen: str | None = None,
    unseen: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> DeployedRecipe:
    """Work out the keys for a file and images. `seen`: train, none, or a list of paths, as of `deploy.seen`; `unseen`: a folder
    beside them that the file was not trained on, as of `deploy.unseen`.

    Raises FgvcError for a file or images that can't be read, or labels in another order; UndecidedError where the images don't
    tell how it is fed; NoUnseenImagesError where the set brings no split along and neither `seen` nor `unseen` is given.
    """
    index = read_source(AutoData(root=images, val_fraction=0.0))
    stated = labels_of(file)
    if seen is None and unseen is None and not index.given_splits and (bundle := bundle_with_judge(file)) is not None:
        seen = str(bundle.absolute())
    beside = file.with_name(PREPROCESS)
    try:
        stack = file_stack(
            file, images, index=index, labels=stated, preprocess=read_preprocess(beside) if beside.is_file() else None,
            insisted=True, progress=progress,
        )  # fmt: skip
    except UndecidedError as error:
        raise UndecidedError(
            f"{error}: give more of them, or put a preprocess.json that says it beside the file (`fgvc preprocess` writes one)"
        ) from error
    except OtherOrderError as error:
        raise FgvcError(
            f"{error}\nput the right order beside the file as labels.txt, a class a line; by its answers: {few(error.labels)} "
            "(`fgvc preprocess` writes the likeliest)"
        ) from error
    spec, search = stack.preprocess, stack.search
    for doubt in stack.doubts if beside.is_file() else ():
        progress(f"WARNING: {beside}: {doubt}")
    if unseen is not None:
        with_folder(as_in_file(index, stated) if stated is not None else index, unseen, where="--unseen")
    elif seen is None and not index.given_splits:
        raise NoUnseenImagesError(all_seen(images, OPTIONS, _evidence(file, spec, stack.labels, search, index)))
    tree: dict[str, dict[str, Any]] = {
        "data": {"kind": "auto", "root": str(images.absolute())},
        "image": {"size": list(spec.size)},
        "model": {"onnx": str(file.absolute()), "weights": "deployed"},
        "deploy": _fed(spec) | {"seen": seen or "train"} | ({} if unseen is None else {"unseen": str(unseen.absolute())}),
    }
    return DeployedRecipe(tree=tree, labels=stack.labels if stated is None else None, search=search)


def _fed(spec: Preprocess) -> dict[str, Any]:
    """Keys of `deploy` from a preprocessing."""
    values = spec.model_dump(mode="json", exclude_none=True)
    return {key: values[key] for key in Deploy.model_fields if key in values}


def _evidence(file: Path, spec: Preprocess, classes: tuple[str, ...], search: FileSearch | None, index: ImageIndex) -> str:
    if search is not None:
        return seen_words(search.search.best.accuracy, search.search.best.loss)
    session = Stack(path=file, preprocess=spec, labels=classes).session()
    return evidence(Side(path=file, kind="onnx", classes=classes, preprocess=spec, session=session), index)
