"""Backgrounds of the demonstration set: ground, leaves, twigs, grass and light, all drawn from random numbers.

Pictures are drawn FINE times larger and then reduced. Only whole coordinates and 8-bit images are used, so that the
same numbers give the same picture everywhere.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

FINE = 3  # canvas pixels per image pixel and side

Point = tuple[float, float]
Colour = tuple[int, int, int]
GROUNDS = (
    (0.25, 0.45, 0.45),
    (0.31, 0.4, 0.35),
    (0.1, 0.4, 0.6),
    (0.07, 0.45, 0.4),
    (0.12, 0.2, 0.75),
    (0.58, 0.12, 0.55),
)


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw soft ground in two colours, out-of-focus leaves, then leaves, twigs and seeds in focus; (FINE W, FINE H)."""
    hue, saturation, value = GROUNDS[rng.integers(len(GROUNDS))]
    near = hsv(hue + rng.uniform(-0.04, 0.04), saturation, value)
    far = hsv(hue + rng.uniform(-0.12, 0.12), saturation * rng.uniform(0.5, 1.3), value * rng.uniform(0.5, 0.85))
    cloud = Image.new("L", (width, height))
    for cells, weight in ((4, 0.5), (9, 0.35), (40, 0.25)):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
        cloud = ImageChops.add(cloud, smooth.point([round(weight * x) for x in range(256)]))
    ground = Image.composite(Image.new("RGB", (width, height), near), Image.new("RGB", (width, height), far), cloud)
    draw = ImageDraw.Draw(ground)
    for _ in range(5):
        _strewn_leaf(
            rng, draw, (width, height), hsv(hue + rng.uniform(-0.1, 0.1), saturation, value * rng.uniform(0.6, 1.3))
        )
    canvas = ground.filter(ImageFilter.GaussianBlur(2)).resize((width * FINE, height * FINE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(2, 6)):
        _strewn_leaf(
            rng, draw, canvas.size, hsv(rng.uniform(0.05, 0.36), rng.uniform(0.25, 0.7), rng.uniform(0.25, 0.65))
        )
    for _ in range(rng.integers(2, 5)):
        _twig(rng, draw, canvas.size)
    for _ in range(rng.integers(4, 12)):
        _seed(rng, draw, canvas.size)
    return canvas


def _strewn_leaf(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: Colour) -> None:
    place = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    _leaf(rng, draw, place, min(size) * rng.uniform(0.15, 0.35), rng.uniform(0.25, 0.45), colour)


def _leaf(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, place: Point, long: float, wide: float, colour: Colour
) -> list[Point]:
    """Draw a veined leaf, `long` from its middle to its tip and `wide` times as wide; returns its outline."""
    (x, y), turn, curl = place, rng.uniform(0, 2 * math.pi), rng.uniform(-0.5, 0.5)

    def at(t: float, w: float) -> Point:
        """The canvas point at t from the stalk (-1) to the tip (1), and w across in half widths."""
        u, v = t, w * wide * (1 - t * t) * (1.15 - 0.3 * t) + curl * (1 - t * t) * 0.3
        u, v = long * u, long * v
        return x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)

    steps = [k / 10 - 1 for k in range(21)]
    for w, tone in ((1.0, 0.0), (-1.0, 0.16)):
        fill(draw, [at(t, w) for t in steps] + [at(t, 0) for t in reversed(steps)], mix(colour, (0, 0, 0), tone))
    vein, thick = mix(colour, (235, 240, 190), 0.35), max(1, round(long / 60))
    draw.line([whole(at(t, 0)) for t in steps], vein, thick)
    for t in (-0.6, -0.3, 0.0, 0.3):
        for w in (0.75, -0.75):
            draw.line([whole(at(t, 0)), whole(at(t + 0.28, w))], vein, thick)
    return [at(t, 1) for t in steps] + [at(t, -1) for t in reversed(steps)]


