"""`fgvc explain`: where networks look, as pictures and numbers. Bundles with onnxruntime and Pillow alone; what runs are looked
at with is in `fgvc.report.explain`, and drawn here, too.

Of every picture NAME, below the folder of results:
`overlays/METHOD/NAME.png`   the map over the picture as the network saw it (its crop);
`panels/NAME.png`            the picture and all overlays side by side, a row for each network;
`maps/NAME.npz`              the numbers, to be read by `numpy.load` without pickle:
  path ()                    of the picture, str
  methods (M,)               str
  classes (K,), p (K,)       str; float64, the network's probabilities
  calibrated ()              bool: whether a temperature was fitted for these
  temperature ()             float64: by which the logits were divided; 1 where none was fitted
  label ()                   int64, the class whose maps these are: a position in `classes`
  rejected ()                bool: "none of these", by the threshold of the run or bundle
  maps (M,H,W)               float32 in [0,1]: negative parts cut off, smallest 0, largest 1, enlarged to the network's input
  raw_METHOD (h,w)           float32: what `maps` was made of, unscaled, signed for methods that are; a cell of the feature map
and the same of a second network with `against_` before the name, its overlays in `overlays/METHOD-against`.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from fgvc.config.images import MAX_PIXELS, Preprocess
from fgvc.config.runtime import Calibration
from fgvc.errors import FgvcError, ImageError
from fgvc.images.lettering import ADVICE, writable
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit, normalise
from fgvc.images.sheet import FAST, Cell, save_sheet
from fgvc.io.files import refuse_place, replacing, writing
from fgvc.io.names import nearest, one_line, result_names, told_apart
from fgvc.runtime.bundle import MANIFEST, load_bundle
from fgvc.runtime.engine import (
    NONE,
    Session,
    calibration_word,
    is_calibrated,
    is_rejected,
    probabilities,
    refuse_no_numbers,
)
from fgvc.runtime.predict import decoded, expand

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]  # (H,W,3)
PREDICTED = "predicted"
RESULTS = ("maps", "overlays", "panels")  # folders
SINGLE_CELL = "no class maps: the feature map is a single cell; train at a larger image.size"
COLUMNS = 6  # pictures in a row of a panel, at most


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one network said of one picture, and where it looked."""

    label: int  # the class whose maps these are
    p: NDArray[np.float64]  # (K,)
    maps: Mapping[str, Floats]  # method -> (H,W) in [0,1]
    raw: Mapping[str, Floats]  # method -> (h,w)
    rejected: bool = False  # "none of these", by the network's threshold


class Explainer(Protocol):
    """A network that can be asked where it looks."""

    @property
    def folder(self) -> Path: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def spec(self) -> Preprocess: ...
    @property
    def methods(self) -> tuple[str, ...]: ...
    @property
    def calibration(self) -> Calibration | None: ...
    def __call__(self, x: Floats, label: int | None) -> list[Explanation]:
        """Of pictures x (B,3,H,W) and a class; None: of each one's most probable class."""


class BundleExplainer:
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
        self.folder, self.labels, self.spec = folder, bundle.labels, bundle.preprocess
        self.methods: tuple[str, ...] = ("cam",)
        self._session = Session(bundle.explain, threads=threads)
        self.calibration = bundle.calibration

    def __call__(self, x: Floats, label: int | None) -> list[Explanation]:
        logits, maps = self._session.run(x)
        refuse_no_numbers(logits, self.folder)
        seen = []
        for p, own in zip(probabilities(logits, self.calibration), maps, strict=True):
            chosen = int(p.argmax()) if label is None else label
            raw = np.ascontiguousarray(own[chosen])
            maps_of = {"cam": positive(raw, (x.shape[2], x.shape[3]))}
            seen.append(Explanation(chosen, p, maps_of, {"cam": raw}, rejected=is_rejected(p, self.calibration)))
        return seen


