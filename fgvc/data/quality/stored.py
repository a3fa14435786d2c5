"""How the files of a set store their pictures, and where a network would see something else than people do: too few of the bits
are used, boxes lie elsewhere, data were lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fgvc.data.index import ImageIndex
from fgvc.errors import FgvcError, ImageError
from fgvc.images.damage import damage
from fgvc.images.decode import Picture, read_content, read_picture
from fgvc.images.upright import UPRIGHT, turned_sides
from fgvc.io.names import some

MOST = 0.95  # share of the images by which a set is judged
DARK, LIGHT = 31, 240  # levels of 255, which all but a thousandth of the pixels are below, or above
DARK_DEEP = 63  # the same of pictures with more than 8 bits, where it means that the upper two are never used
FLAT = 16  # levels between the darkest and the lightest thousandth
MARGIN = 0.02  # of a picture's side, or two pixels, that a box may reach beyond it
SAMPLE = 32  # images that training looks at

MapBoxes = tuple[bool, str]  # whether it is an error, and what it is


@dataclass(slots=True)
class StoredFacts:
    """What reading N images told of their files; of those that can't be read 0, NaN or ""."""

    sides: NDArray[np.int32]  # (N,2) width and height, as stored
    orientation: NDArray[np.int8]  # (N,) EXIF's
    mode: list[str]  # (N,) in Pillow's words
    bits: NDArray[np.int8]  # (N,) of a value
    extremes: NDArray[np.float64]  # (N,2) smallest and largest value, where they have more than 8 bits and one channel
    levels: NDArray[np.int16]  # (N,2) of 255, decoded: all but a thousandth of the pixels lie between
    damage: dict[int, str] = field(default_factory=dict)  # row: what

    @classmethod
    def empty(cls, images: int) -> StoredFacts:
        return cls(
            np.zeros((images, 2), np.int32), np.ones(images, np.int8), [""] * images, np.zeros(images, np.int8),
            np.full((images, 2), np.nan), np.zeros((images, 2), np.int16),
        )  # fmt: skip

    def put(self, row: int, picture: Picture, levels: tuple[int, int], broken: str) -> None:
        self.sides[row], self.orientation[row], self.mode[row] = picture.stored, picture.orientation, picture.mode
        self.bits[row], self.levels[row] = picture.bits, levels
        if picture.extremes is not None:
            self.extremes[row] = picture.extremes
        if broken:
            self.damage[row] = broken


def levels_of(picture: Picture) -> tuple[int, int]:
    """Levels of 255 that all but a thousandth of the values of all channels are not below, and not above."""
    counts = np.asarray(picture.image.histogram()).reshape(3, 256).sum(axis=0)
    low, high = np.searchsorted(counts.cumsum(), (0.001 * counts.sum(), 0.999 * counts.sum()))
    return int(low), int(high)


def glance(index: ImageIndex, rows: NDArray[np.int64]) -> list[str]:
    """What is wrong with a few of these images, spread over all, a line each: what can be known before they are trained on.
    `fgvc data check` looks at all."""
    few = rows[np.linspace(0, len(rows) - 1, min(SAMPLE, len(rows))).astype(np.int64)]
    part = StoredFacts.empty(len(few))

    def look(at: int) -> None:
        path = index.path(int(few[at]))
        try:
            content = read_content(path)
            picture = read_picture(content, max_pixels=index.max_pixels, name=path)
        except ImageError:
            return  # counted, and reported, where it is trained on
        part.put(at, picture, levels_of(picture), damage(content))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(look, range(len(few))))
    seen = _rows(index, few)
    found = [text for _, text in judge(seen, part)]
    return [f"of {len(few)} images looked at: {text} (fgvc data check looks at all)" for text in found]


def _rows(index: ImageIndex, rows: NDArray[np.int64]) -> ImageIndex:
    """A part of the set, for those who need paths, boxes and parts alone."""
    return ImageIndex(
        root=index.root, classes=index.classes, paths=index.paths[rows], labels=index.labels[rows],
        splits=index.splits[rows], boxes=None if index.boxes is None else index.boxes[rows],
        parts=None if index.parts is None else index.parts[rows], part_names=index.part_names,
    )  # fmt: skip


def judge(index: ImageIndex, stored: StoredFacts) -> Iterator[MapBoxes]:
    """All that is wrong, of the rows that could be read."""
    if stored.damage:
        listed = some([f"{index.paths[row]} ({what})" for row, what in sorted(stored.damage.items())])
        yield False, f"{len(stored.damage)} images are damaged, though they can be decoded: {listed}"
    yield from _ranges(stored)
    yield from _boxes(index, stored)


