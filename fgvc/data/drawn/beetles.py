"""The demonstration set: drawn beetles in CUB layout, whose classes differ only in three small parts.

A class is a combination of three traits: the head (a horn, or a stag's two jaws), the marks on the wings (spots or bars) and the
band on the wings (behind the neck, or at their tip). All else - pose, articulation, size, place, colours, light, background,
clutter, foreground - is drawn independently of the class: the same key with another trait gives the same picture except for that
part. Frozen, so that results stay comparable: a change of the drawing needs a new VERSION (tests/data/test_demo.py holds the
pictures' hashes).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fgvc.data.drawn.scenery import FINE, Colour, Point, background, expose, fill, foreground, hsv, mix
from fgvc.errors import FgvcError
from fgvc.rng import DEMO, generator

VERSION = 1
TRAITS = (("Rhino", "Stag"), ("Spotted", "Barred"), ("Collared", "Tipped"))
PARTS = ("horn", "head", "collar", "left wing", "right wing", "tip")
CUB_FILES = (
    "classes.txt",
    "images.txt",
    "image_class_labels.txt",
    "train_test_split.txt",
    "bounding_boxes.txt",
    "parts/parts.txt",
    "parts/part_locs.txt",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """A drawn picture with its annotations."""

    image: Image.Image  # RGB
    box: tuple[float, float, float, float]  # x, y, width, height in pixels, clipped to the image
    parts: tuple[tuple[float, float, int], ...]  # x, y, visible; one per name in PARTS


def draw_demo(
    root: Path,
    *,
    classes: int = 8,
    train_per_class: int = 60,
    test_per_class: int = 60,
    size: tuple[int, int] = (200, 160),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Draw the set into a new folder `root`, which appears only when it is complete.

    A picture depends on its (seed, split, class, number) and nothing else. `progress(done, total)` is called per image.
    Raises FgvcError when `root` holds something already.
    """
    if not 2 <= classes <= 8:
        raise FgvcError(f"the demonstration set has 2 to 8 classes, not {classes}")
    if min(train_per_class, test_per_class) < 1:
        raise FgvcError("the demonstration set needs at least one image per class for training and for testing")
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise FgvcError(f"{root}: is there already; name a new or an empty folder for the demonstration set")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        folder = Path(unfinished) / "set"
        _draw_into(folder, classes, (train_per_class, test_per_class), size, seed, progress)
        if root.exists():
            root.rmdir()
        folder.rename(root)


