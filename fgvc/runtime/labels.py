"""Names of the classes of a deployed .onnx file: from its own metadata, or from files beside it. Imports no torch and no onnx."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgvc.errors import FgvcError
from fgvc.io.places import what_it_is
from fgvc.io.protobuf import fields
from fgvc.runtime.bundle import class_names, read_json, read_labels

KEYS = ("names", "classes", "labels", "class_names", "id2label")  # of metadata_props: Ultralytics, torchvision, Hugging Face
BESIDE = ("labels.json", "labels.txt", "classes.txt")
CONFIG = "config.json"  # Hugging Face's, with id2label
METADATA, KEY, VALUE = 14, 1, 2  # numbers of fields of ModelProto and StringStringEntryProto


@dataclass(frozen=True, slots=True)
class Labels:
    """Names of classes in the order of the outputs."""

    names: tuple[str, ...]
    source: str  # a file, or a file and the key of its metadata


def labels_of(path: Path) -> Labels | None:
    """Read the labels of an .onnx file: from its metadata_props (KEYS), else from a file beside it (BESIDE, CONFIG); None: there
    are none.

    Raises FgvcError where these are no names of classes, or one is given twice."""
    metadata = read_metadata(path)
    for key in KEYS:
        names = _parsed(metadata.get(key, ""))
        if len(names) > 1:  # else it is something else: how many there are, or a remark
            source = f"{path}, its metadata {key!r}"
            return Labels(_checked(names, source, path), source)
    for name in BESIDE:
        if (file := path.with_name(name)).is_file():
            return Labels(read_labels(file), str(file))
    if (file := path.with_name(CONFIG)).is_file():
        config = read_json(file, dict)
        if "id2label" in config:
            return Labels(_checked(config["id2label"], f"{file}, id2label", file), str(file))
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """metadata_props of an .onnx file. Raises FgvcError where that can't be read."""
    try:
        data = path.read_bytes()
        entries = [(start, end) for number, _, start, end in fields(data) if number == METADATA]
        texts = [{number: data[a:b].decode() for number, _, a, b in fields(data, *entry)} for entry in entries]
    except FileNotFoundError as error:
        raise FgvcError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise FgvcError(f"{path}: not an ONNX file, or cut short ({error}){what_it_is(path)}") from error
    return {text.get(KEY, ""): text.get(VALUE, "") for text in texts}


def _parsed(text: str) -> list[Any] | tuple[Any, ...] | dict[Any, Any]:
    """A value of the metadata: JSON, a literal of Python (as Ultralytics writes it), or names between line ends or commas."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list | tuple | dict):
            return value
    return [name.strip() for name in (text.splitlines() if "\n" in text.strip() else text.split(",")) if name.strip()]


def _checked(value: Any, source: str, path: Path) -> tuple[str, ...]:
    """Check names in a list, or in a mapping from the numbers 0 ... K-1."""
    names: Sequence[Any] = value if isinstance(value, list | tuple) else ()
    if isinstance(value, dict):
        try:
            numbered = {int(number): name for number, name in value.items()}
        except (TypeError, ValueError):
            numbered = {}
        if sorted(numbered) == list(range(len(value))):
            names = [numbered[number] for number in range(len(value))]
    return class_names(names, source, path=path, expected="the names of the classes, as a list or by their numbers from 0 on")
