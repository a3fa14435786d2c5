"""What colours a set has, beside what its weights were trained to expect."""

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
OFF = 10.0  # times that a mean or a std may be larger or smaller than the usual one
FLAT = 0.01  # standard deviation, white being 1, below which an image shows nothing
_GREY = 2  # levels of 255 between channels that JPEG leaves in a grey image


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation that the network's input is normalised with; R, G, B, white being 1."""

    mean: Triple
    std: Triple
    own: bool = False  # just what the weights ask for: then nobody can have got it wrong
    doubts: tuple[str, ...] = ()  # what speaks against it, whatever the images are


NATURAL = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet's photographs


def normalisation_of(spec: Preprocess) -> Normalisation:
    """What a preprocessing normalises with."""

    def plain(values: Triple) -> Triple:
        r, g, b = (value / spec.input_range for value in values)
        return (b, g, r) if spec.channel_order == "bgr" else (r, g, b)

    return Normalisation(plain(spec.mean), plain(spec.std))


def other_units(spec: Preprocess, usual: Normalisation, whose: str) -> list[str]:
    """Where a mean or a std is so far off the usual that it is in other units, mostly, in words. A mean of 0 says that nothing is
    taken off, in any units."""
    ours = normalisation_of(spec)
    found = []
    for key, values, expected in (("mean", ours.mean, usual.mean), ("std", ours.std, usual.std)):
        shares = [value / known for value, known in zip(values, expected, strict=True) if value and known]
        worst = max(shares, key=lambda share: abs(math.log(share)), default=1.0)
        if not 1 / OFF <= worst <= OFF:
            times, way = (worst, "larger") if worst > 1 else (1 / worst, "smaller")
            found.append(
                f"{key} {getattr(spec, key)}, where white is {spec.input_range}, is {times:.3g} times {way} than {whose}, "
                f"{expected} where white is 1: is it in other units? See input_range"
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Colours:
    """Mean and spread are those of all pixels of the readable training images, each image counting the same."""

    mean: Triple
    std: Triple
    expected: Normalisation | None
    modes: tuple[tuple[str, int], ...]  # how files store colour, and how many do, the most frequent first
    grey: tuple[int, ...]  # rows whose three channels are equal
    flat: tuple[int, ...]  # rows of one colour

    @property
    def shift(self) -> Triple | None:
        """How much lighter than expected, per channel, in standard deviations of the weights."""
        if self.expected is None:
            return None
        r, g, b = ((m - e) / s for m, e, s in zip(self.mean, self.expected.mean, self.expected.std, strict=True))
        return r, g, b

    @property
    def spread(self) -> Triple | None:
        """How many times wider than expected each channel spreads."""
        if self.expected is None:
            return None
        r, g, b = (own / s for own, s in zip(self.std, self.expected.std, strict=True))
        return r, g, b


def moments(image: Image.Image) -> NDArray[np.float64]:
    """(2,3): the mean of an RGB image's channels and of their squares, white being 1; from its histogram."""
    stat = ImageStat.Stat(image)
    return np.stack([np.asarray(stat.sum) / 255, np.asarray(stat.sum2) / 255**2]) / stat.count[0]


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether the channels of (h,w,3) are equal."""
    levels = pixels.astype(np.int16)
    return bool((levels.max(axis=2) - levels.min(axis=2)).max() <= _GREY)


def colours(
    seen: NDArray[np.float64],
    grey: NDArray[np.bool_],
    *,
    train: NDArray[np.bool_],
    modes: Counter[str],
    expected: Normalisation | None,
) -> Colours:
    """The moments (N,2,3) of all images summed up, NaN where one can't be read; `train` (N,): what the network learns from."""
    read = ~np.isnan(seen[:, 0, 0])
    mean, square = seen[read & train].mean(axis=0) if (read & train).any() else np.zeros((2, 3))
    narrow = (seen[:, 1] - seen[:, 0] ** 2).max(axis=1) < FLAT**2
    return Colours(
        mean=_triple(mean),
        std=_triple(np.sqrt(np.maximum(square - mean**2, 0))),
        expected=expected,
        modes=tuple(sorted(modes.items(), key=lambda item: (-item[1], item[0]))),
        grey=tuple(np.flatnonzero(read & grey).tolist()),
        flat=tuple(np.flatnonzero(read & narrow).tolist()),
    )


def doubts(found: Colours, images: int) -> Iterator[str]:
    """What is odd about the colours of a set, in words. Many weights ask for a mean and std that are of no images (0.5, or 0 and
    1): where these are just what they ask for, images are odd only if they are unlike photographs, too."""
    if found.expected is not None and found.expected.doubts:  # all images would be far from it
        yield from found.expected.doubts
    elif found.shift is not None and found.spread is not None and any(found.mean) and found.expected is not None:
        usual = replace(found, expected=NATURAL) if found.expected.own else found
        assert usual.shift is not None
        assert usual.spread is not None
        mean, std = (
            ("?", "?") if found.expected.own else (", or deploy.mean of other data?", ", or deploy.std of other data?")
        )
        for k, channel in enumerate(("red", "green", "blue")):
            shift, spread = found.shift[k], found.spread[k]
            if min(abs(shift), abs(usual.shift[k])) > FAR:
                yield (
                    f"{channel} is {abs(shift):.2f} standard deviations {'lighter' if shift > 0 else 'darker'} than the "
                    f"network's normalisation expects: inverted images, another range{mean}"
                )
            if not any(1 / RATIO <= one <= RATIO for one in (spread, usual.spread[k])):
                yield (
                    f"{channel} spreads {spread:.2g} times as wide as the network's normalisation expects: another range{std}"
                )
    if len(found.modes) > 1:
        listed = ", ".join(f"{mode} {count}" for mode, count in found.modes)
        yield f"files store colour in several ways, which a network may learn instead of the classes: {listed}"
    if found.grey:
        yield f"{len(found.grey)} of {images} images are grey, without any colour"


def _triple(values: NDArray[np.float64]) -> Triple:
    r, g, b = values.tolist()
    return r, g, b
