"""Checks of how files store pictures and boxes: unused bits, values out of range, damaged data, boxes outside of images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fgvc.data.index import ImageIndex, spread
from fgvc.errors import FgvcError, ImageError
from fgvc.images.damage import damage
from fgvc.images.decode import Picture
from fgvc.images.upright import UPRIGHT, turned_sides
from fgvc.io.names import some

MOST = 0.95  # share of the images from which a fault is one of the set
DARK, LIGHT = 31, 240  # levels of 255 that all but a thousandth of the pixels are below, or above
DARK_DEEP = 63  # as DARK, of pictures with more than 8 bits: their upper two bits are never used
FLAT = 16  # levels between the darkest and the lightest thousandth
MARGIN = 0.02  # of a picture's side, or two pixels, that a box may reach beyond it
SAMPLE = 32  # images that are checked before training

Fault = tuple[bool, str]  # whether it is an error (else a warning), and the message


@dataclass(slots=True)
class StoredFacts:
    """Facts of how N images are stored; 0, NaN or "" for unreadable ones."""

    sides: NDArray[np.int32]  # (N,2) width and height, as stored
    orientation: NDArray[np.int8]  # (N,) EXIF's
    mode: list[str]  # (N,) in Pillow's words
    bits: NDArray[np.int8]  # (N,) of a value
    extremes: NDArray[np.float64]  # (N,2) smallest and largest value, where they have more than 8 bits and one channel
    levels: NDArray[np.int16]  # (N,2) of 255, decoded: all but a thousandth of the pixels lie between
    damage: dict[int, str] = field(default_factory=dict)  # row -> description

    @classmethod
    def empty(cls, images: int) -> StoredFacts:
        return cls(
            np.zeros((images, 2), np.int32), np.ones(images, np.int8), [""] * images, np.zeros(images, np.int8),
            np.full((images, 2), np.nan), np.zeros((images, 2), np.int16),
        )  # fmt: skip

    def put(self, row: int, picture: Picture, levels: tuple[int, int], damage: str) -> None:
        self.sides[row], self.orientation[row], self.mode[row] = picture.stored, picture.orientation, picture.mode
        self.bits[row], self.levels[row] = picture.bits, levels
        if picture.extremes is not None:
            self.extremes[row] = picture.extremes
        if damage:
            self.damage[row] = damage


def levels_of(picture: Picture) -> tuple[int, int]:
    """The 0.1 and 99.9 percentiles of the values of all channels, in levels of 255."""
    counts = np.asarray(picture.image.histogram()).reshape(3, 256).sum(axis=0)
    low, high = np.searchsorted(counts.cumsum(), (0.001 * counts.sum(), 0.999 * counts.sum()))
    return int(low), int(high)


def spot_check(index: ImageIndex, rows: NDArray[np.int64]) -> list[str]:
    """Faults of a sample of these images, a line each, as a check before training; `fgvc data check` looks at all."""
    sample = spread(rows, SAMPLE)
    facts = StoredFacts.empty(len(sample))

    def look(at: int) -> None:
        row = int(sample[at])
        try:
            content = index.content(row)
            picture = index.picture(row, content)
        except ImageError:
            return  # training counts and reports it
        facts.put(at, picture, levels_of(picture), damage(content))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(look, range(len(sample))))
    faults = judge(_subset(index, sample), facts)
    return [f"of {len(sample)} images looked at: {text} (fgvc data check looks at all)" for _, text in faults]


def _subset(index: ImageIndex, rows: NDArray[np.int64]) -> ImageIndex:
    """Some rows of an index, with paths, labels, splits, boxes and parts."""
    return ImageIndex(
        root=index.root, classes=index.classes, paths=index.paths[rows], labels=index.labels[rows],
        splits=index.splits[rows], boxes=None if index.boxes is None else index.boxes[rows],
        parts=None if index.parts is None else index.parts[rows], part_names=index.part_names,
    )  # fmt: skip


def judge(index: ImageIndex, stored: StoredFacts) -> Iterator[Fault]:
    """The faults of the readable rows."""
    if stored.damage:
        listed = some([f"{index.paths[row]} ({text})" for row, text in sorted(stored.damage.items())])
        yield False, f"{len(stored.damage)} images are damaged, though they can be decoded: {listed}"
    yield from _ranges(stored)
    yield from _boxes(index, stored)


def _ranges(stored: StoredFacts) -> Iterator[Fault]:
    """Faults of values: images that are decoded to black, to white, or to one colour."""
    read = stored.bits > 0
    reported = np.zeros(len(read), bool)
    deep = read & (stored.bits > 8)
    for mode, bits in sorted({(stored.mode[row], int(stored.bits[row])) for row in np.flatnonzero(deep)}):
        rows = deep & (stored.bits == bits) & np.array([row_mode == mode for row_mode in stored.mode])
        for spoilt, error, text in _floats(stored, rows) if mode == "F" else _integers(stored, rows, mode, bits):
            reported |= spoilt
            yield error, text
    rest = read & ~reported
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
    """Faults of integers of 12, 16, or 32 bits (read as 16): (spoilt rows (N,), whether it is an error, message)."""
    full = 4095 if bits == 12 else 65535
    low, high = stored.extremes[:, 0], stored.extremes[:, 1]
    finite = rows & np.isfinite(high)
    if not finite.any():
        return
    span = f"{low[finite].min():.6g} to {high[finite].max():.6g}"
    kind = f"{int(finite.sum())} images hold integers of {bits} bits ({mode}), {span}, and are read as 0 to {full}"
    beyond = finite & ((high > full) | (low < 0))
    if beyond.any():
        many = bool(beyond.sum() > (1 - MOST) * finite.sum())
        yield beyond, many, f"{kind}: what is beyond is cut off in {beyond.sum()} of them"
    dark = finite & ~beyond & (stored.levels[:, 1] <= DARK_DEEP)
    if dark.sum() >= MOST * (finite & ~beyond).sum() > 0:
        used = max(8, int(np.ceil(np.log2(high[dark].max() + 1))))
        advice = "save them with 8 bits" if used == 8 else f"multiply all values by {2 ** max(0, 16 - used)}, or save 8 bits"
        yield (
            dark, True,
            f"{kind}: all but black to the network (no lighter than {int(stored.levels[dark, 1].max())} of 255). If they use "
            f"{used} bits, {advice}: all images by one factor",
        )  # fmt: skip


def _floats(stored: StoredFacts, rows: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], bool, str]]:
    """Faults of floats, as of `_integers`."""
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


def _boxes(index: ImageIndex, stored: StoredFacts) -> Iterator[Fault]:
    """Faults of boxes and parts: in other units, outside of their image, or in pixels of the turned image."""
    read = np.flatnonzero(stored.bits > 0)
    if not len(read):
        return
    sides = stored.sides[read].astype(np.float64)
    if index.boxes is not None:
        if in_shares(index.boxes):
            yield True, SHARES
            return
        boxes = index.corners(read)
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
            images: NDArray[np.bool_] = np.any(away, axis=1)
            yield False, f"{images.sum()} images have parts outside: {_namer(index, read, stored)(images)}"


def _and_parts(index: ImageIndex) -> str:
    return "" if index.parts is None else " and parts"


def _namer(
    index: ImageIndex, read: NDArray[np.int64], stored: StoredFacts
) -> Callable[[NDArray[np.bool_]], str]:
    """A function that lists the rows of a mask over `read`, with their boxes and sides."""

    def named(mask: NDArray[np.bool_]) -> str:
        rows: Sequence[int] = read[mask].tolist()
        texts = []
        for row in rows[:6]:
            box = "" if index.boxes is None else "box " + " ".join(f"{side:g}" for side in index.boxes[row]) + " of "
            texts.append(f"{index.paths[row]} ({box}{stored.sides[row, 0]} x {stored.sides[row, 1]})")
        return some([*texts, *rows[6:]])

    return named


def _misfits(boxes: NDArray[np.float64], sides: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Masks (N,) of the boxes (N,4) without area in their picture of `sides` (N,2), and of the others that reach beyond it."""
    low, high = boxes[:, :2], boxes[:, 2:]
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
    """Rows whose box does not fit their image -> description."""
    read = np.flatnonzero(stored.bits > 0)
    if index.boxes is None or not len(read):
        return {}
    outside, beyond = _misfits(index.corners(read), stored.sides[read].astype(np.float64))
    faults = {int(row): "outside, or empty" for row in read[outside]} | {int(row): "cut at the border" for row in read[beyond]}
    return {
        row: f"{text}: {' '.join(f'{side:g}' for side in index.boxes[row])} of {' x '.join(map(str, stored.sides[row]))}"
        for row, text in sorted(faults.items())
    }


def refuse_shares(index: ImageIndex) -> None:
    """Raise FgvcError if the boxes look like shares of the image's sides."""
    if index.boxes is not None and in_shares(index.boxes):
        raise FgvcError(f"{index.root}: {SHARES}")
