"""`fgvc explain`: class activation maps of pictures, as overlays and numbers. Bundles need onnxruntime and Pillow alone; the
maps of runs come from `fgvc.report.explain`, and are drawn here, too.

For every picture NAME, below the folder of results:
`overlays/METHOD/NAME.png`   the map over the picture as the network saw it (its crop);
`panels/NAME.png`            the picture and all overlays side by side at the network's size, a row for each network; with the
                             true class where a folder above the picture is called like one;
`maps/NAME.npz`              the numbers, to be read by `numpy.load` without pickle:
  path ()                    of the picture, str
  methods (M,)               str
  classes (K,), p (K,)       str; float64, the network's probabilities
  calibrated ()              bool: whether a temperature was fitted for these
  temperature ()             float64: by which the logits were divided; 1 where none was fitted
  label ()                   int64, the class whose maps these are: a position in `classes`
  rejected ()                bool: "none of these", by the threshold of the run or bundle
  maps (M,H,W)               float32 in [0,1]: negative parts cut off, smallest 0, largest 1, enlarged to the network's input
  raw_METHOD (h,w)           float32: the map before scaling, signed for methods that are; one value a cell of the feature map
and the same of a second network with `against_` before the name, its overlays in `overlays/METHOD-against`.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from fgvc.config.calibration import Calibration
from fgvc.config.images import MAX_PIXELS, Preprocess
from fgvc.errors import FgvcError, ImageError
from fgvc.images.lettering import ADVICE, writable
from fgvc.images.overlay import overlay
from fgvc.images.preprocess import fit, normalise
from fgvc.images.sheet import FAST, TILE, Cell, save_sheet
from fgvc.io.files import refuse_place, replacing, writing
from fgvc.io.names import distinct_names, nearest, one_line, result_names
from fgvc.io.progress import track
from fgvc.runtime.bundle import MANIFEST, Bundle, load_bundle
from fgvc.runtime.engine import (
    NONE,
    calibration_word,
    is_calibrated,
    is_rejected,
    probabilities,
    refuse_no_numbers,
    session_of,
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
    """Probabilities of one network for one picture, and its class activation maps."""

    label: int  # the class whose maps these are
    p: NDArray[np.float64]  # (K,)
    maps: Mapping[str, Floats]  # method -> (H,W) in [0,1]
    raw: Mapping[str, Floats]  # method -> (h,w)
    rejected: bool = False  # "none of these", by the network's threshold


class Explainer(Protocol):
    """A network with class activation maps."""

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
        """Explain pictures x (B,3,H,W) for a class; None: for each one's most probable class."""


class BundleExplainer:
    """Class activation maps of a bundle's `explain.onnx`: sum_k W[c,k] A_k, no gradient and no torch."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load the network. `threads`: as of `OnnxSession`. Raises FgvcError for a bundle without `explain.onnx`."""
        if bundle.explain_model is None:
            why = str(bundle.contract.get("explain", "")).strip()
            raise FgvcError(
                f"{bundle.folder}: has no explain.onnx{f' ({why})' if why else ''}; explain the run that it was exported from: "
                "fgvc explain RUN IMG --method gradcam"
            )
        self.folder, self.labels, self.spec = bundle.folder, bundle.labels, bundle.preprocess
        self.methods: tuple[str, ...] = ("cam",)
        self._session = session_of(bundle, bundle.explain_model, threads=threads)
        self.calibration = bundle.calibration

    def __call__(self, x: Floats, label: int | None) -> list[Explanation]:
        logits, *_, maps = self._session.run(x)
        refuse_no_numbers(logits, self.folder)
        explanations = []
        for p, class_maps in zip(probabilities(logits, self.calibration, self._session.file.ending), maps, strict=True):
            k = int(p.argmax()) if label is None else label
            raw = np.ascontiguousarray(class_maps[k])
            scaled, rejected = positive(raw, (x.shape[2], x.shape[3])), is_rejected(p, self.calibration)
            explanations.append(Explanation(k, p, {"cam": scaled}, {"cam": raw}, rejected=rejected))
        return explanations


