"""Registry of the served models. Each is exchanged by one assignment: a request keeps the model that it began with."""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fgvc.errors import FgvcError
from fgvc.images.preprocess import differences
from fgvc.io.names import label_differences
from fgvc.runtime.bundle import MANIFEST, load_bundle
from fgvc.runtime.engine import Engine
from fgvc.runtime.explain import BundleExplainer
from fgvc.serving.limits import Refusal

VERSION = "1"
_NAME = re.compile(r"[^\s/=?#%\\\x00-\x1f][^/=?#%\\\x00-\x1f]*")
_ATTEMPTS, _PAUSE = 5, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A served model, loaded and warmed."""

    name: str
    engine: Engine
    explainer: BundleExplainer | None  # None: the bundle has no explain.onnx
    digest: str  # SHA-256 of the manifest, which has those of all files

    @property
    def labels(self) -> tuple[str, ...]:
        return self.engine.bundle.labels

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, in the layout of the file."""
        height, width = self.engine.bundle.preprocess.size
        return (3, height, width) if self.engine.session.file.layout == "NCHW" else (height, width, 3)


class ModelRegistry:
    """Bundles by name. Their places are the command line's alone: no client value ever reaches a path."""

    def __init__(self, places: Mapping[str, Path], *, threads: int, any_bundle: bool = False) -> None:
        """Load all bundles. `any_bundle`: a reload takes a bundle of other labels or another preprocessing, too. Raises
        FgvcError for the first that can't be served."""
        self._places, self._threads, self._any_bundle = dict(places), threads, any_bundle
        self._reloading = threading.Lock()
        self._refused: dict[str, str] = {}  # name -> digest of a bundle that was refused; logged once
        self._served = {name: _load(name, folder, threads) for name, folder in places.items()}
        self.reloads = dict.fromkeys(places, 0)
        self.failures = dict.fromkeys(places, 0)

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(list(self._served.values()))

    def get(self, name: str | None) -> LoadedModel:
        """Look up a model; None: the first of the command line. Raises Refusal (404)."""
        if name is None:
            return next(iter(self._served.values()))
        served = self._served.get(name)
        if served is None:
            raise Refusal(404, f"no model {name!r} here; there are: {', '.join(self._served)}")
        return served

    def reload(self, *, changed_only: bool = False) -> None:
        """Load the bundles again, checked and warmed, and put each in its old one's place.

        A new one that can't be loaded, or has another preprocessing or other labels, is refused, and the old one stays; this is
        logged on stderr and counted. `changed_only`: leave out manifests that were loaded or refused before.
        """
        with self._reloading:
            for name, folder in self._places.items():
                digest = _digest(folder)
                if changed_only and digest in (self._served[name].digest, self._refused.get(name)):
                    continue
                try:
                    loaded = _load(name, folder, self._threads)
                    if not self._any_bundle:
                        _refuse_other(loaded.engine, self._served[name].engine)
                    self._served[name] = loaded
                except Exception as error:  # whatever is wrong with the new one, the old one is right
                    self.failures[name] += 1
                    self._refused[name] = digest
                    _log(f"{name}: not reloaded, the old one goes on: {str(error) or type(error).__name__}")
                else:
                    self.reloads[name] += 1
                    self._refused.pop(name, None)
                    _log(f"{name}: reloaded")


def parse_places(texts: Sequence[str]) -> dict[str, Path]:
    """Parse [NAME=]BUNDLE, ... Raises FgvcError for names that are given twice, or that no address can hold."""
    places: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        folder = Path(rest if equals else text)
        if not equals or "/" in name:  # a folder's own name may have a "="
            folder = Path(text)
            name = folder.absolute().name
        if not _NAME.fullmatch(name):
            raise FgvcError(f"{text}: {name!r} is no name for a model; give NAME={folder}")
        if name in places:
            raise FgvcError(f"{text}: a second model named {name!r}; give OTHER={folder}")
        places[name] = folder
    return places


def _refuse_other(new: Engine, old: Engine) -> None:
    """Raise FgvcError where a bundle is no drop-in for the one that is served: clients prepare tensors by the old preprocessing,
    and may read logits by the old order of classes."""
    labels = label_differences(new.bundle.labels, old.bundle.labels)
    mismatches = [*differences(new.fed, old.fed), *labels]
    if mismatches:
        raise FgvcError(
            f"not a drop-in, the new one's against the old one's: {'; '.join(mismatches)} (start with --any-bundle to take it)"
        )


def _load(name: str, folder: Path, threads: int) -> LoadedModel:
    """Load a bundle; one that is replaced meanwhile (by a rename, which leaves a moment without any) is loaded again."""
    for attempt in range(_ATTEMPTS):
        digest = _digest(folder)
        try:
            bundle = load_bundle(folder)
            engine = Engine(bundle, threads=threads)
            for doubt in engine.doubts:
                _log(f"{name}: {doubt}")
            explainer = None if bundle.explain_model is None else BundleExplainer(bundle, threads=threads)
        except FgvcError:
            if (digest and digest == _digest(folder)) or attempt == _ATTEMPTS - 1:
                raise
        else:
            if digest == _digest(folder):
                return LoadedModel(name=name, engine=engine, explainer=explainer, digest=digest)
        time.sleep(_PAUSE)
    raise FgvcError(f"{folder}: changes while it is read")


def _digest(folder: Path) -> str:
    """SHA-256 of the manifest; empty where there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