def _ranges(stored: StoredFacts) -> Iterator[MapBoxes]:
    """Sets that are decoded to black, to white, or to one colour."""
    read = stored.bits > 0
    told = np.zeros(len(read), bool)
    deep = read & (stored.bits > 8)
    for mode, bits in sorted({(stored.mode[row], int(stored.bits[row])) for row in np.flatnonzero(deep)}):
        rows = deep & (stored.bits == bits) & np.array([one == mode for one in stored.mode])
        for spoilt, error, text in _floats(stored, rows) if mode == "F" else _integers(stored, rows, mode, bits):
            told |= spoilt
            yield error, text
    rest = read & ~told
    if 2 * rest.sum() <= read.sum() or not rest.any():
        return
    low, high = stored.levels[rest].T
    limit = np.where(stored.bits[rest] > 8, DARK_DEEP, DARK)
    how = ", ".join(sorted({_words(stored.mode[row], int(stored.bits[row])) for row in np.flatnonzero(rest)}))
    where = f"of {int(rest.sum())} images, stored as {how}"
    cause = "values of another range, such as 12 bits in 16, or a faulty conversion? Save them again, all by one factor"
    if np.mean(high <= limit) >= MOST:
        yield True, f"{np.mean(high <= limit):.0%} {where}, are all but black (no lighter than {high.max()} of 255): {cause}"
    elif np.mean(low >= LIGHT) >= MOST:
        yield True, f"{np.mean(low >= LIGHT):.0%} {where}, are all but white (no darker than {low.min()} of 255): {cause}"
    elif np.mean(high - low <= FLAT) >= 0.5:
        yield True, f"{np.mean(high - low <= FLAT):.0%} {where}, are of nearly one colour and show nothing: {cause}"


def _words(mode: str, bits: int) -> str:
    return f"{mode} with {bits} bits a value" if bits > 8 else mode


def _integers(
    stored: StoredFacts, rows: NDArray[np.bool_], mode: str, bits: int
) -> Iterator[tuple[NDArray[np.bool_], bool, str]]:
    """Of 12 bits, 16, or 32, which are read as 16: (rows that it spoils, whether it is an error, what)."""
    full = 4095 if bits == 12 else 65535
    low, high = stored.extremes[:, 0], stored.extremes[:, 1]
    known = rows & np.isfinite(high)
    if not known.any():
        return
    span = f"{low[known].min():.6g} to {high[known].max():.6g}"
    kind = f"{int(known.sum())} images hold integers of {bits} bits ({mode}), {span}, and are read as 0 to {full}"
    beyond = known & ((high > full) | (low < 0))
    if beyond.any():
        many = bool(beyond.sum() > (1 - MOST) * known.sum())
        yield beyond, many, f"{kind}: what is beyond is cut off in {beyond.sum()} of them"
    dark = known & ~beyond & (stored.levels[:, 1] <= DARK_DEEP)
    if dark.sum() >= MOST * (known & ~beyond).sum() > 0:
        used = max(8, int(np.ceil(np.log2(high[dark].max() + 1))))
        advice = "save them with 8 bits" if used == 8 else f"multiply all values by {2 ** max(0, 16 - used)}, or save 8 bits"
        yield (
            dark, True,
            f"{kind}: all but black to the network (no lighter than {int(stored.levels[dark, 1].max())} of 255). If they use "
            f"{used} bits, {advice}: all images by one factor",
        )  # fmt: skip


def _floats(stored: StoredFacts, rows: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], bool, str]]:
    low, high = stored.extremes[:, 0], stored.extremes[:, 1]
    kind = f"{int(rows.sum())} images hold floats (F), {low[rows].min():.6g} to {high[rows].max():.6g}"
    rule = "read as shares of white where an image has none above 1, else as 0 to 255"
    beyond = rows & ((high > 255) | (low < 0))
    if beyond.any():
        yield (
            beyond, bool(beyond.sum() > (1 - MOST) * rows.sum()),
            f"{kind}, {rule}: what is beyond is cut off in {beyond.sum()} of them. Save them as 0 to 1, all by one factor",
        )  # fmt: skip
    shares = rows & (high <= 1)
    if shares.any() and (rows & ~shares & ~beyond).any():
        yield shares, False, f"{kind}, {rule}: {shares.sum()} are shares of white, the others are not. Save all as 0 to 1"