def load_explainer(bundle: Bundle) -> BundleExplainer:
    """Load a bundle's explainer. Raises FgvcError where it has no maps, or they have a single cell."""
    explainer = BundleExplainer(bundle)
    if explainer(np.zeros((1, 3, *explainer.spec.size), np.float32), None)[0].raw["cam"].shape == (1, 1):
        raise FgvcError(f"{bundle.folder}: {SINGLE_CELL}")
    return explainer


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle: it has a manifest."""
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
    """Run `fgvc explain` for one bundle, or two side by side; see `explain_files`.

    Raises FgvcError for other methods than cam, and as `refuse_out` does.
    """
    if other := [method for method in methods if method.lower() != "cam"]:
        raise FgvcError(
            f"{other[0]}: a bundle holds class activation maps alone (--method cam); for other methods explain the run that "
            "it was exported from"
        )
    files = list(expand(paths))
    refuse_out(out, overwrite=overwrite)
    explainers = [load_explainer(load_bundle(folder)) for folder in bundles]
    return explain_files(explainers, files, out, target=target, batch=batch, max_pixels=max_pixels)


def refuse_out(out: Path, *, overwrite: bool) -> None:
    """Raise FgvcError, before the long work, where no results can be written, or where `out` is not empty: old results must not
    stand among the new. `overwrite`: results of an earlier explain may be replaced."""
    refuse_place(out)
    with writing(out):
        entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if others := [name for name in entries if name not in RESULTS]:
        raise FgvcError(f"{out}: holds {others[0]}, which is no result of explain; choose another --out")
    if entries and not overwrite:
        raise FgvcError(f"{out}: holds results already; choose another --out, or give --overwrite to lose them")


def explain_files(
    explainers: Sequence[Explainer], files: Sequence[Path], out: Path, *, target: str, batch: int,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write the results of all pictures into `out`, in the place of older ones, and print a line for each: its path, answers,
    panel, and whether each network's probabilities are calibrated. Returns 0, or 1 where a picture could not be read (reported
    on stderr; the rest is done).

    `target`: a class by name, or `predicted`: each picture's most probable one by each network. `batch`: pictures a forward.
    Raises FgvcError for a class that a network does not have, before anything is written.
    """
    positions = [None if target == PREDICTED else position(explainer, target) for explainer in explainers]
    titles = distinct_names([explainer.folder for explainer in explainers])
    names = list(dict.fromkeys([*(name for explainer in explainers for name in explainer.labels), *titles]))
    written, font = writable(names)
    if written != names:
        print(f"warning: {ADVICE}", file=sys.stderr)
    drawer = _Drawer(out, explainers, titles, dict(zip(names, written, strict=True)), font)
    for folder in RESULTS:
        if (out / folder).exists():
            with writing(out / folder):
                shutil.rmtree(out / folder)
    failed = 0
    named = list(zip(files, result_names(files), strict=True))
    chunks = [named[at : at + batch] for at in range(0, len(named), batch)]
    for chunk in track(chunks, "pictures", len(named), size=len):
        read = [_crops(path, explainers, max_pixels) for path, _ in chunk]
        good = [crops for crops in read if not isinstance(crops, ImageError)]
        inputs = zip(*good, strict=True) if good else [()] * len(explainers)
        by_picture = zip(*map(explain_crops, explainers, inputs, positions), strict=True)
        for (path, name), crops in zip(chunk, read, strict=True):
            if isinstance(crops, ImageError):
                failed += 1
                print(f"error: {crops}", file=sys.stderr)
                continue
            explanations = next(by_picture)
            panel = drawer.draw(path, name, list(zip(explanations, map(Image.fromarray, crops), strict=True)))
            for title, explainer, explanation in zip(titles, explainers, explanations, strict=True):
                for method in (method for method in explainer.methods if not explanation.maps[method].any()):
                    about = f"{one_line(title)}: {method} of {one_line(explainer.labels[explanation.label])}"
                    print(f"{one_line(path)}: {about}: an empty map: {why_empty(explanation.raw[method])}", file=sys.stderr)
            answers = (_answer(e.labels, explanation) for e, explanation in zip(explainers, explanations, strict=True))
            words = (calibration_word(is_calibrated(explainer.calibration)) for explainer in explainers)
            print("\t".join([one_line(path), *answers, one_line(panel), *words]))
    print(f"{len(files) - failed} of {len(files)} pictures explained: {one_line(out)}", file=sys.stderr)
    return 1 if failed else 0


def _crops(path: Path, explainers: Sequence[Explainer], max_pixels: int) -> list[Pixels] | ImageError:
    """Crops of a picture for each network. One picture at a time: a batch of whole photographs would not fit in memory."""
    image = decoded(path, max_pixels)
    return image if isinstance(image, ImageError) else [fit(image, explainer.spec) for explainer in explainers]


def positive(raw: Floats, size: tuple[int, int]) -> Floats:
    """Scale a map (h,w) as pytorch-grad-cam does: (H,W) in [0,1], negative values cut off, bilinearly enlarged, smallest 0 and
    largest 1; 0 everywhere where it is flat."""
    cut = Image.fromarray(np.float32(raw).clip(min=0))
    large = np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    lowest, span = large.min(), np.ptp(large)
    return (large - lowest) / span if span > 1e-6 * large.max() else np.zeros_like(large)


def why_empty(raw: Floats) -> str:
    """Reason why a map is empty, from its raw values (h,w)."""
    if not np.isfinite(raw).all():
        return "it is not finite"
    if not raw.any():
        return "no channel counts, or every one is flat"
    return "nothing speaks for the class" if raw.max() <= 0 else "it is the same everywhere"


