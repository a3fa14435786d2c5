"""Augmentation of training images: the crop through torch's antialiased resampling, the rest through albumentations, with
policies of timm and torchvision among it.

Pillow, which evaluation and serving use, resamples alike (values differ by 0.1 of a level on average, by 3 at most) but
takes five times as long, and would be most of what a sample costs. Without antialiasing it is their own `fgvc.images.plain`.

Coordinates are continuous: pixel (column j, row i) covers
[j, j+1) x [i, i+1), so its centre is at (j + 0.5, i + 0.5) and an image of width W spans 0 to W.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.data.geometry import inverse, scaled, window
from fgvc.data.pipeline import Step, albumentations, pipeline_steps
from fgvc.data.policy import policy
from fgvc.data.recipe import read_pipeline
from fgvc.errors import FgvcError
from fgvc.images.plain import resample
from fgvc.rng import SAMPLE, generator, seeded_globals

Window = tuple[int, int, int, int]
"""A box (`fgvc.images.preprocess.Box`) in whole pixels of the image: never empty, never outside it."""


class Augmenter:
    """Augments sample (epoch, row, turn) of a run: a pure function of the image, the settings, the seed and these three.

    Not for two threads at once: albumentations keeps the sample's random state in its transforms.
    """

    def __init__(self, augment: Augment, spec: Preprocess, seed: int) -> None:
        """Compose the steps of `augment` for images of `spec`. Raises FgvcError where `augment.pipeline` can't be used."""
        self.augment, self.spec, self.seed = augment, spec, seed
        self._names, self._compose = _compose(augment, spec)

    def __reduce__(self) -> tuple[type[Augmenter], tuple[Augment, Preprocess, int]]:
        """A worker that is not forked gets the settings, and composes the steps itself: they can't be pickled."""
        return Augmenter, (self.augment, self.spec, self.seed)

    def __call__(
        self, image: NDArray[np.uint8], *, epoch: int, row: int, turn: int = 0
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Augment uint8 (h,w,3) RGB to uint8 (H,W,3); also returns the float32 (2,3) matrix from crop to image coordinates.

        `turn`: number of earlier samples of this row in the epoch. Raises FgvcError where `augment.pipeline` fails on the image.
        """
        rng = generator(SAMPLE, self.seed, epoch, row, *([1 + turn] if turn else []))  # a 1 there is the loader's
        if self.augment.crop == "fit":
            pixels, to_image = self._fit(image, rng)
        else:
            source = self._random_window(image.shape[1], image.shape[0], rng)
            pixels = _resampled(image, source, self.spec.size, self.spec)
            to_image = window(source, (0, 0, self.spec.size[1], self.spec.size[0]))
        # One stream for all transforms. `set_random_seed` would hand each the same one: every flip of an image
        # would go with its vertical flip and its greying.
        self._compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        self._compose.pictures = [pixels]
        try:
            with seeded_globals(self.seed, epoch, row, turn, 0):
                result = self._compose(image=pixels)
        except Exception as error:  # whatever a transform of the user's raises
            if self.augment.pipeline is None:
                raise
            raise FgvcError(f"augment.pipeline: fails on an image: {type(error).__name__}: {error}") from error
        pixels = result["image"]
        shape = pixels.shape[0], pixels.shape[1]
        to_image = to_image @ inverse(result["applied_transforms"], shape)
        if shape != self.spec.size:  # a crop of the pipeline
            pixels = _resampled(pixels, (0, 0, *shape[::-1]), self.spec.size, self.spec)
            to_image = to_image @ scaled(shape, self.spec.size)
        return pixels, to_image[:2].astype(np.float32)

    def steps(
        self, image: NDArray[np.uint8], *, epoch: int, row: int, turn: int = 0
    ) -> list[tuple[str, NDArray[np.uint8]]]:
        """Names of the sample's steps with the picture after each: the crop first, then all that the settings turn on. Of
        one that left the picture as it was, as where its chance did not come up, the name says so."""
        self(image, epoch=epoch, row=row, turn=turn)
        names, pictures = ["crop", *self._names], self._compose.pictures
        same = [False] + [np.array_equal(before, after) for before, after in pairwise(pictures)]
        return [
            (f"{name}: unchanged" if unchanged else name, picture)
            for name, picture, unchanged in zip(names, pictures, same, strict=True)
        ]

    def _random_window(self, width: int, height: int, rng: np.random.Generator) -> Window:
        """The window of torchvision's RandomResizedCrop, drawn as shares of the image, so that a shrunk copy gives the same one
        but for rounding."""
        lowest, highest = self.augment.crop_ratio
        for _ in range(10):
            area = width * height * rng.uniform(*self.augment.crop_scale)
            ratio = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                break
        else:  # the largest central window whose aspect is allowed
            w, h = min(width, height * highest), min(height, width / lowest)
            left, top = (width - w) / 2, (height - h) / 2
        (x0, x1), (y0, y1) = _whole(left, left + w, width), _whole(top, top + h, height)
        return x0, y0, x1, y1

    def _fit(self, image: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Crop a random window in the geometry of the deployed fit; also returns the matrix (3,3) as `__call__`.

        Along either axis the window lies within the image, or holds all of it (pad) with `fill` around."""
        (rows, columns), (h, w) = self.spec.size, image.shape[:2]
        if self.spec.resize == "squash":
            sides = float(w), float(h)
        else:
            pixel = (min if self.spec.resize == "crop" else max)(w / columns, h / rows)
            sides = columns * pixel, rows * pixel
        share = math.sqrt(rng.uniform(*self.augment.crop_scale))
        spare = w - sides[0] * share, h - sides[1] * share
        left, top = (rng.uniform(min(room, 0), max(room, 0)) for room in spare)
        x0, x1, j0, j1 = _overlap(left, sides[0] * share, w, columns)
        y0, y1, i0, i1 = _overlap(top, sides[1] * share, h, rows)
        pixels = np.empty((rows, columns, 3), dtype=np.uint8)
        pixels[:] = self.spec.fill
        source = x0, y0, x1, y1
        pixels[i0:i1, j0:j1] = _resampled(image, source, (i1 - i0, j1 - j0), self.spec)
        return pixels, window(source, (j0, i0, j1, i1))


def _compose(augment: Augment, spec: Preprocess) -> tuple[list[str], Any]:
    """Names of the steps that the settings turn on, and albumentations' composition of them, which records the parameters that
    it applied, and the picture after each step."""
    A = albumentations()
    a = augment
    steps: list[Step] = []
    if a.flip:
        steps.append(("flip", A.HorizontalFlip(p=a.flip)))
    if a.vertical_flip:
        steps.append(("vertical flip", A.VerticalFlip(p=a.vertical_flip)))
    if a.rotate or a.translate or a.zoom or a.shear:
        moved = A.Affine(
            scale=(1 - a.zoom, 1 + a.zoom),
            keep_ratio=True,
            translate_percent=(-a.translate, a.translate),
            rotate=(-a.rotate, a.rotate),
            shear={"x": (-a.shear, a.shear), "y": (0.0, 0.0)},
            fill=spec.fill,
            p=1,
        )
        steps.append(("affine", moved))
    if a.policy != "none":
        changed = policy(a, spec.fill)
        share = a.policy_probability if a.policy != "randaugment" else 1  # of each of its operations, there

        def applied(image: NDArray[np.uint8], **_: Any) -> NDArray[np.uint8]:
            return np.array(changed(Image.fromarray(image)))

        steps.append((a.policy, A.Lambda(image=applied, name=a.policy, p=share)))
    if a.brightness or a.contrast or a.saturation or a.hue:
        factors = [(1 - amount, 1 + amount) for amount in (a.brightness, a.contrast, a.saturation)]
        steps.append(("colours", A.ColorJitter(*factors, hue=(-a.hue, a.hue), p=1)))
    if a.grayscale:
        steps.append(("grey", A.ToGray(p=a.grayscale)))
    if a.pipeline is not None:
        steps += pipeline_steps(read_pipeline(a.pipeline) if isinstance(a.pipeline, Path) else a.pipeline, spec.size)

    class Recording(A.Compose):  # type: ignore[name-defined]
        pictures: list[NDArray[np.uint8]]

        def check_data_post_transform(self, data: dict[str, Any]) -> dict[str, Any]:  # called after each transform
            self.pictures.append(data["image"])
            return data

    return [name for name, _ in steps], Recording([transform for _, transform in steps], save_applied_params=True)


def _resampled(image: NDArray[np.uint8], source: Window, size: tuple[int, int], spec: Preprocess) -> NDArray[np.uint8]:
    """A window of `image` resized to uint8 (H,W,3) by the deployed interpolation; pixels outside of it have no influence.

    torch has two of Pillow's filters."""
    left, top, right, bottom = source
    region, interpolation = image[top:bottom, left:right], spec.interpolation
    if not spec.antialias:
        return resample(region, size, interpolation)
    if interpolation not in ("bilinear", "bicubic"):
        filter_ = Image.Resampling[interpolation.upper()]
        return np.asarray(Image.fromarray(region).resize((size[1], size[0]), filter_))
    import torch

    x = torch.from_numpy(region).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    x = torch.nn.functional.interpolate(x, size, mode=interpolation, antialias=True)
    pixels: NDArray[np.uint8] = x[0].permute(1, 2, 0).numpy()
    return pixels


def _whole(start: float, stop: float, side: int) -> tuple[int, int]:
    """An interval within 0 to `side`, rounded to whole pixels, at least one."""
    first = min(round(start), side - 1)
    return first, min(max(round(stop), first + 1), side)


def _overlap(start: float, length: float, side: int, pixels: int) -> tuple[int, int, int, int]:
    """One axis of a window that may reach beyond the image: first and last whole pixel of the image, and of the crop that they
    fill."""
    step = length / pixels
    first, last = max(round(-start / step), 0), min(round((side - start) / step), pixels)
    if first >= last:  # an image thinner than one pixel of the crop
        first = min(first, pixels - 1)
        return 0, side, first, first + 1
    return *_whole(max(start + first * step, 0.0), start + last * step, side), first, last