def _boxes(index: ImageIndex, stored: StoredFacts) -> Iterator[MapBoxes]:
    read = np.flatnonzero(stored.bits > 0)
    if not len(read):
        return
    sides = stored.sides[read].astype(np.float64)
    if index.boxes is not None:
        if in_shares(index.boxes):
            yield True, SHARES
            return
        boxes = index.boxes[read].astype(np.float64)
        outside, beyond = _misfits(boxes, sides)
        turned = stored.orientation[read] != UPRIGHT
        upright = np.array([turned_sides((w, h), o) for (w, h), o in zip(sides, stored.orientation[read], strict=True)])
        fit = (outside | beyond) & turned & ~np.logical_or(*_misfits(boxes, upright))
        named = _namer(index, read, stored)
        if outside.any():
            yield True, f"{outside.sum()} boxes lie outside of their image, or are empty; they count as unknown: {named(outside)}"
        if beyond.any():
            yield False, f"{beyond.sum()} boxes reach beyond their image; they are cut at its border: {named(beyond)}"
        if fit.any():
            yield True, (
                f"{fit.sum()} boxes fit their image as EXIF turns it, and not as it is stored, which is what boxes are in pixels "
                f"of: save these images upright: {named(fit)}"
            )
        elif turned.any():
            yield False, (
                f"{turned.sum()} images are turned by their EXIF orientation, and their boxes{_and_parts(index)} with them: "
                "these are taken to be in pixels of the image as it is stored, not as viewers show it"
            )
    if index.parts is not None and in_shares(index.parts[index.parts[..., 2] > 0][:, :2]):
        yield True, "all parts lie within a pixel: are they shares of the image's sides? part_locs.txt holds pixels, too"
    elif index.parts is not None:
        parts = index.parts[read].astype(np.float64)
        away = (parts[..., 2] > 0) & ((parts[..., :2] < -2) | (parts[..., :2] > sides[:, None] + 2)).any(axis=-1)
        if away.any():
            which: NDArray[np.bool_] = np.any(away, axis=1)
            yield False, f"{which.sum()} images have parts outside: {_namer(index, read, stored)(which)}"


def _and_parts(index: ImageIndex) -> str:
    return "" if index.parts is None else " and parts"


def _namer(
    index: ImageIndex, read: NDArray[np.int64], stored: StoredFacts
) -> Callable[[NDArray[np.bool_]], str]:
    """What names the rows of a mask over `read`, with their boxes and sides."""

    def named(which: NDArray[np.bool_]) -> str:
        rows: Sequence[int] = read[which].tolist()
        texts = []
        for row in rows[:6]:
            box = "" if index.boxes is None else "box " + " ".join(f"{side:g}" for side in index.boxes[row]) + " of "
            texts.append(f"{index.paths[row]} ({box}{stored.sides[row, 0]} x {stored.sides[row, 1]})")
        return some([*texts, *rows[6:]])

    return named


def _misfits(boxes: NDArray[np.float64], sides: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) of boxes (N,4) in pictures of `sides` (N,2): which have no area in it, and which of the others reach beyond it."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    outside = (np.minimum(high, sides) <= np.maximum(low, 0)).any(axis=1)
    margin = np.maximum(2, MARGIN * sides)
    beyond = ((low < -margin) | (high > sides + margin)).any(axis=1) & ~outside
    return np.asarray(outside), np.asarray(beyond)


SHARES = (
    "all boxes are smaller than a pixel: are they shares of the image's sides? bounding_boxes.txt holds left, top, width and "
    "height in pixels of the image as it is stored"
)


def in_shares(places: NDArray[np.float32]) -> bool:
    """Whether boxes or points look like shares of the image's sides."""
    return bool(np.isfinite(places).any()) and bool(np.nanmax(places) <= 1.01)


def misplaced(index: ImageIndex, stored: StoredFacts) -> dict[int, str]:
    """Rows whose box does not fit their image, and how."""
    read = np.flatnonzero(stored.bits > 0)
    if index.boxes is None or not len(read):
        return {}
    outside, beyond = _misfits(index.boxes[read].astype(np.float64), stored.sides[read].astype(np.float64))
    what = {int(row): "outside, or empty" for row in read[outside]} | {int(row): "cut at the border" for row in read[beyond]}
    return {
        row: f"{text}: {' '.join(f'{side:g}' for side in index.boxes[row])} of {' x '.join(map(str, stored.sides[row]))}"
        for row, text in sorted(what.items())
    }


def refuse_shares(index: ImageIndex) -> None:
    """Raise FgvcError where no box could be used."""
    if index.boxes is not None and in_shares(index.boxes):
        raise FgvcError(f"{index.root}: {SHARES}")
