"""Recognition of what lies at a path, for messages where a verb was given something else."""

from __future__ import annotations

import mimetypes
import os
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fgvc.io.names import some

TABLES = (".csv", ".tsv", ".parquet")  # of images and their labels
LISTED = 1000  # entries of a folder that are looked at


def is_run_folder(names: set[str]) -> bool:
    """Whether a folder with these file names is a run of fgvc, of this version or an earlier one."""
    return "config.yaml" in names and not names.isdisjoint({".lock", "ckpt"})


def is_data(path: Path) -> bool:
    """Whether a path holds images to learn from: a folder that is neither a run nor a bundle, or a table."""
    if path.is_dir():
        return not _is_run(path) and not _is_bundle(path)
    return path.is_file() and path.suffix.lower() in TABLES


def what_it_is(path: Path) -> str:
    """Say what lies at a path, and which verbs take it: the end of a sentence, which begins with `; `. Empty where fgvc does not
    know it."""
    described = _described(path)
    return f"; {described}" if described else ""


def _described(path: Path) -> str:
    name = shlex.quote(str(path))
    if path.is_dir():
        if _is_run(path):
            ways = f"`fgvc eval {name}` scores it, `fgvc export {name} -o BUNDLE` ships it"
            return f"it is a run of fgvc: {ways}; the command that began it goes on with it"
        if _is_bundle(path):
            ways = f"`fgvc predict {name} IMAGES` asks it, `fgvc verify {name}` proves it"
            return f"it is a bundle: {ways}, {name}/model.onnx is its network"
        if classes := _class_folders(path):
            ways = f"`fgvc train {name}` learns from it, `fgvc data check {name}` looks at it"
            return f"it is a folder of classes ({some(classes, 3)}): {ways}"
        return "it is a folder of images" if any(_images(path)) else ""
    suffix = path.suffix.lower()
    if not path.is_file():
        return ""
    if suffix in (".yaml", ".yml"):
        return f"it is a recipe, most likely: `fgvc train {name}`"
    if suffix == ".onnx":
        return f"it is a network's file: `fgvc inspect {name}`, `fgvc init --deployed {name} --data IMAGES my.yaml`"
    if suffix in (".safetensors", ".pth", ".pt"):
        return f"it is a file of weights: `fgvc train IMAGES model.weights={name}` begins with them"
    if suffix in TABLES:
        return f"it is a table: `fgvc train {name}`, where it is one of images and labels"
    return "it is a picture" if _is_image(path.name) else ""


def _is_run(folder: Path) -> bool:
    return is_run_folder(set(entries(folder)))


def _is_bundle(folder: Path) -> bool:
    return {"manifest.json", "model.onnx"} <= set(entries(folder))


def _class_folders(folder: Path) -> list[str]:
    """Names of folders with images, below the folder or below its splits' folders."""
    classes = []
    for name in entries(folder):
        below = folder / name
        if below.is_dir() and not name.startswith("."):
            inner = [other for other in entries(below) if (below / other).is_dir() and any(_images(below / other))]
            classes += inner if inner else [name] if any(_images(below)) else []
    return sorted(set(classes))


def _images(folder: Path) -> Iterator[str]:
    return (name for name in entries(folder) if _is_image(name))


def _is_image(name: str) -> bool:
    return (mimetypes.guess_type(name)[0] or "").startswith("image/")


def entries(folder: Path) -> list[str]:
    """Names of a folder's entries, LISTED at most; none where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in islice(entries, LISTED)]
    except OSError:
        return []
