"""Identity of a study's runs: digests of all that decides a result, wherever data, weights and teachers lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fgvc.config.recipe import Recipe
from fgvc.config.teachers import AnyTeacher, BundleTeacher, ProbeTeacher, RunTeacher, TimmTeacher
from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError
from fgvc.io.files import file_sha256
from fgvc.runs.checkpoint import read_progress, slot
from fgvc.runs.deployed import as_kept, record_of
from fgvc.runs.folder import read_run
from fgvc.runs.images import first_index
from fgvc.runtime.bundle import load_bundle
from fgvc.runtime.labels import BESIDE

ScoredSplit = Literal["val", "test"]


def result_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that may change a result."""
    unimportant: dict[str, Any] = {
        "log": True,
        "data": {"root", "max_unreadable"},  # which images there are is compared by `data_digest`
        "deploy": {"unseen"},
        "cache_dir": True,
        "checkpoint": True,
        "train": {"workers", "device"},
        "techniques": {"distill": {"cache"}},
    }
    if recipe.select != "best":  # which may choose among the epochs that validate
        unimportant["train"].add("validate_every")
    return as_kept(recipe).model_dump(mode="json", exclude=unimportant)


def digest(recipe: Recipe) -> str:
    """Digest of `result_settings`, with the contents of data, weights and teachers in the place of their paths.

    Raises FgvcError where one can't be read, or a teacher's training is not finished.
    """
    tree = result_settings(recipe)
    tree["data"] = data_digest(recipe)
    tree["deploy"]["labels"] = None  # the order of the classes is in the data
    tree["model"]["weights"] = _weights(recipe.model.weights)
    if recipe.train.patience is None:  # as digests were before there was patience
        del tree["train"]["patience"]
    if recipe.model.onnx is None:  # as digests were before there were files
        del tree["model"]["onnx"], tree["model"]["output"], tree["model"]["classes"]
    else:
        tree["model"]["onnx"] = record_of(recipe.model.onnx)
    for kind, config in recipe.techniques:
        if teachers := getattr(config, "teachers", ()):
            tree["techniques"][kind]["teachers"] = [_teacher(teacher) for teacher in teachers]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


_data: dict[Any, tuple[str, ScoredSplit | None]] = {}  # data stay as they are while a study goes on


def data_digest(recipe: Recipe) -> str:
    """Digest of the images of a recipe, as they are listed now."""
    return _listed(recipe)[0]


def scored_split(recipe: Recipe) -> ScoredSplit | None:
    """The split by which the runs of a study are scored: validation; or, where a deployed file has seen too much for any to
    choose, that which judges. None: there is neither."""
    return _listed(recipe)[1]


def _listed(recipe: Recipe) -> tuple[str, ScoredSplit | None]:
    data = recipe.data, recipe.deploy, recipe.model.onnx, recipe.model.weights
    if data not in _data:
        index = first_index(recipe)
        judged: ScoredSplit | None = "test" if index.unseen else None
        _data[data] = index_digest(index), "val" if len(index.rows("val")) else judged
    return _data[data]


def index_digest(index: ImageIndex) -> str:
    """Digest of names, classes, splits and boxes; not of the pixels."""
    sha256 = hashlib.sha256("\n".join([*index.classes, "", *index.paths.tolist()]).encode())
    for column in (index.labels, index.splits, index.boxes):
        sha256.update(b"" if column is None else column.tobytes())
    return sha256.hexdigest()


def _weights(weights: str) -> str:
    """Digest of a weights file and of the JSON file beside it, or the word that stands for timm's weights."""
    path = Path(weights).expanduser()
    return _files_digest([path, path.with_name(path.name + ".json")]) if path.is_file() else weights


def _teacher(settings: AnyTeacher) -> dict[str, Any]:
    facts = settings.model_dump(mode="json", exclude={"path", "weights", "onnx"})
    match settings:
        case RunTeacher(path=run):
            recipe = read_run(run)
            if not read_progress(run / "ckpt").finished:
                raise FgvcError(f"{run}: this teacher's training is not finished; let it end first")
            place = run / "ckpt" / slot(settings.select or recipe.selected)
            facts["net"] = [recipe.model.name, recipe.model.kwargs]
            facts["files"] = _files_digest([run / "labels.json", run / "preprocess.json", *place.glob("*.safetensors")])
        case BundleTeacher(path=file) if file.is_file():
            facts["file"] = record_of(file)["sha256"]
            facts["files"] = _files_digest([file.with_name(name) for name in (*BESIDE, "preprocess.json")])
        case BundleTeacher(path=folder):
            files = load_bundle(folder).files  # without how it was proved, which may be fresh or by a kept graph
            facts["files"] = {name: digest for name, digest in files.items() if name != "contract.json"}
        case ProbeTeacher(onnx=Path() as file):
            facts["file"] = record_of(file)["sha256"]
            facts["files"] = _files_digest([file.with_name("preprocess.json")])
        case TimmTeacher(weights=str(weights)) | ProbeTeacher(weights=str(weights)):
            facts["weights"] = _weights(weights)
    return facts


def _files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of those files that exist."""
    files = sorted(path for path in paths if path.is_file())
    return hashlib.sha256("".join(_file_digest(path, path.stat().st_mtime_ns) for path in files).encode()).hexdigest()


@cache
def _file_digest(path: Path, changed: int) -> str:
    return file_sha256(path)
