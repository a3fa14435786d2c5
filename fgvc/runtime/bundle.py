"""Bundles: folders with all that a server needs, and each file's SHA-256 in a manifest. Imports no torch and no onnx."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from fgvc.config.calibration import Calibration
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.errors import FgvcError
from fgvc.io.display import Display, Results
from fgvc.io.files import StrPath, sync
from fgvc.io.names import refuse_breaking
from fgvc.io.places import what_it_is

if TYPE_CHECKING:
    from fgvc.runtime.engine import Answer, Engine
    from fgvc.runtime.explained import ExplainedPicture
    from fgvc.runtime.predict import Pictures

MANIFEST = "manifest.json"
REQUIRED: Mapping[str, str] = {  # name -> what it holds
    "model.onnx": "the deployed network, from images to logits",
    "labels.json": "the names of the classes, in the order of the outputs",
    "preprocess.json": "how a picture becomes the input; evaluation used the same code",
    "contract.json": "the proofs: what was compared, with which result, and the versions that wrote the graph",
    "metrics.json": "scores of the exported weights on validation and test, as far as they were measured",
}
OPTIONAL: Mapping[str, str] = {
    "explain.onnx": "class activation maps from the same weights, where the head allows it; never the deployed file",
    "judge.json": "the images that judge, where fgvc drew them or they are those that a deployed file has not seen: paths below "
    "the set's folder, with their classes",
    "calibration.json": "temperature and threshold, fitted on 50 validation images or more",
    "model.int8.onnx": "the same network in int8, if it was asked for and answers alike",
    "model.fp16.onnx": "the same network in half floats, if it was asked for and answers alike",
}
JUDGE = "judge.json"
DEPLOYED_FILE = "deployed file"  # the contract of a bundle whose model.onnx is a deployed file with other weights
OTHER_CLASSES = "deployed file, other classes"  # the same, with an output of another shape
Variant = Literal["float", "int8", "fp16"]
FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # no separator, no leading dot: neither `..` nor an absolute path
# Of an ONNX tensor whose data lie in another file: the length of that file's name follows, and the name.
EXTERNAL = re.compile(rb"\n\x08location\x12(.)", re.DOTALL)


class Bundle(Display):
    """A bundle on disk, whose files were checked against its manifest. It predicts by onnxruntime alone."""

    folder: Path
    labels: tuple[str, ...]  # the position is the class number
    preprocess: Preprocess
    contract: Mapping[str, Any]
    metrics: Mapping[str, Any]
    files: Mapping[str, str]  # name -> SHA-256
    calibration: Calibration | None  # None: temperature 1, and nothing is rejected
    judge: Mapping[str, Any] | None  # "images": path -> class; "unseen": which they are, in words

    def __init__(self, folder: StrPath) -> None:
        """Read a bundle, every byte of it checked against the manifest.

        Raises FgvcError that names the file: changed, missing, not in the manifest, a link, a name that leads elsewhere.
        """
        self.folder = Path(folder)
        self.files = _checked_files(self.folder)
        file = self.folder / "labels.json"
        labels = class_names(read_json(file, list), str(file), path=file, expected="a list of class names")
        contract = read_json(self.folder / "contract.json", dict)
        if contract.get("num_classes") != len(labels):
            raise FgvcError(f"{file}: {len(labels)} names for {contract.get('num_classes')} classes")
        self.labels, self.contract = labels, contract
        self.preprocess = read_preprocess(self.folder / "preprocess.json")
        self.metrics = read_json(self.folder / "metrics.json", dict)
        self._engines: dict[Variant, Engine] = {}
        self.calibration = _calibration(self.folder) if "calibration.json" in self.files else None
        self.judge = read_judge(self.folder, labels) if JUDGE in self.files else None

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"

    def variant(self, name: Variant) -> Path:
        """Path of one variant's file. Raises FgvcError where the bundle does not have it."""
        file = "model.onnx" if name == "float" else f"model.{name}.onnx"
        if file not in self.files:
            raise FgvcError(f"{self.folder}: has no {file}; export the run with --{name}")
        return self.folder / file

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the files in which the models keep weights."""
        return tuple(name for name in self.files if name not in {*REQUIRED, *OPTIONAL})

    @property
    def explain_model(self) -> Path | None:
        """Path of the network with class activation maps; None: it has none."""
        return self.folder / "explain.onnx" if "explain.onnx" in self.files else None

    def predict(self, images: Pictures, *, top_k: int = 5, variant: Variant = "float") -> Results[Answer]:
        """Classify pictures: files, folders of them, PIL's or numpy's, one or several; see `fgvc.runtime.predict.predict`. The
        network is kept for the next call."""
        from fgvc.runtime.engine import Engine  # onnxruntime, without which a bundle can be read
        from fgvc.runtime.predict import predict

        if variant not in self._engines:
            self._engines[variant] = Engine(self, variant=variant)
        return predict(self._engines[variant], images, top_k=top_k)

    def explain(self, images: Pictures, *, target: str | None = None) -> Results[ExplainedPicture]:
        """Compute class activation maps of pictures by the bundle's `explain.onnx`: those of the class `target`, by default of
        the predicted one. Raises FgvcError where the bundle has none."""
        from fgvc.runtime.explain import load_explainer
        from fgvc.runtime.explained import explain_pictures

        return explain_pictures(load_explainer(self), images, target=target)

    @property
    def facts(self) -> Mapping[str, object]:
        calibrated = self.calibration is not None and self.calibration.calibrated
        scores = {f"top-1 on {split}": f"{100 * row['top1']:.2f} %" for split, row in self.metrics.items() if "top1" in row}
        of = {"classes": len(self.labels), "input": " x ".join(map(str, self.preprocess.size))}
        return {"": self.folder, **of, **scores, "probabilities": "calibrated" if calibrated else "not calibrated"}

    def __fspath__(self) -> str:
        return str(self.folder)


def write_bundle(
    folder: Path,
    *,
    files: Mapping[str, bytes | BaseModel | Mapping[str, Any] | list[Any]],
    data: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write all files and their manifest, or nothing: the folder appears by one rename, when all is on the disk.

    What is not bytes is written as JSON. `data`: files with weights of the model, by the names that it has for them. Raises
    FgvcError where `folder` holds something else than a bundle, or a bundle and `overwrite` is not given.
    """
    contents = {name: _encode(name, value) for name, value in files.items()}
    if wrong := [name for name in contents if name not in {*REQUIRED, *OPTIONAL}]:
        raise FgvcError(f"a bundle has no file {wrong[0]!r}; it holds {', '.join([*REQUIRED, *OPTIONAL])}")
    for name, content in (data or {}).items():
        if not NAME.fullmatch(name) or name.casefold() in {other.casefold() for other in (MANIFEST, *REQUIRED, *OPTIONAL)}:
            raise FgvcError(f"the model keeps weights in a file {name!r}, a name that a bundle can't have for that: rename it")
        contents[name] = content
    if missing := [name for name in REQUIRED if name not in contents]:
        raise FgvcError(f"a bundle needs {missing[0]}")
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents[MANIFEST] = _manifest(hashes)
    folder = Path(os.path.abspath(folder))
    refuse_target(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise FgvcError(f"{folder}: can't write the bundle: {error.strerror}") from error
    try:
        for name, content in contents.items():
            with open(new / name, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        new.chmod(0o777 & ~_umask())  # mkdtemp's folder is its owner's alone; a server is often someone else
        sync(new)
        _swap_in(new, folder)
    except OSError as error:
        raise FgvcError(f"{folder}: can't write the bundle: {error.strerror}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def refuse_target(folder: Path, *, overwrite: bool) -> None:
    """Raise FgvcError where a bundle may not be written; call it before the long work of an export."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise FgvcError(f"{folder}: is not a folder; name another place for the bundle")
    entries = {entry.name for entry in folder.iterdir()}
    if not entries:
        return
    if MANIFEST not in entries or not entries <= {MANIFEST, *REQUIRED, *OPTIONAL, *_listed(folder)}:
        raise FgvcError(f"{folder}: holds something else than a bundle; name another place")
    if not overwrite:
        raise FgvcError(f"{folder}: holds a bundle already; name another place, or give --overwrite")


def _listed(folder: Path) -> set[str]:
    """The names in a bundle's manifest; none where it can't be read."""
    try:
        return set(_read_manifest(folder))
    except FgvcError:
        return set()


def load_bundle(folder: StrPath) -> Bundle:
    """Open a bundle: see `Bundle`."""
    return Bundle(folder)


def _checked_files(folder: Path) -> Mapping[str, str]:
    """Read the manifest, SHA-256 by name, and every file in it. Raises FgvcError for one that is not what it says."""
    if not folder.is_dir():
        raise FgvcError(f"{folder}: no such bundle (a folder with a {MANIFEST}){what_it_is(folder)}")
    if not (folder / MANIFEST).is_file() and (described := what_it_is(folder)):
        raise FgvcError(f"{folder}: not a bundle{described}")
    hashes = _read_manifest(folder)
    present = {entry.name: entry for entry in os.scandir(folder)}
    for name, entry in present.items():
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise FgvcError(f"{folder / name}: not a plain file; a bundle holds no links and no folders")
        if name not in hashes and name != MANIFEST:
            raise FgvcError(f"{folder / name}: not in the manifest; export the bundle again")
    for name, expected in hashes.items():
        if name not in present:
            raise FgvcError(f"{folder / name}: missing; export the bundle again")
        content = _read(folder / name)
        if hashlib.sha256(content).hexdigest() != expected:
            raise FgvcError(f"{folder / name}: is not the file that was exported (its SHA-256 is another)")
        outside = _external_names(content) if name.endswith(".onnx") else set()
        if wrong := sorted(outside - set(hashes)) or sorted(outside.intersection((*REQUIRED, *OPTIONAL))):
            raise FgvcError(f"{folder / name}: keeps weights in another file, {wrong[0]!r}, which is none of this bundle's")
    return hashes


def _external_names(content: bytes) -> set[str]:
    """The names of the files in which an ONNX model keeps weights; of 127 bytes at most, as longer ones are none of a bundle."""
    return {content[at.end() : at.end() + at[1][0]].decode(errors="replace") for at in EXTERNAL.finditer(content)}


def _calibration(folder: Path) -> Calibration:
    tree = read_json(folder / "calibration.json", dict)
    return validate(Calibration, tree, where=str(folder / "calibration.json"))


def bundle_with_judge(file: Path) -> Path | None:
    """The folder of a file where it is that of a bundle that lists the images that judge it."""
    return file.parent if file.with_name(JUDGE).is_file() else None


def read_judge(folder: Path, labels: Sequence[str] | None = None) -> dict[str, Any]:
    """The images that judge a bundle. Raises FgvcError where they are not those of a bundle, of classes of `labels`."""
    tree = read_json(folder / JUDGE, dict)
    images = tree.get("images")
    are_classes = isinstance(images, dict) and (labels is None or set(images.values()) <= set(labels))
    if not isinstance(tree.get("unseen"), str) or not are_classes:
        raise FgvcError(f"{folder / JUDGE}: expected paths of images with classes of this bundle; export the bundle again")
    return tree


def _read_manifest(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if path.is_symlink():
        raise FgvcError(f"{path}: not a plain file; a bundle holds no links and no folders")
    tree = read_json(folder / MANIFEST, dict)
    hashes = tree.get("files")
    if tree.get("format") != FORMAT or not isinstance(hashes, dict):
        raise FgvcError(f"{path}: not the manifest of a bundle that this version of fgvc reads (format {FORMAT})")
    for name, digest in hashes.items():
        if not NAME.fullmatch(name) or name == MANIFEST:
            raise FgvcError(f"{path}: {name!r} is not the name of a file in a bundle")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise FgvcError(f"{path}: no SHA-256 for {name}")
    if len({name.casefold() for name in hashes}) < len(hashes):
        raise FgvcError(f"{path}: two names differ in case only")
    if missing := [name for name in REQUIRED if name not in hashes]:
        raise FgvcError(f"{path}: does not list {missing[0]}")
    if _read(path) != _manifest(hashes):
        raise FgvcError(f"{path}: is not as fgvc wrote it; export the bundle again")
    return hashes


def _manifest(hashes: Mapping[str, str]) -> bytes:
    return _encode(MANIFEST, {"format": FORMAT, "files": dict(sorted(hashes.items()))})


def _encode(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    tree = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    try:
        return (json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise FgvcError(f"{name}: can't be written as JSON: {error}") from error


def read_preprocess(path: Path) -> Preprocess:
    """Read a whole preprocess.json. Raises FgvcError where a key is missing, too: a default would be a guess at the stack's
    preprocessing."""
    tree = read_json(path, dict)
    missing = [key for key in Preprocess.model_fields if key not in tree and key not in Preprocess.later]
    if missing and set(tree) <= set(Preprocess.model_fields):  # else a key may be misspelt
        raise FgvcError(
            f"{path}: says nothing of {', '.join(missing)}; a preprocessing is stated as a whole, with all the keys of a "
            "bundle's preprocess.json"
        )
    return validate(Preprocess, tree, where=str(path))


def read_labels(path: Path) -> tuple[str, ...]:
    """Read class names in the order of the outputs: a JSON list, or a text file with one a line, its number before it or not.
    Raises FgvcError where it can't be read, or has no such names (`class_names`)."""
    if path.suffix == ".json":
        names = read_json(path, list)
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise FgvcError(f"{path}: can't read the labels: {error}") from error
        names = _without_numbers([line.strip() for line in text.splitlines() if line.strip()])
    return class_names(names, str(path), path=path)


def class_names(
    names: Sequence[Any], source: str, *, path: Path, expected: str = "the names of the classes"
) -> tuple[str, ...]:
    """Check names of classes, and return them as a tuple.

    `source` (what has the names) and `expected` are for messages. Raises FgvcError where there are no names, one is no text, is
    given twice, or would break a line of a table.
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise FgvcError(f"{source}: expected {expected}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FgvcError(f"{source}: expected the names of the classes, each once; given twice: {', '.join(twice[:5])}")
    refuse_breaking(names, where=path)
    return tuple(names)


def _without_numbers(lines: list[str]) -> list[str]:
    """Names of lines that are numbered from 0 or 1 on, as in CUB's classes.txt; else the lines."""
    words = [line.split(maxsplit=1) for line in lines]
    for first in (0, 1):
        if len(words) > 1 and all(len(pair) == 2 and pair[0] == str(at) for at, pair in enumerate(words, first)):
            return [name for _, name in words]
    return lines


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file that holds a `kind`: list or dict. Raises FgvcError where it holds something else, or can't be read."""
    try:
        tree = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise FgvcError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, kind):
        raise FgvcError(f"{path}: expected a JSON {'object' if kind is dict else 'list'}")
    return tree


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FgvcError(
            f"{path}: missing" + (f"; is {path.parent} a bundle?" if path.name == MANIFEST else "")
        ) from error
    except OSError as error:
        raise FgvcError(f"{path}: can't be read: {error.strerror}") from error


def _swap_in(new: Path, folder: Path) -> None:
    """Put `new` in the place of `folder`; an old bundle is moved aside first and comes back if that fails."""
    if folder.exists() and any(folder.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(new, folder)
    sync(folder.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