@dataclass(frozen=True, slots=True)
class _Drawer:
    """Writer of the results of each picture."""

    out: Path
    explainers: Sequence[Explainer]
    titles: Sequence[str]  # of the explainers
    written: Mapping[str, str]  # a name -> as the font can write it
    font: ImageFont.FreeTypeFont

    def draw(self, path: Path, name: str, explanations: Sequence[tuple[Explanation, Image.Image]]) -> Path:
        """Write all results of one picture; returns the panel's path."""
        rows: list[list[Cell]] = []
        arrays: dict[str, np.ndarray] = {"path": np.array(str(path))}
        for number, (explainer, (explanation, picture)) in enumerate(zip(self.explainers, explanations, strict=True)):
            overlays = {method: overlay(picture, explanation.maps[method]) for method in explainer.methods}
            for method, drawn in overlays.items():
                folder = self.out / "overlays" / (method if number == 0 else f"{method}-against")
                with replacing(_ready(folder / f"{name}.png")) as scratch:
                    drawn.save(scratch, compress_level=FAST)
            rows += self._rows(number, explanation, picture, overlays, true_class(path, explainer.labels))
            prefix = "" if number == 0 else "against_"
            arrays |= {f"{prefix}{key}": value for key, value in _arrays(explainer, explanation).items()}
        with replacing(_ready(self.out / "maps" / f"{name}.npz")) as scratch:
            np.savez(scratch, allow_pickle=False, **arrays)
        tile = max(TILE, *(max(picture.size) for _, picture in explanations))
        out = _ready(self.out / "panels" / f"{name}.png")
        return save_sheet(rows, out, font=self.font, tile=tile, legend=("speaks least", "speaks most for the class"))

    def _rows(
        self,
        number: int,
        explanation: Explanation,
        picture: Image.Image,
        overlays: Mapping[str, Image.Image],
        true: str | None,
    ) -> Iterator[list[Cell]]:
        """Cells of the picture with its most probable class and its true one, then of overlays, in rows of about one length."""
        of = f"{self.written[self.titles[number]]}: " if len(self.explainers) > 1 else ""
        explainer = self.explainers[number]
        labels, word = [self.written[label] for label in explainer.labels], calibration_word(is_calibrated(explainer.calibration))
        best = int(explanation.p.argmax())
        truth = "" if true is None else "; right" if explainer.labels[best] == true else f"; wrong, it is {self.written[true]}"
        cells = [Cell(picture, f"{of}{_answer(labels, explanation, best)}, {word}{truth}", "picture")]
        for method, drawn in overlays.items():
            empty = "" if explanation.maps[method].any() else f" (empty: {why_empty(explanation.raw[method])})"
            cells.append(Cell(drawn, f"{_share(labels, explanation, explanation.label)}, {word}{empty}", method))
        columns = math.ceil(len(cells) / math.ceil(len(cells) / COLUMNS))
        return (cells[at : at + columns] for at in range(0, len(cells), columns))


def true_class(path: Path, labels: Sequence[str]) -> str | None:
    """The class of a picture in a set of class folders: the nearest folder above it that is called like one. None: not known."""
    return next((folder.name for folder in path.absolute().parents if folder.name in labels), None)


def _answer(labels: Sequence[str], explanation: Explanation, k: int | None = None) -> str:
    """Class `k`, by default that of the maps, and its probability; "none of these" where it is the best one and rejected."""
    k = explanation.label if k is None else k
    share = _share(labels, explanation, k)
    return f"{NONE} ({share})" if explanation.rejected and k == explanation.p.argmax() else share


def _share(labels: Sequence[str], explanation: Explanation, k: int) -> str:
    return f"{labels[k]} {100 * explanation.p[k]:.1f} %"


def _arrays(explainer: Explainer, explanation: Explanation) -> dict[str, np.ndarray]:
    return {
        "methods": np.array(explainer.methods), "classes": np.array(explainer.labels), "p": explanation.p,
        "label": np.array(explanation.label), "rejected": np.array(explanation.rejected),
        "calibrated": np.array(is_calibrated(explainer.calibration)),
        "temperature": np.array(explainer.calibration.temperature if explainer.calibration else 1.0),
        "maps": np.stack([explanation.maps[method] for method in explainer.methods]),
        **{f"raw_{method}": explanation.raw[method] for method in explainer.methods},
    }  # fmt: skip


def explain_crops(explainer: Explainer, crops: Sequence[Pixels], label: int | None) -> list[Explanation]:
    """Explain crops (H,W,3) of pictures that were made for this network."""
    return explainer(np.stack([normalise(crop, explainer.spec) for crop in crops]), label) if len(crops) else []


def position(explainer: Explainer, name: str) -> int:
    """Number of the class `name`. Raises FgvcError, with the nearest names, where the explainer has no such class."""
    if name not in explainer.labels:
        near = nearest(name, explainer.labels, 3)
        raise FgvcError(
            f"--target: {explainer.folder} has no class {name!r}; "
            + (f"near: {', '.join(near)}" if near else "or `predicted`")
        )
    return explainer.labels.index(name)


def _ready(path: Path) -> Path:
    """Make the folder of `path`, and return `path`."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path
