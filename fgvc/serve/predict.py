"""`fgvc predict`: files in, one line a picture out. onnxruntime and Pillow only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from PIL.Image import Image

from fgvc.export.bundle import Variant, load_bundle
from fgvc.image.decode import decode
from fgvc.serve.engine import Answer, Engine
from fgvc.types import FgvcError, ImageError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
BATCH = 16  # bounds memory; on CPUs a larger one is no faster


def predict_files(
    bundle: Path, paths: Iterable[Path], *, as_json: bool = False, top_k: int = 1, variant: Variant = "float"
) -> int:
    """Print one line a picture; returns 0, or 1 where a picture could not be read (said on stderr, or in its JSON line).

    Raises FgvcError for a path that does not exist and for a damaged bundle, before anything is printed; and for logits that
    are no numbers, when it comes to them.
    """
    files = list(expand(paths))
    engine = Engine(load_bundle(bundle), variant=variant)
    failed = 0
    for path, result in _classify(engine, files, top_k):
        if isinstance(result, ImageError):
            failed += 1
            print(f"error: {result}", file=sys.stderr)
            if as_json:
                print(json.dumps({"path": str(path), "error": result.reason}, ensure_ascii=False, allow_nan=False))
        elif as_json:
            rows = [{"label": p.label, "index": p.index, "probability": p.probability} for p in result.predictions]
            row = {"path": str(path), "rejected": result.rejected, "predictions": rows}
            print(json.dumps(row, ensure_ascii=False, allow_nan=False))
        else:
            names = [f"{p.label} {100 * p.probability:.1f} %" for p in result.predictions]
            said = [f"none of these ({', '.join(names)})"] if result.rejected else names
            print("\t".join([str(path), *said]))
    return 1 if failed else 0


def expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as given; folders by the pictures below them, in order of name. Raises FgvcError for what is not there."""
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise FgvcError(f"{path}: no picture below this folder (looked for {', '.join(sorted(SUFFIXES))})")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FgvcError(f"{path}: no such file or folder")


def _classify(engine: Engine, files: Iterable[Path], top_k: int) -> Iterator[tuple[Path, Answer | ImageError]]:
    rest = iter(files)
    while batch := list(islice(rest, BATCH)):
        read = [(path, decoded(path)) for path in batch]  # a file may be named twice
        good = [image for _, image in read if isinstance(image, Image)]
        answers = iter(engine.classify(good, top_k=top_k))
        for path, image in read:
            yield path, image if isinstance(image, ImageError) else next(answers)


def decoded(path: Path) -> Image | ImageError:
    """The picture, or why there is none, for those who go on with the others."""
    try:
        return decode(path)
    except ImageError as error:
        return error
