"""Colours of a set, compared with the normalisation that its weights expect."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageStat

from fgvc.config.images import Preprocess, Triple

FAR = 1.0  # standard deviations of the weights by which the mean of a channel may differ
RATIO = 4.0  # how many times wider or narrower than the weights' a channel may spread
OFF = 10.0  # factor by which a mean or a std may be larger or smaller than the usual one
FLAT = 0.01  # standard deviation, white being 1, below which an image shows nothing
_GREY = 2  # levels of 255 between channels that JPEG leaves in a grey image


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation that the network's input is normalised with; R, G, B, white being 1."""

    mean: Triple
    std: Triple
    from_weights: bool = False  # exactly what the weights ask for, so that no setting can be wrong
    doubts: tuple[str, ...] = ()  # reasons against it, whatever the images are


NATURAL = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet's photographs


def normalisation_of(spec: Preprocess) -> Normalisation:
    """The normalisation of a preprocessing, in units where white is 1."""

    def plain(values: Triple) -> Triple:
        r, g, b = (value / spec.input_range for value in values)
        return (b, g, r) if spec.channel_order == "bgr" else (r, g, b)

    return Normalisation(plain(spec.mean), plain(spec.std))


def other_units(spec: Preprocess, usual: Normalisation, whose: str) -> list[str]:
    """Doubts about a mean or std that is so far from the usual one that it is probably in other units. A mean of 0 subtracts
    nothing in any units."""
    ours = normalisation_of(spec)
    doubts = []
    for key, values, expected in (("mean", ours.mean, usual.mean), ("std", ours.std, usual.std)):
        ratios = [value / usual_value for value, usual_value in zip(values, expected, strict=True) if value and usual_value]
        worst = max(ratios, key=lambda ratio: abs(math.log(ratio)), default=1.0)
        if not 1 / OFF <= worst <= OFF:
            factor, way = (worst, "larger") if worst > 1 else (1 / worst, "smaller")
            doubts.append(
                f"{key} {getattr(spec, key)}, where white is {spec.input_range}, is {factor:.3g} times {way} than {whose}, "
                f"{expected} where white is 1: is it in other units? See input_range"
            )
    return doubts


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """Colours of a set; mean and std are of all pixels of the readable training images, each image counting the same."""

    mean: Triple
    std: Triple
    expected: Normalisation | None
    modes: tuple[tuple[str, int], ...]  # Pillow's colour modes of the files and their counts, the most frequent first
    grey: tuple[int, ...]  # rows whose three channels are equal
    flat: tuple[int, ...]  # rows of one colour

    @property
    def shift(self) -> Triple | None:
        """Difference of the mean to the expected one, per channel, in expected standard deviations; None without expectation."""
        if self.expected is None:
            return None
        r, g, b = ((m - e) / s for m, e, s in zip(self.mean, self.expected.mean, self.expected.std, strict=True))
        return r, g, b

    @property
    def spread(self) -> Triple | None:
        """Standard deviation over the expected one, per channel; None without expectation."""
        if self.expected is None:
            return None
        r, g, b = (std / s for std, s in zip(self.std, self.expected.std, strict=True))
        return r, g, b


def moments(image: Image.Image) -> NDArray[np.float64]:
    """The means of an RGB image's channels and of their squares, (2,3), white being 1; from its histogram."""
    stat = ImageStat.Stat(image)
    return np.stack([np.asarray(stat.sum) / 255, np.asarray(stat.sum2) / 255**2]) / stat.count[0]


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether the channels of an image (h,w,3) are equal, but for JPEG's rounding."""
    levels = pixels.astype(np.int16)
    return bool((levels.max(axis=2) - levels.min(axis=2)).max() <= _GREY)


def colours(
    image_moments: NDArray[np.float64],
    grey: NDArray[np.bool_],
    *,
    train: NDArray[np.bool_],
    modes: Counter[str],
    expected: Normalisation | None,
) -> Colours:
    """The colours of a set by the moments (N,2,3) of its images, NaN for unreadable ones; `train` (N,): the training images."""
    read = ~np.isnan(image_moments[:, 0, 0])
    mean, square = image_moments[read & train].mean(axis=0) if (read & train).any() else np.zeros((2, 3))
    narrow = (image_moments[:, 1] - image_moments[:, 0] ** 2).max(axis=1) < FLAT**2
    return Colours(
        mean=_triple(mean),
        std=_triple(np.sqrt(np.maximum(square - mean**2, 0))),
        expected=expected,
        modes=tuple(sorted(modes.items(), key=lambda item: (-item[1], item[0]))),
        grey=tuple(np.flatnonzero(read & grey).tolist()),
        flat=tuple(np.flatnonzero(read & narrow).tolist()),
    )


def doubts(colours: Colours, images: int) -> Iterator[str]:
    """Doubts about the colours of a set, in words.

    Many weights ask for a mean and std of no images (0.5, or 0 and 1). If the normalisation is exactly what they ask for,
    images are doubtful only if they are unlike photographs, too."""
    if colours.expected is not None and colours.expected.doubts:  # all images would be far from it
        yield from colours.expected.doubts
    elif colours.shift is not None and colours.spread is not None and any(colours.mean) and colours.expected is not None:
        usual = replace(colours, expected=NATURAL) if colours.expected.from_weights else colours
        assert usual.shift is not None
        assert usual.spread is not None
        mean, std = (
            ("?", "?") if colours.expected.from_weights else (", or deploy.mean of other data?", ", or deploy.std of other data?")
        )
        for k, channel in enumerate(("red", "green", "blue")):
            shift, spread = colours.shift[k], colours.spread[k]
            if min(abs(shift), abs(usual.shift[k])) > FAR:
                yield (
                    f"{channel} is {abs(shift):.2f} standard deviations {'lighter' if shift > 0 else 'darker'} than the "
                    f"network's normalisation expects: inverted images, another range{mean}"
                )
            if not any(1 / RATIO <= ratio <= RATIO for ratio in (spread, usual.spread[k])):
                yield (
                    f"{channel} spreads {spread:.2g} times as wide as the network's normalisation expects: another range{std}"
                )
    if len(colours.modes) > 1:
        listed = ", ".join(f"{mode} {count}" for mode, count in colours.modes)
        yield f"files store colour in several ways, which a network may learn instead of the classes: {listed}"
    if colours.grey:
        yield f"{len(colours.grey)} of {images} images are grey, without any colour"


def _triple(values: NDArray[np.float64]) -> Triple:
    r, g, b = values.tolist()
    return r, g, b
