"""Prediction by a bundle, pictures in, answers out, and `fgvc predict`, one line a picture; the server has no part in it.
onnxruntime and Pillow only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.images import MAX_PIXELS, Preprocess
from fgvc.errors import FgvcError, ImageError
from fgvc.images.decode import as_rgb, decode
from fgvc.images.preprocess import preprocess
from fgvc.images.suffix import SUFFIXES, counted, suffix_of
from fgvc.io.display import Results
from fgvc.io.files import StrPath
from fgvc.io.names import one_line
from fgvc.runtime.bundle import Variant, load_bundle
from fgvc.runtime.engine import NONE, Answer, Engine, calibration_word

Pictures = StrPath | Image.Image | NDArray[np.uint8] | Iterable[StrPath | Image.Image | NDArray[np.uint8]]
"""A file or a folder of them, an image of Pillow, pixels (H,W), (H,W,3) in RGB or (H,W,4) in RGBA; or several."""

BATCH = 16  # bounds memory; on CPUs a larger one is no faster


def predict_files(
    bundle: Path, paths: Iterable[Path], *, as_json: bool = False, top_k: int = 1, variant: Variant = "float",
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Print one line a picture: its path, classes with their probabilities, and whether these are calibrated. Returns 0, or 1
    where a picture could not be read (reported on stderr, or in its JSON line).

    Raises FgvcError for a path that does not exist and for a damaged bundle, before anything is printed; and for logits that
    are no numbers, when it comes to them.
    """
    files = list(expand(paths))
    engine = Engine(load_bundle(bundle), variant=variant)
    for doubt in engine.doubts:
        print(f"warning: {bundle}: {doubt}", file=sys.stderr)
    began, failed = time.monotonic(), 0
    for path, result in _classify(engine, files, top_k, max_pixels):
        if isinstance(result, ImageError):
            failed += 1
            print(f"error: {result}", file=sys.stderr)
            if as_json:
                print(json.dumps({"path": str(path), "error": result.reason}, ensure_ascii=False, allow_nan=False))
        elif as_json:
            rows = [{"label": p.label, "index": p.index, "probability": p.probability} for p in result.predictions]
            row = {
                "path": str(path), "rejected": result.rejected, "calibrated": result.calibrated, "predictions": rows
            }  # fmt: skip
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        else:
            names = [f"{p.label} {100 * p.probability:.1f} %" for p in result.predictions]
            columns = [f"{NONE} ({', '.join(names)})"] if result.rejected else names
            print("\t".join([one_line(path), *columns, calibration_word(result.calibrated)]))
    if not as_json:
        unread = f", {failed} could not be read" * bool(failed)
        noun = "picture" if len(files) == 1 else "pictures"
        print(f"{len(files)} {noun} in {time.monotonic() - began:.1f} s{unread}", file=sys.stderr)
    return 1 if failed else 0


def predict(engine: Engine, images: Pictures, *, top_k: int = 5, max_pixels: int = MAX_PIXELS) -> Results[Answer]:
    """Classify pictures, of a folder all below it, in order of name. Raises ImageError for one that can't be read, FgvcError for
    a path that does not exist and for logits that are no numbers."""
    spec, results = engine.bundle.preprocess, list[Answer]()
    rest = iter(opened(images, max_pixels))
    while batch := [(name, preprocess(picture, spec)) for name, picture in islice(rest, BATCH)]:
        answers = engine.answers(engine.logits(np.stack([x for _, x in batch])), top_k=top_k)
        results += [replace(answer, image=name) for (name, _), answer in zip(batch, answers, strict=True)]
    return Results(results)


def opened(images: Pictures, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, Image.Image]]:
    """Yield name and RGB picture of each, read when it is asked for: the path, or a number. Raises as `predict` does."""
    single = isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    several: Iterable[Any] = [images] if single else images  # type: ignore[assignment]  # pixels (N,H,W,3), too
    for at, image in enumerate(several):
        if isinstance(image, str | os.PathLike):
            yield from ((str(path), decode(path, max_pixels=max_pixels)) for path in expand([Path(image)]))
        else:
            yield f"picture {at}", as_rgb(image, f"picture {at}")


def expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Expand paths: files as given; folders to the pictures below them, in order of name, hidden ones left out as in a
    data set. Raises FgvcError for a path that does not exist."""
    for path in paths:
        try:
            kind = "folder" if path.is_dir() else "file" if path.exists() else ""
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise FgvcError(f"{path}: {error.strerror}") from error
        if not kind:
            raise FgvcError(f"{path}: no such file or folder")
        if kind == "file":
            yield path
            continue
        files = sorted(p for p in path.rglob("*") if _shown(p, path) and p.is_file())
        pictures = [p for p in files if p.name.lower().endswith(SUFFIXES)]
        others = Counter(suffix_of(p.name) for p in files if not p.name.lower().endswith(SUFFIXES))
        skipped = f"{others.total()} files are of other types than fgvc reads: {counted(others)}" if others else ""
        if not pictures:
            raise FgvcError(f"{path}: no picture below this folder" + f"; {skipped}" * bool(skipped))
        if skipped:
            print(f"warning: {path}: {skipped}; they are left out", file=sys.stderr)
        yield from pictures


def _shown(path: Path, folder: Path) -> bool:
    return not any(name.startswith(".") for name in path.relative_to(folder).parts)


def _classify(
    engine: Engine, files: Iterable[Path], top_k: int, max_pixels: int
) -> Iterator[tuple[Path, Answer | ImageError]]:
    """Classify pictures, which are reduced to the network's input one by one: a batch of photographs would not fit in memory."""
    rest = iter(files)
    while batch := list(islice(rest, BATCH)):
        read = [_input(path, engine.bundle.preprocess, max_pixels) for path in batch]  # a file may be named twice
        good = [x for x in read if not isinstance(x, ImageError)]
        results = iter(engine.answers(engine.logits(np.stack(good)), top_k=top_k) if good else [])
        for path, x in zip(batch, read, strict=True):
            yield path, x if isinstance(x, ImageError) else next(results)


def _input(path: Path, spec: Preprocess, max_pixels: int) -> np.ndarray | ImageError:
    image = decoded(path, max_pixels)
    return image if isinstance(image, ImageError) else preprocess(image, spec)


def decoded(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image | ImageError:
    """Decode a picture; an error is returned, so that the others can be processed."""
    try:
        return decode(path, max_pixels=max_pixels)
    except ImageError as error:
        return error