def _draw_into(
    folder: Path,
    classes: int,
    counts: tuple[int, int],
    size: tuple[int, int],
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    tables: dict[str, list[str]] = {name: [] for name in CUB_FILES}
    tables["parts/parts.txt"] = [f"{p} {name}" for p, name in enumerate(PARTS, 1)]
    number, total = 0, classes * sum(counts)
    for label in range(classes):
        words = "_".join(pair[trait] for pair, trait in zip(TRAITS, traits_of(label), strict=True))
        name = f"{label + 1:03d}.{words}"
        tables["classes.txt"].append(f"{label + 1} {name}")
        (folder / "images" / name).mkdir(parents=True)
        for split, j in [(0, j) for j in range(counts[0])] + [(1, j) for j in range(counts[1])]:
            number += 1
            file = f"{name}/{words}_{number:04d}.jpg"
            specimen = draw_specimen((seed, split, label, j), traits_of(label), size)
            specimen.image.save(folder / "images" / file, quality=92, subsampling=0)
            tables["images.txt"].append(f"{number} {file}")
            tables["image_class_labels.txt"].append(f"{number} {label + 1}")
            tables["train_test_split.txt"].append(f"{number} {1 - split}")
            tables["bounding_boxes.txt"].append(" ".join(map(str, (number, *specimen.box))))
            tables["parts/part_locs.txt"] += [
                f"{number} {p} {x} {y} {v}" for p, (x, y, v) in enumerate(specimen.parts, 1)
            ]
            if progress:
                progress(number, total)
    (folder / "parts").mkdir()
    for table, lines in tables.items():
        (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def traits_of(label: int) -> tuple[int, int, int]:
    """The index of a class's word in each of TRAITS: the bits of its number, the first trait highest."""
    return label >> 2 & 1, label >> 1 & 1, label & 1


def draw_specimen(key: Sequence[int], traits: tuple[int, int, int], size: tuple[int, int] = (200, 160)) -> Specimen:
    """Draw one beetle. `size` is the mean (width, height): sides vary by a tenth, one picture in four stands upright.

    The random numbers depend on `key` alone, and as many are taken whatever the traits.
    """
    rng = generator(DEMO, *key)
    width, height = (round(side * rng.uniform(0.9, 1.1)) for side in size)
    if rng.random() < 0.25:
        width, height = height, width
    light = rng.uniform(0, 2 * math.pi)
    canvas = background(rng, width, height)
    pen = _Pen(canvas, _pose(rng, width, height), (math.cos(light), math.sin(light)))
    body = _beetle(rng, pen, traits)
    front = foreground(rng, canvas, [body[0], pen.place(-0.2, 0), body[2]])  # horn, marks, collar
    across, down = zip(*pen.points, strict=True)
    x0, x1 = max(0.0, min(across) / FINE), min(float(width), max(across) / FINE)
    y0, y1 = max(0.0, min(down) / FINE), min(float(height), max(down) / FINE)
    parts = tuple(
        (round(x / FINE, 1), round(y / FINE, 1), 1) if _visible(front, x, y) else (0.0, 0.0, 0) for x, y in body
    )
    box = (round(x0, 1), round(y0, 1), round(x1 - x0, 1), round(y1 - y0, 1))
    return Specimen(image=expose(rng, canvas.reduce(FINE)), box=box, parts=parts)


def _visible(front: Image.Image, x: float, y: float) -> bool:
    inside = 0 <= x < front.width and 0 <= y < front.height
    return inside and front.getpixel((int(x), int(y))) == 0


class _Pen:
    """Draws in body coordinates: u towards the head, v to the left, the body is 1 long; records the points it drew."""

    def __init__(self, canvas: Image.Image, place: Callable[[float, float], Point], light: Point) -> None:
        self.draw, self.place, self.light = ImageDraw.Draw(canvas), place, light
        self.canvas = canvas
        self.points: list[Point] = []
        (x0, y0), (x1, y1) = place(0, 0), place(-0.5, 0)
        self.unit = 2 * math.hypot(x1 - x0, y1 - y0)  # canvas pixels per body length

    def shape(self, points: Sequence[Point], colour: Colour) -> list[Point]:
        placed = [self.place(u, v) for u, v in points]
        self.points += placed
        fill(self.draw, placed, colour)
        return placed

    def disc(self, u: float, v: float, radius: float, colour: Colour) -> None:
        turn = [2 * math.pi * k / 20 for k in range(20)]
        self.shape([(u + radius * math.cos(a), v + radius * math.sin(a)) for a in turn], colour)

    def limb(self, points: Sequence[Point], widths: Sequence[float], colour: Colour) -> None:
        """Draw a tapering stroke along a line, lighter along its middle."""
        for share, tone in ((1.0, colour), (0.4, mix(colour, (255, 255, 255), 0.25))):
            for (a, b), (wa, wb) in zip(pairwise(points), pairwise(widths), strict=True):
                du, dv = b[0] - a[0], b[1] - a[1]
                n = math.hypot(du, dv) or 1.0
                du, dv = du / n * share / 2, dv / n * share / 2
                quad = [
                    (a[0] - dv * wa, a[1] + du * wa),
                    (b[0] - dv * wb, b[1] + du * wb),
                    (b[0] + dv * wb, b[1] - du * wb),
                    (a[0] + dv * wa, a[1] - du * wa),
                ]
                self.shape(quad, tone)
                self.disc(b[0], b[1], wb * share / 2, tone)

    def dome(self, points: Sequence[Point], colour: Colour, shine: float) -> None:
        """Draw a vaulted plate as ever smaller and lighter copies, shifted towards the light."""
        outline = self.shape(points, mix(colour, (0, 0, 0), 0.55))
        cx, cy = (sum(axis) / len(outline) for axis in zip(*outline, strict=True))
        for k in range(10):
            small, shift = 0.96 - 0.088 * k, 0.016 * k * self.unit
            ring = [
                (
                    cx + (x - cx) * small - self.light[0] * shift * 0.4,
                    cy + (y - cy) * small - self.light[1] * shift * 0.4,
                )
                for x, y in outline
            ]
            tone = mix(mix(colour, (0, 0, 0), 0.3), colour, min(1.0, k / 5))
            fill(self.draw, ring, mix(tone, (255, 255, 255), max(0.0, shine * (k - 4) / 6)))


def _beetle(rng: np.random.Generator, pen: _Pen, traits: tuple[int, int, int]) -> list[Point]:
    """Draw the animal; returns the places of its PARTS on the canvas."""
    hue, pale = rng.random(), bool(rng.random() < 0.5)
    wing = hsv(hue, rng.uniform(0.45, 0.95), rng.uniform(0.45, 0.9))
    shield = hsv(
        hue + rng.choice([0.0, 0.08, 0.5]) + rng.uniform(-0.03, 0.03), rng.uniform(0.3, 0.9), rng.uniform(0.2, 0.6)
    )
    leg = hsv(rng.uniform(0.02, 0.12), rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.45))
    spot = hsv(rng.uniform(0.08, 0.17), 0.35, 0.97) if pale else hsv(hue, 0.6, 0.12)
    ivory = hsv(rng.uniform(0.06, 0.14), rng.uniform(0.2, 0.6), rng.uniform(0.7, 0.95))
    shine = rng.uniform(0.2, 0.6)
    plump, slim = rng.uniform(0.2, 0.25), rng.uniform(2.1, 2.8)
    _shadow(pen)
    for side in (1, -1):
        _legs(rng, pen, side, leg)
    for side in (1, -1):
        _antenna(rng, pen, side, leg)
    horn = _horn(rng, pen, traits[0], ivory)
    pen.dome(_oval(0.38, 0.085, 0.105, 2.2), mix(shield, (0, 0, 0), 0.35), shine)
    for side in (1, -1):
        pen.disc(0.41, side * 0.085, 0.034, (22, 18, 20))
        pen.disc(0.418, side * 0.088, 0.011, (225, 225, 225))
    pen.dome(_oval(-0.19, 0.34, plump, slim), wing, shine)
    collar, tip = _band(
        rng, pen, traits[2], spot, lambda u: 0.97 * plump * max(0.0, 1 - abs((u + 0.19) / 0.34) ** slim) ** (1 / slim)
    )
    pen.dome(_oval(0.22, 0.125, plump * 0.82, 2.8), shield, shine)
    pen.limb([(0.12, 0), (-0.5, 0)], [0.014, 0.008], mix(wing, (0, 0, 0), 0.6))
    wings = [_marks(rng, pen, side, traits[1], spot, plump) for side in (1, -1)]
    return [horn, pen.place(0.4, 0), collar, *wings, tip]


def _antenna(rng: np.random.Generator, pen: _Pen, side: int, colour: Colour) -> None:
    heading, curl = side * rng.uniform(0.8, 1.3), side * rng.uniform(-0.15, 0.16)
    u, v, line = 0.42, side * 0.07, []
    for _ in range(7):
        line.append((u, v))
        u, v, heading = u + 0.04 * math.cos(heading), v + 0.04 * math.sin(heading), heading + curl
    pen.limb(line, [0.022] * 4 + [0.016] * 3, colour)
    pen.disc(u, v, 0.025, colour)


def _horn(rng: np.random.Generator, pen: _Pen, jaws: int, colour: Colour) -> Point:
    size, sway = rng.uniform(0.9, 1.1), rng.uniform(-0.1, 0.1)
    if jaws:
        for side in (1, -1):
            arc = [(0.44, 0.05), (0.52, 0.2), (0.64, 0.25), (0.78, 0.15)]
            line = [(0.44 + (u - 0.44) * size, side * v * size + sway * (u - 0.44)) for u, v in arc]
            pen.limb(line, [0.09, 0.09, 0.075, 0.025], colour)
            pen.limb([line[1], (line[1][0] + 0.04, line[1][1] - side * 0.08)], [0.045, 0.02], colour)
    else:
        line = [(0.44 + u * size, sway * u) for u in (0.0, 0.12, 0.24, 0.35)]
        pen.limb(line, [0.17, 0.13, 0.09, 0.025], colour)
    return pen.place(0.6, 0)


def _marks(rng: np.random.Generator, pen: _Pen, side: int, bars: int, colour: Colour, plump: float) -> Point:
    size, middle = rng.uniform(0.9, 1.15), plump * 0.5
    edge = mix(colour, (60, 40, 30), 0.5)
    for u, (du, dv) in zip((-0.06, -0.19, -0.32), rng.uniform(-0.012, 0.012, (3, 2)).tolist(), strict=True):
        at, v, reach = u + du, side * middle + dv, 0.045 * size
        if bars:
            ends = [(at - 0.02, v - side * 0.06), (at + 0.02, v + side * 0.05)]
            pen.limb(ends, [reach, reach], edge)
            pen.limb(ends, [reach * 0.8] * 2, colour)
        else:
            pen.disc(at, v, reach * 1.12, edge)
            pen.disc(at, v, reach, colour)
    return pen.place(-0.2, side * middle)


def _band(
    rng: np.random.Generator, pen: _Pen, tipped: int, colour: Colour, wing: Callable[[float], float]
) -> tuple[Point, Point]:
    """Draw a stripe across both wings; returns its two possible places, in front and at the tip."""
    wide = 0.065 * rng.uniform(0.9, 1.15)
    middle = -0.46 if tipped else 0.075
    steps = [middle + wide * (k / 4 - 1) for k in range(9)]
    pen.shape([(u, wing(u)) for u in steps] + [(u, -wing(u)) for u in reversed(steps)], colour)
    return pen.place(0.075, 0), pen.place(-0.455, 0)


def _legs(rng: np.random.Generator, pen: _Pen, side: int, colour: Colour) -> None:
    for hip, ahead, knee in ((0.24, 0.75, 0.6), (0.08, 1.6, -0.35), (-0.02, 2.15, -0.45)):
        a = side * (ahead + rng.uniform(-0.2, 0.2))
        b = a + side * (-knee + rng.uniform(-0.35, 0.35))
        c = b + side * rng.uniform(-0.5, 0.5)
        u, v = hip, side * 0.13
        line = [(u, v)]
        for heading, length in ((a, 0.2), (b, 0.17), (c, 0.08)):
            u, v = u + length * math.cos(heading), v + length * math.sin(heading)
            line.append((u, v))
        pen.limb(line, [0.05, 0.036, 0.022, 0.014], colour)


def _shadow(pen: _Pen) -> None:
    """Draw a soft shadow on the ground, away from the light."""
    w, h = pen.canvas.width // FINE, pen.canvas.height // FINE
    mask = Image.new("L", (w, h))
    shift = 0.07 * pen.unit
    outline = [pen.place(u, v) for u, v in _oval(-0.05, 0.5, 0.25, 2.2)]
    fill(
        ImageDraw.Draw(mask),
        [((x + pen.light[0] * shift) / FINE, (y + pen.light[1] * shift) / FINE) for x, y in outline],
        130,
    )
    mask = mask.filter(ImageFilter.GaussianBlur(5)).resize(pen.canvas.size, Image.Resampling.BILINEAR)
    pen.canvas.paste((8, 8, 14), (0, 0), mask)


def _pose(rng: np.random.Generator, width: int, height: int) -> Callable[[float, float], Point]:
    """A random map from body to canvas coordinates: bend of neck and abdomen, tilt, mirror, turn, size and place."""
    short = min(width, height) * FINE
    scale = short * rng.uniform(0.54, 0.65)
    turn, mirror, tilt = rng.uniform(-0.75, 0.75) - math.pi / 2, rng.choice([-1.0, 1.0]), rng.uniform(0.82, 1.0)
    neck, waist = rng.uniform(-0.3, 0.3), rng.uniform(-0.12, 0.12)
    x0 = width * FINE / 2 + short * rng.uniform(-0.09, 0.09)
    y0 = height * FINE / 2 + short * rng.uniform(-0.09, 0.09)
    cos, sin = math.cos(turn), math.sin(turn)

    def place(u: float, v: float) -> Point:
        bend = neck * min(1.0, max(0.0, (u - 0.1) / 0.3)) + waist * min(0.0, u)
        u, v = u * math.cos(bend) - v * math.sin(bend), u * math.sin(bend) + v * math.cos(bend)
        u, v = (u - 0.2) * scale, v * tilt * mirror * scale
        return x0 + u * cos - v * sin, y0 + u * sin + v * cos

    return place


def _oval(u: float, half_length: float, half_width: float, power: float) -> list[Point]:
    """A superellipse around (u, 0): power 2 is an ellipse, more is boxier."""
    turn = [2 * math.pi * k / 48 for k in range(48)]

    def bulge(x: float) -> float:
        return math.copysign(abs(x) ** (2 / power), x)

    return [(u + half_length * bulge(math.cos(a)), half_width * bulge(math.sin(a))) for a in turn]
