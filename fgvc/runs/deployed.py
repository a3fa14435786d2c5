"""The deployed file of a run of `model.onnx`: its own copy, with data and labels, in `deployed/`; the original may go.

`deployed.json` has the SHA-256 of each of its files. `config.yaml` names the copy, relative to the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgvc.config.recipe import Recipe
from fgvc.data.deployed import with_recorded_defaults
from fgvc.errors import FgvcError
from fgvc.io.files import as_json, file_sha256, make_folder, remove, rename, write_atomic
from fgvc.models.onnxnet.payload import external_files
from fgvc.models.onnxnet.read import load_model

FOLDER, LABELS, RECORD = "deployed", "labels.json", "deployed.json"


def record_of(onnx: Path) -> dict[str, Any]:
    """Name of a deployed file, and SHA-256 of it and of the files with its data. Raises FgvcError where one is missing."""
    onnx = onnx.expanduser()
    names = [onnx.name, *external_files(load_model(onnx))]
    return {"file": onnx.name, "sha256": {name: _digest(onnx.with_name(name)) for name in names}}


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise FgvcError(f"{path}: can't be read, and has weights of the deployed file: {error.strerror}") from error


def refuse_inside(out: Path, recipe: Recipe) -> None:
    """Raise FgvcError where the file is the copy of a run that another is to replace."""
    if recipe.model.onnx is not None and out.resolve() in recipe.model.onnx.expanduser().resolve().parents:
        raise FgvcError(f"model.onnx: {recipe.model.onnx} lies in {out}, which would be lost: choose another --out")


def keep_file(out: Path, onnx: Path, labels: Sequence[str]) -> None:
    """Copy a deployed file into the run, with its data and the names of its classes; in full or not at all."""
    onnx, folder, scratch = onnx.expanduser(), out / FOLDER, out / f".new-{FOLDER}"
    remove(scratch)
    make_folder(scratch)
    for name in record_of(onnx)["sha256"]:
        write_atomic(scratch / name, onnx.with_name(name).read_bytes())
    write_atomic(scratch / LABELS, as_json(list(labels)))
    remove(folder)
    rename(scratch, folder)


def as_kept(recipe: Recipe) -> Recipe:
    """The recipe as `config.yaml` has it: with the run's own copy."""
    onnx = recipe.model.onnx
    return recipe if onnx is None else _with_file(recipe, Path(FOLDER, onnx.name), Path(FOLDER, LABELS))


def from_kept(recipe: Recipe, out: Path) -> Recipe:
    """The recipe in a run's `config.yaml` with the places of its copy as they are now."""
    onnx, labels = recipe.model.onnx, recipe.deploy.labels
    return recipe if onnx is None else _with_file(recipe, out / onnx, None if labels is None else out / labels)


def _with_file(recipe: Recipe, onnx: Path, labels: Path | None) -> Recipe:
    model = recipe.model.model_copy(update={"onnx": onnx})
    return recipe.model_copy(update={"model": model, "deploy": recipe.deploy.model_copy(update={"labels": labels})})


def with_recorded_file(recipe: Recipe, recorded: Recipe) -> Recipe:
    """The recipe of a run that goes on, with the copy in the run in place of the file that it was begun from, and what it leaves
    open as it was then. Raises FgvcError where it names another file, by its content, or if it is gone by its name."""
    given, kept = recipe.model.onnx, recorded.model.onnx
    if given is None or kept is None:
        return recipe
    if given.expanduser().is_file():
        if given != kept and record_of(given) != record_of(kept):
            raise FgvcError(
                f"model.onnx: {given} is not the file that this run began with, whose copy is {kept}; go on with that one, or "
                "choose another --out for a new run"
            )
    elif given.name != kept.name:
        raise FgvcError(f"model.onnx: {given}: no such file; the run began with {kept.name}")
    labels = recipe.deploy.labels
    stated = labels is not None and labels.expanduser().is_file()
    return _with_file(with_recorded_defaults(recipe, recorded), kept, labels if stated else recorded.deploy.labels)


def refuse_damaged(out: Path, onnx: Path | None, record: Any) -> None:
    """Raise FgvcError where the run's copy of its deployed file is not what it was."""
    if onnx is not None and record_of(onnx) != record:
        raise FgvcError(f"{onnx}: is not the deployed file that {out} began with (its SHA-256 is another); put that there again")