def telling(folder: Path) -> BundleExplainer:
    """A bundle whose maps can tell one place from another. Raises FgvcError where they have one cell, or there are none."""
    explainer = BundleExplainer(folder)
    if explainer(np.zeros((1, 3, *explainer.spec.size), np.float32), None)[0].raw["cam"].shape == (1, 1):
        raise FgvcError(f"{folder}: {SINGLE_CELL}")
    return explainer


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def explain_bundles(
    bundles: Sequence[Path],
    paths: Sequence[Path],
    out: Path,
    *,
    methods: Sequence[str],
    target: str,
    batch: int,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """`fgvc explain` of one bundle, or two side by side; see `explain_files`. Raises FgvcError for other methods than cam, and
    see `refuse_out`."""
    if other := [method for method in methods if method.lower() != "cam"]:
        raise FgvcError(
            f"{other[0]}: a bundle holds class activation maps alone (--method cam); for other methods explain the run that "
            "it was exported from"
        )
    files = list(expand(paths))
    refuse_out(out, overwrite=overwrite)
    explainers = [telling(folder) for folder in bundles]
    return explain_files(explainers, files, out, target=target, batch=batch, max_pixels=max_pixels)


def refuse_out(out: Path, *, overwrite: bool) -> None:
    """Raise FgvcError, before the long work, where no results can be written, or where `out` is not empty: old ones must not
    stand among the new. `overwrite`: those of an earlier explain are to go."""
    refuse_place(out)
    with writing(out):
        found = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if alien := [name for name in found if name not in RESULTS]:
        raise FgvcError(f"{out}: holds {alien[0]}, which is no result of explain; choose another --out")
    if found and not overwrite:
        raise FgvcError(f"{out}: holds results already; choose another --out, or give --overwrite to lose them")


def explain_files(
    explainers: Sequence[Explainer], files: Sequence[Path], out: Path, *, target: str, batch: int,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write the results of all pictures into `out` in the place of older ones, print one line each: its path, answers, panel, and
    whether each network's probabilities are calibrated. Returns 0, or 1 where a picture could not be read (said on stderr; the
    rest is done).

    `target`: a class by name, or `predicted`: each picture's most probable one by each network. `batch`: pictures a forward.
    Raises FgvcError for a class that a network does not have, before anything is written.
    """
    wanted = [None if target == PREDICTED else _position(explainer, target) for explainer in explainers]
    titles = told_apart([explainer.folder for explainer in explainers])
    names = list(dict.fromkeys([*(name for explainer in explainers for name in explainer.labels), *titles]))
    written, font = writable(names)
    if written != names:
        print(f"warning: {ADVICE}", file=sys.stderr)
    sheet = _Drawer(out, explainers, titles, dict(zip(names, written, strict=True)), font)
    for folder in RESULTS:
        if (out / folder).exists():
            with writing(out / folder):
                shutil.rmtree(out / folder)
    failed = 0
    rest = iter(zip(files, result_names(files), strict=True))
    while some := list(islice(rest, batch)):
        read = [_crops(path, explainers, max_pixels) for path, _ in some]
        good = [crops for crops in read if not isinstance(crops, ImageError)]
        each = zip(*good, strict=True) if good else [()] * len(explainers)
        answers = zip(*map(look, explainers, each, wanted), strict=True)
        for (path, name), crops in zip(some, read, strict=True):
            if isinstance(crops, ImageError):
                failed += 1
                print(f"error: {crops}", file=sys.stderr)
                continue
            seen = next(answers)
            panel = sheet.draw(path, name, list(zip(seen, map(Image.fromarray, crops), strict=True)))
            for title, explainer, one in zip(titles, explainers, seen, strict=True):
                for method in (method for method in explainer.methods if not one.maps[method].any()):
                    about = f"{one_line(title)}: {method} of {one_line(explainer.labels[one.label])}"
                    print(f"{one_line(path)}: {about}: an empty map: {silence(one.raw[method])}", file=sys.stderr)
            said = (_answer(explainer.labels, one) for explainer, one in zip(explainers, seen, strict=True))
            words = (calibration_word(is_calibrated(explainer.calibration)) for explainer in explainers)
            print("\t".join([one_line(path), *said, one_line(panel), *words]))
    return 1 if failed else 0


def _crops(path: Path, explainers: Sequence[Explainer], max_pixels: int) -> list[Pixels] | ImageError:
    """A picture as each network sees it. One by one: a batch of photographs as they are would not fit in memory."""
    image = decoded(path, max_pixels)
    return image if isinstance(image, ImageError) else [fit(image, explainer.spec) for explainer in explainers]


def positive(raw: Floats, size: tuple[int, int]) -> Floats:
    """A map (h,w) as pytorch-grad-cam shows it: (H,W) in [0,1], what speaks against the class cut off, bilinearly enlarged,
    smallest 0 and largest 1; 0 everywhere where it is flat."""
    cut = Image.fromarray(np.float32(raw).clip(min=0))
    large = np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    lowest, span = large.min(), np.ptp(large)
    return (large - lowest) / span if span > 1e-6 * large.max() else np.zeros_like(large)


def silence(raw: Floats) -> str:
    """Why a map is empty, from what it was made of (h,w)."""
    if not np.isfinite(raw).all():
        return "it is not finite"
    if not raw.any():
        return "no channel counts, or every one is flat"
    return "nothing speaks for the class" if raw.max() <= 0 else "it is the same everywhere"


@dataclass(frozen=True, slots=True)
class _Drawer:
    out: Path
    explainers: Sequence[Explainer]
    titles: Sequence[str]  # of the explainers
    written: Mapping[str, str]  # a name -> as the font can write it
    font: ImageFont.FreeTypeFont

    def draw(self, path: Path, name: str, seen: Sequence[tuple[Explanation, Image.Image]]) -> Path:
        """Write all of one picture; returns the panel's path."""
        rows: list[list[Cell]] = []
        arrays: dict[str, np.ndarray] = {"path": np.array(str(path))}
        for number, (explainer, (one, picture)) in enumerate(zip(self.explainers, seen, strict=True)):
            overlays = {method: overlay(picture, one.maps[method]) for method in explainer.methods}
            for method, drawn in overlays.items():
                folder = self.out / "overlays" / (method if number == 0 else f"{method}-against")
                with replacing(_ready(folder / f"{name}.png")) as scratch:
                    drawn.save(scratch, compress_level=FAST)
            rows += self._rows(number, one, picture, overlays)
            prefix = "" if number == 0 else "against_"
            arrays |= {f"{prefix}{key}": value for key, value in _arrays(explainer, one).items()}
        with replacing(_ready(self.out / "maps" / f"{name}.npz")) as scratch:
            np.savez(scratch, allow_pickle=False, **arrays)
        return save_sheet(rows, _ready(self.out / "panels" / f"{name}.png"), font=self.font)

    def _rows(
        self, number: int, one: Explanation, picture: Image.Image, overlays: Mapping[str, Image.Image]
    ) -> Iterator[list[Cell]]:
        """The picture with what the network takes it for, then the overlays; broken into rows of about one length."""
        of = f"{self.written[self.titles[number]]}: " if len(self.explainers) > 1 else ""
        explainer = self.explainers[number]
        labels, word = [self.written[label] for label in explainer.labels], calibration_word(is_calibrated(explainer.calibration))
        cells = [Cell(picture, f"{of}{_answer(labels, one, int(one.p.argmax()))}, {word}")]
        for method, drawn in overlays.items():
            empty = "" if one.maps[method].any() else f" (empty: {silence(one.raw[method])})"
            cells.append(Cell(drawn, f"{method}: {_share(labels, one, one.label)}, {word}{empty}"))
        columns = math.ceil(len(cells) / math.ceil(len(cells) / COLUMNS))
        return (cells[at : at + columns] for at in range(0, len(cells), columns))


def _answer(labels: Sequence[str], one: Explanation, k: int | None = None) -> str:
    """Class `k`, by default that of the maps, and how probable it is; of the most probable one, whether it is given at all."""
    k = one.label if k is None else k
    share = _share(labels, one, k)
    return f"{NONE} ({share})" if one.rejected and k == one.p.argmax() else share


def _share(labels: Sequence[str], one: Explanation, k: int) -> str:
    return f"{labels[k]} {100 * one.p[k]:.1f} %"


def _arrays(explainer: Explainer, one: Explanation) -> dict[str, np.ndarray]:
    return {
        "methods": np.array(explainer.methods), "classes": np.array(explainer.labels), "p": one.p, "label": np.array(one.label),
        "rejected": np.array(one.rejected), "calibrated": np.array(is_calibrated(explainer.calibration)),
        "temperature": np.array(explainer.calibration.temperature if explainer.calibration else 1.0),
        "maps": np.stack([one.maps[method] for method in explainer.methods]),
        **{f"raw_{method}": one.raw[method] for method in explainer.methods},
    }  # fmt: skip


def look(explainer: Explainer, crops: Sequence[Pixels], label: int | None) -> list[Explanation]:
    """What the network says of each picture, cut and reduced for it."""
    return explainer(np.stack([normalise(crop, explainer.spec) for crop in crops]), label) if len(crops) else []


def _position(explainer: Explainer, name: str) -> int:
    if name not in explainer.labels:
        near = nearest(name, explainer.labels, 3)
        raise FgvcError(
            f"--target: {explainer.folder} has no class {name!r}; "
            + (f"near: {', '.join(near)}" if near else "or `predicted`")
        )
    return explainer.labels.index(name)


def _ready(path: Path) -> Path:
    """The same path, its folder there."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path