def _twig(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Draw a dry, forked stalk, which resembles an antenna."""
    x, y, turn = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(0, 2 * math.pi)
    colour = hsv(rng.uniform(0.04, 0.12), rng.uniform(0.2, 0.6), rng.uniform(0.15, 0.5))
    long, thick = min(size) * rng.uniform(0.1, 0.3), round(min(size) * rng.uniform(0.008, 0.016))
    ends = [(turn, 1.0), (turn + rng.uniform(0.4, 0.9), 0.35), (turn - rng.uniform(0.4, 0.9), 0.35)]
    for k, (heading, share) in enumerate(ends):
        x1, y1 = x + long * share * math.cos(heading), y + long * share * math.sin(heading)
        draw.line([whole((x, y)), whole((x1, y1))], colour, thick)
        if k == 0:
            x, y = x1, y1


def _seed(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    """Draw a round grain, which resembles a spot or the tip of an antenna."""
    x, y, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), min(size) * rng.uniform(0.01, 0.03)
    colour = hsv(rng.uniform(0, 0.2), rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.9))
    for share, tone in ((1.0, mix(colour, (0, 0, 0), 0.4)), (0.8, colour), (0.3, mix(colour, (255, 255, 255), 0.4))):
        r = radius * share
        draw.ellipse([*whole((x - r, y - r)), *whole((x + r, y + r))], colour if share == 0.8 else tone)


def foreground(rng: np.random.Generator, canvas: Image.Image, places: Sequence[Point]) -> Image.Image:
    """Draw blades of grass across the picture and, in one of four, a leaf on one of `places`; returns the mask of both.

    The leaf keeps even the best classifier from being always right.
    """
    front, draw = Image.new("L", canvas.size), ImageDraw.Draw(canvas)
    cover = ImageDraw.Draw(front)
    hidden = places[int(rng.integers(len(places)))]
    if rng.random() < 0.25:
        colour = hsv(rng.uniform(0.05, 0.36), rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7))
        long = min(canvas.size) * rng.uniform(0.16, 0.2)
        fill(cover, _leaf(rng, draw, hidden, long, rng.uniform(0.6, 0.75), colour), 255)
    for _ in range(rng.integers(0, 3)):
        w, h = canvas.size
        turn, curl = rng.uniform(0, 2 * math.pi), rng.uniform(-0.25, 0.25)
        x, y = w / 2 + min(w, h) * rng.uniform(-0.35, 0.35), h / 2 + min(w, h) * rng.uniform(-0.35, 0.35)
        wide, long = min(w, h) * rng.uniform(0.012, 0.024), min(w, h) * rng.uniform(0.5, 1.2)
        colour = hsv(rng.uniform(0.16, 0.34), rng.uniform(0.4, 0.8), rng.uniform(0.35, 0.75))

        def at(t: float, off: float) -> Point:
            u, v = long * t, long * curl * t * t + off  # noqa: B023 - used in this round only
            return x + u * math.cos(turn) - v * math.sin(turn), y + u * math.sin(turn) + v * math.cos(turn)  # noqa: B023

        steps = [k / 10 - 1 for k in range(21)]
        for side, tone in ((1.0, 0.0), (-1.0, 0.25)):
            edge = [at(t, side * wide * (1 - t) / 1.5) for t in steps] + [at(t, 0) for t in reversed(steps)]
            fill(draw, edge, mix(colour, (0, 0, 0), tone))
            fill(cover, edge, 255)
    return front


def expose(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """The image with light that falls off across it, a colour cast and a sensor's noise."""
    fall = Image.fromarray(rng.integers(150, 256, (3, 3), dtype=np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    image = ImageChops.multiply(image, Image.merge("RGB", [fall] * 3))
    gain, cast = rng.uniform(0.95, 1.45), rng.uniform(0.92, 1.08, 3)
    image = image.point([min(255, round(x * gain * c)) for c in cast.tolist() for x in range(256)])
    noise = rng.integers(-7, 8, (image.height, image.width, 3), dtype=np.int16)
    return Image.fromarray(np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8))


def fill(draw: ImageDraw.ImageDraw, points: Sequence[Point], colour: Colour | int) -> None:
    """Fill the polygon of canvas points with a colour."""
    draw.polygon([whole(p) for p in points], colour)


def whole(point: Point) -> tuple[int, int]:
    """A canvas point, rounded, so that the last bit of a platform's sine can't change a picture."""
    return round(point[0]), round(point[1])


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """RGB, each 0 to 255, of hue (any number, modulo 1), saturation and value (cut at 1)."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(1.0, saturation), min(1.0, value))
    return round(255 * r), round(255 * g), round(255 * b)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour between a (share 0) and b (share 1)."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )
