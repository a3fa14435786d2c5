"""`fgvc explain`: where networks look, as pictures and numbers. Bundles with onnxruntime and Pillow alone; what runs are looked
at with is in `fgvc.explain`, and drawn here, too.

Of every picture NAME, below the folder of results:
`overlays/METHOD/NAME.png`   the map over the picture as the network saw it (its crop);
`panels/NAME.png`            the picture and all overlays side by side, a row for each network;
`maps/NAME.npz`              the numbers, to be read by `numpy.load` without pickle:
  path ()                    of the picture, str
  methods (M,)               str
  classes (K,), p (K,)       str; float64, the network's probabilities
  label ()                   int64, the class whose maps these are: a position in `classes`
  maps (M,H,W)               float32 in [0,1]: negative parts cut off, smallest 0, largest 1, enlarged to the network's input
  raw_METHOD (h,w)           float32: what `maps` was made of, unscaled, signed for methods that are; a cell of the feature map
and the same of a second network with `against_` before the name, its overlays in `overlays/METHOD-against`.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from fgvc.config import Preprocess
from fgvc.disk import replacing, writing
from fgvc.export.bundle import MANIFEST, load_bundle
from fgvc.image.lettering import writable
from fgvc.image.overlay import overlay
from fgvc.image.preprocess import fit, normalise
from fgvc.image.sheet import FAST, Cell, save_sheet
from fgvc.serve.engine import Session, refuse_no_numbers, softmax
from fgvc.serve.predict import decoded, expand
from fgvc.types import FgvcError, ImageError

Floats = NDArray[np.float32]
Writing = Callable[[Sequence[str]], tuple[list[str], ImageFont.FreeTypeFont]]
PREDICTED = "predicted"
COLUMNS = 6  # pictures in a row of a panel, at most
ADVICE = "no font here can write some names, which appear as numbers; install one, such as Debian's fonts-noto-cjk"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one network said of one picture, and where it looked."""

    label: int  # the class whose maps these are
    p: NDArray[np.float64]  # (K,)
    maps: Mapping[str, Floats]  # method -> (H,W) in [0,1]
    raw: Mapping[str, Floats]  # method -> (h,w)


class Looker(Protocol):
    """A network that can be asked where it looks."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def spec(self) -> Preprocess: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    def __call__(self, x: Floats, label: int | None) -> list[Seen]:
        """Of pictures x (B,3,H,W) and a class; None: of each one's most probable class."""


class BundleLooker:
    """The class activation maps of a bundle's `explain.onnx`: sum_k W[c,k] A_k, no gradient and no torch."""

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        """`threads`: as of `Session`. Raises FgvcError for a bundle without `explain.onnx`."""
        bundle = load_bundle(folder)
        if bundle.explain is None:
            why = str(bundle.contract.get("explain", "")).strip()
            raise FgvcError(
                f"{folder}: has no explain.onnx{f' ({why})' if why else ''}; explain the run that it was exported from: "
                "fgvc explain RUN IMG --method gradcam"
            )
        self.name, self.labels, self.spec = folder.resolve().name, bundle.labels, bundle.preprocess
        self.methods: tuple[str, ...] = ("cam",)
        self._folder, self._session = folder, Session(bundle.explain, threads=threads)
        self._temperature = bundle.calibration.temperature if bundle.calibration else 1.0

    def __call__(self, x: Floats, label: int | None) -> list[Seen]:
        logits, maps = self._session.run(x)
        refuse_no_numbers(logits, self._folder)
        seen = []
        for p, own in zip(softmax(logits / self._temperature), maps, strict=True):
            chosen = int(p.argmax()) if label is None else label
            raw = np.ascontiguousarray(own[chosen])
            seen.append(Seen(chosen, p, {"cam": positive(raw, (x.shape[2], x.shape[3]))}, {"cam": raw}))
        return seen


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def explain_bundles(
    bundles: Sequence[Path], paths: Sequence[Path], out: Path, *, methods: Sequence[str], target: str, batch: int
) -> int:
    """`fgvc explain` of one bundle, or two side by side; see `explain_files`. Raises FgvcError for other methods than cam."""
    if other := [method for method in methods if method.lower() != "cam"]:
        raise FgvcError(
            f"{other[0]}: a bundle holds class activation maps alone (--method cam); for other methods explain the run that "
            "it was exported from"
        )
    lookers = [BundleLooker(folder) for folder in bundles]
    return explain_files(lookers, paths, out, target=target, batch=batch, write=writable)


def explain_files(
    lookers: Sequence[Looker], paths: Sequence[Path], out: Path, *, target: str, batch: int, write: Writing
) -> int:
    """Write the results of all pictures into `out`, print one line each; returns 0, or 1 where a picture could not be read (said
    on stderr; the rest is done).

    `target`: a class by name, or `predicted`: each picture's most probable one by each network. `batch`: pictures a forward.
    Raises FgvcError for a path that does not exist and a class that a network does not have, before anything is written.
    """
    files = list(expand(paths))
    wanted = [None if target == PREDICTED else _position(looker, target) for looker in lookers]
    names = list(dict.fromkeys(name for looker in lookers for name in (*looker.labels, looker.name)))
    written, font = write(names)
    if written != names:
        print(f"warning: {ADVICE}", file=sys.stderr)
    sheet = _Drawer(out, lookers, dict(zip(names, written, strict=True)), font)
    failed = 0
    rest = iter(zip(files, _names(files), strict=True))
    while some := list(islice(rest, batch)):
        images = [decoded(path) for path, _ in some]
        good = [image for image in images if isinstance(image, Image.Image)]
        answers = zip(*(look(looker, good, label) for looker, label in zip(lookers, wanted, strict=True)), strict=True)
        for (path, name), image in zip(some, images, strict=True):
            if isinstance(image, ImageError):
                failed += 1
                print(f"error: {image}", file=sys.stderr)
                continue
            seen = next(answers)
            panel = sheet.draw(path, name, seen)
            said = (_share(looker.labels, one, one.label) for looker, (one, _) in zip(lookers, seen, strict=True))
            print("\t".join([str(path), *said, str(panel)]))
    return 1 if failed else 0


def positive(raw: Floats, size: tuple[int, int]) -> Floats:
    """A map (h,w) as pytorch-grad-cam shows it: (H,W) in [0,1], what speaks against the class cut off, bilinearly enlarged,
    smallest 0 and largest 1; 0 everywhere where it is flat."""
    cut = Image.fromarray(np.float32(raw).clip(min=0))
    large = np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    lowest, span = large.min(), np.ptp(large)
    return (large - lowest) / span if span > 1e-6 * large.max() else np.zeros_like(large)


@dataclass(frozen=True, slots=True)
class _Drawer:
    out: Path
    lookers: Sequence[Looker]
    written: Mapping[str, str]  # a name -> as the font can write it
    font: ImageFont.FreeTypeFont

    def draw(self, path: Path, name: str, seen: Sequence[tuple[Seen, Image.Image]]) -> Path:
        """Write all of one picture; returns the panel's path."""
        rows: list[list[Cell]] = []
        arrays: dict[str, np.ndarray] = {"path": np.array(str(path))}
        for number, (looker, (one, picture)) in enumerate(zip(self.lookers, seen, strict=True)):
            overlays = {method: overlay(picture, one.maps[method]) for method in looker.methods}
            for method, drawn in overlays.items():
                folder = self.out / "overlays" / (method if number == 0 else f"{method}-against")
                with replacing(_ready(folder / f"{name}.png")) as scratch:
                    drawn.save(scratch, compress_level=FAST)
            rows += self._rows(looker, one, picture, overlays)
            prefix = "" if number == 0 else "against_"
            arrays |= {f"{prefix}{key}": value for key, value in _arrays(looker, one).items()}
        with replacing(_ready(self.out / "maps" / f"{name}.npz")) as scratch:
            np.savez(scratch, allow_pickle=False, **arrays)
        return save_sheet(rows, _ready(self.out / "panels" / f"{name}.png"), font=self.font)

    def _rows(
        self, looker: Looker, one: Seen, picture: Image.Image, overlays: Mapping[str, Image.Image]
    ) -> Iterator[list[Cell]]:
        """The picture with what the network takes it for, then the overlays; broken into rows of about one length."""
        best = int(one.p.argmax())
        of = f"{self.written[looker.name]}: " if len(self.lookers) > 1 else ""
        labels = [self.written[label] for label in looker.labels]
        cells = [Cell(picture, f"{of}{_share(labels, one, best)}")]
        for method, drawn in overlays.items():
            empty = "" if one.maps[method].any() else " (nothing speaks for it)"
            cells.append(Cell(drawn, f"{method}: {_share(labels, one, one.label)}{empty}"))
        columns = math.ceil(len(cells) / math.ceil(len(cells) / COLUMNS))
        return (cells[at : at + columns] for at in range(0, len(cells), columns))


def _share(labels: Sequence[str], one: Seen, k: int) -> str:
    return f"{labels[k]} {100 * one.p[k]:.1f} %"


def _arrays(looker: Looker, one: Seen) -> dict[str, np.ndarray]:
    return {
        "methods": np.array(looker.methods), "classes": np.array(looker.labels), "p": one.p, "label": np.array(one.label),
        "maps": np.stack([one.maps[method] for method in looker.methods]),
        **{f"raw_{method}": one.raw[method] for method in looker.methods},
    }  # fmt: skip


def look(looker: Looker, images: Sequence[Image.Image], label: int | None) -> list[tuple[Seen, Image.Image]]:
    """What the network says of each, and each as it saw it."""
    if not images:
        return []
    crops = [fit(image, looker.spec) for image in images]
    seen = looker(np.stack([normalise(crop, looker.spec) for crop in crops]), label)
    return [(one, Image.fromarray(crop)) for one, crop in zip(seen, crops, strict=True)]


def _position(looker: Looker, name: str) -> int:
    if name not in looker.labels:
        near = difflib.get_close_matches(name, looker.labels, n=3)
        raise FgvcError(
            f"--target: {looker.name} has no class {name!r}; "
            + (f"near: {', '.join(near)}" if near else "or `predicted`")
        )
    return looker.labels.index(name)


def _names(files: Sequence[Path]) -> list[str]:
    """A name for the results of each file: its own without the suffix, with a number where that is taken."""
    taken: set[str] = set()
    names = []
    for path in files:
        name, number = path.stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _ready(path: Path) -> Path:
    """The same path, its folder there."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path
