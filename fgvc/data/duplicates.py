"""Images that show the same: equal byte for byte, or one photograph stored twice - recompressed, resized, lightened, mirrored.

Perceptual hashes (imagehash's pHash: 64 signs of a cosine transform) propose pairs, thumbnails decide: leaves on a plain ground
share hashes by the dozen. Every pair of hashes is compared, which is exact for any distance and no more than N^2 / 2 XORs of
8 bytes, in blocks: seconds for 1e5 images, which take a thousand times as long to decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIDE = 32  # pixels of a thumbnail; pHash itself looks at 32 x 32
DISTANCE = 10  # of 64 bits; a wide net, since thumbnails decide
LIKENESS = 0.98  # correlation of two thumbnails from which they show the same; measured, see docs/measurements.md
_BLOCK = 128  # images compared with all others at a time
_PAIRS = 4096  # thumbnails compared at a time: 100 MB


@dataclass(frozen=True, slots=True)
class Print:
    """What is kept of one image to compare it with others."""

    hash: int  # 64 bits
    mirrored: int  # of the image left to right
    thumb: NDArray[np.uint8]  # (SIDE,SIDE,3)


@dataclass(frozen=True, slots=True)
class Prints:
    """The prints of N images as columns: 3 kB an image."""

    hashes: NDArray[np.uint64]  # (N,)
    mirrored: NDArray[np.uint64]  # (N,)
    thumbs: NDArray[np.uint8]  # (N,SIDE,SIDE,3)

    @classmethod
    def empty(cls, images: int) -> Prints:
        return cls(
            np.zeros(images, np.uint64), np.zeros(images, np.uint64), np.zeros((images, SIDE, SIDE, 3), np.uint8)
        )

    def put(self, row: int, one: Print) -> None:
        self.hashes[row], self.mirrored[row], self.thumbs[row] = one.hash, one.mirrored, one.thumb


def print_of(image: Image.Image) -> Print:
    """The print of an RGB image of any size and aspect."""
    from imagehash import phash

    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    hashes = (np.packbits(phash(view).hash).tobytes() for view in (small, ImageOps.mirror(small)))
    upright, mirrored = (int.from_bytes(bits, "big") for bits in hashes)
    return Print(upright, mirrored, np.asarray(small))


def equal(digests: NDArray[np.uint64]) -> tuple[tuple[int, ...], ...]:
    """Rows with equal digests (N,2), as ascending tuples of two and more."""
    if not len(digests):
        return ()
    _, numbers = np.unique(digests, axis=0, return_inverse=True)
    return groups(numbers.reshape(-1))


def alike(
    prints: Prints, rows: NDArray[np.int64], *, distance: int = DISTANCE, likeness: float = LIKENESS
) -> NDArray[np.int64]:
    """Pairs (P,2) among `rows` that show the same picture, upright or mirrored.

    Memory: 3 kB an image and what a block needs, never N^2. Rows that are equal byte for byte should come once.
    """
    found = [np.empty((0, 2), np.int64)]
    upright = prints.hashes[rows]
    for start in range(0, len(rows), _BLOCK):
        own = upright[start : start + _BLOCK, None]
        for turned, others in ((False, upright), (True, prints.mirrored[rows])):
            a, b = np.nonzero(np.bitwise_count(own ^ others[None, start:]) <= distance)
            pairs = np.stack([rows[a[a < b] + start], rows[b[a < b] + start]], axis=1)
            found += [part[likenesses(prints, part, turned=turned) >= likeness] for part in _chunks(pairs)]
    return np.unique(np.concatenate(found), axis=0)


def likenesses(prints: Prints, pairs: NDArray[np.int64], *, turned: bool = False) -> NDArray[np.float32]:
    """(P,) correlation of the thumbnails of pairs (P,2), all colours at once, in [-1,1]; `turned`: the second is mirrored.

    Each channel loses its own mean first, so that a common colour of two grounds counts for nothing and light hardly counts.
    A picture of one colour is like no other: its thumbnail is noise.
    """
    first, second = (_centred(prints.thumbs[pairs[:, side]]) for side in (0, 1))
    if turned:
        second = second[:, :, ::-1]
    dot = np.einsum("pijc,pijc->p", first, second)
    own = np.einsum("pijc,pijc->p", first, first) * np.einsum("pijc,pijc->p", second, second)
    noise = 2.0**2 * SIDE * SIDE * 3  # sum of squares of a thumbnail with 2 levels of 255
    return np.asarray(np.where(own > noise**2, dot / np.sqrt(np.maximum(own, 1)), 0.0), np.float32)


def joined(total: int, *links: NDArray[np.int64]) -> NDArray[np.int64]:
    """(total,) number of the group that each row is in, where `links` (P,2) join two rows each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = np.concatenate([np.empty((0, 2), np.int64), *links]).T
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(total, total))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def groups(numbers: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Rows with the same number (N,), as ascending tuples of two and more."""
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return tuple(sorted(tuple(part.tolist()) for part in parts if len(part) > 1))


def links(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """The links (P,2) that join the rows with the same number (N,) to the first of them."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rows = np.arange(len(numbers))
    pairs = np.stack([first[inverse.reshape(-1)], rows], axis=1)
    return pairs[pairs[:, 0] != rows]


def _centred(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    x = thumbs.astype(np.float32)
    return x - x.mean(axis=(1, 2), keepdims=True)


def _chunks(pairs: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(pairs), _PAIRS):
        yield pairs[start : start + _PAIRS]
