"""Duplicate images: equal byte for byte, or the same photograph stored twice - recompressed, resized, lightened, mirrored.

Perceptual hashes (imagehash's pHash: 64 signs of a cosine transform) propose pairs, thumbnails decide: leaves on a plain ground
share hashes by the dozen. Every pair of hashes is compared, which is exact for any distance and no more than N^2 / 2 XORs of
8 bytes, in blocks: seconds for 1e5 images, which take a thousand times as long to decode. If all hashes are alike, as of a
fixed camera, all thumbnails are compared, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIDE = 32  # pixels of a thumbnail; pHash itself looks at 32 x 32
DISTANCE = 10  # of 64 bits; a wide net, since thumbnails decide
LIKENESS = 0.98  # correlation of two thumbnails from which they are near copies; measured, see docs/measurements.md
_BLOCK = 128  # images compared with all others at a time
_CHUNK = 2048  # thumbnails that a block is compared with at a time: 25 MB


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hashes and thumbnail of an image, to compare it with others."""

    hash: int  # 64 bits
    mirrored: int  # of the image left to right
    thumb: NDArray[np.uint8]  # (SIDE,SIDE,3)


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """The fingerprints of N images as columns: 3 kB an image."""

    hashes: NDArray[np.uint64]  # (N,)
    mirrored: NDArray[np.uint64]  # (N,)
    thumbs: NDArray[np.uint8]  # (N,SIDE,SIDE,3)

    @classmethod
    def empty(cls, images: int) -> Fingerprints:
        return cls(
            np.zeros(images, np.uint64), np.zeros(images, np.uint64), np.zeros((images, SIDE, SIDE, 3), np.uint8)
        )

    def put(self, row: int, fingerprint: Fingerprint) -> None:
        self.hashes[row], self.mirrored[row], self.thumbs[row] = fingerprint.hash, fingerprint.mirrored, fingerprint.thumb


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB image of any size and aspect."""
    from imagehash import phash

    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    hashes = (np.packbits(phash(view).hash).tobytes() for view in (small, ImageOps.mirror(small)))
    upright, mirrored = (int.from_bytes(bits, "big") for bits in hashes)
    return Fingerprint(upright, mirrored, np.asarray(small))


def equal(digests: NDArray[np.uint64]) -> tuple[tuple[int, ...], ...]:
    """Groups of rows with equal digests (N,2), as ascending tuples of two and more."""
    if not len(digests):
        return ()
    _, numbers = np.unique(digests, axis=0, return_inverse=True)
    return groups(numbers.reshape(-1))


def alike(
    prints: Fingerprints,
    rows: NDArray[np.int64],
    *,
    distance: int = DISTANCE,
    likeness: float = LIKENESS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Pairs (P,2) of `rows` that show the same picture, upright or mirrored, and their correlations (P,), in many small chunks,
    since N frames of a fixed camera are N^2 / 2 pairs. Rows that are equal byte for byte should come once.

    Time: N^2 / 2 XORs, and a product of thumbnails for each row of hashes that has a candidate among 128 others. Memory: a chunk.
    """
    upright, mirrored = prints.hashes[rows], prints.mirrored[rows]
    for start in range(0, len(rows), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(rows)))
        vectors = unit(prints.thumbs[rows[block]])
        for turned, others in ((False, upright), (True, mirrored)):
            near = np.bitwise_count(upright[block, None] ^ others[None, start:]) <= distance
            near &= np.arange(start, len(rows)) > block[:, None]
            columns = np.flatnonzero(near.any(axis=0))
            for at in range(0, len(columns), _CHUNK):
                chunk = columns[at : at + _CHUNK]
                same = vectors @ unit(prints.thumbs[rows[start + chunk]], turned=turned).T
                i, j = np.nonzero(near[:, chunk] & (same >= likeness))
                if len(i):
                    yield np.stack([rows[block[i]], rows[start + chunk[j]]], axis=1), same[i, j]
        if progress:
            progress(int(block[-1]) + 1, len(rows))


def unit(thumbs: NDArray[np.uint8], *, turned: bool = False) -> NDArray[np.float32]:
    """Vectors (B,D) of length 1, whose products are the correlations, in [-1,1], of thumbnails (B,SIDE,SIDE,3) over all colours;
    `turned`: of mirrored thumbnails.

    Each channel loses its own mean first, so that a common colour of two grounds counts for nothing and light hardly counts.
    The vector of a picture of one colour is 0, since its thumbnail is noise.
    """
    x = (thumbs[:, :, ::-1] if turned else thumbs).astype(np.float32)
    x = (x - x.mean(axis=(1, 2), keepdims=True)).reshape(len(x), -1)
    squares = np.einsum("bd,bd->b", x, x)[:, None]
    noise = 2.0**2 * SIDE * SIDE * 3  # of a thumbnail with 2 levels of 255
    return np.where(squares > noise, x / np.sqrt(np.maximum(squares, 1)), np.float32(0))


def gathered(
    chunks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]], total: int, *columns: NDArray[Any]
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """Group rows by chunks of pairs as `alike` yields them.

    Returns the number of each row's group (total,), and for each of the columns (total,) the pairs (P,2) of different values: of
    each row the most similar one.

    A group may be a chain whose ends are not alike: two of its rows may belong together, but need not.
    """
    numbers = np.arange(total)
    closest = [(np.full(total, -np.inf, np.float32), np.arange(total)) for _ in columns]
    for pairs, likeness in chunks:
        numbers = joined(total, links(numbers), pairs)
        order = np.argsort(likeness, kind="stable")  # of several pairs of one row the last stays
        for column, (best, other) in zip(columns, closest, strict=True):
            differ = order[column[pairs[order, 0]] != column[pairs[order, 1]]]
            for this, that in ((0, 1), (1, 0)):
                better = differ[likeness[differ] > best[pairs[differ, this]]]
                best[pairs[better, this]] = likeness[better]
                other[pairs[better, this]] = pairs[better, that]
    across = []
    for best, other in closest:
        both = np.stack([np.arange(total), other], axis=1)[best > -np.inf]
        across.append(np.unique(np.sort(both, axis=1), axis=0))
    return numbers, across


def joined(total: int, *links: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each row's group, (total,), where each of `links` (P,2) joins two rows."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = np.concatenate([np.empty((0, 2), np.int64), *links]).T
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(total, total))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def groups(numbers: NDArray[np.int64]) -> tuple[tuple[int, ...], ...]:
    """Groups of rows with the same number (N,), as ascending tuples of two and more."""
    order = np.argsort(numbers, kind="stable")
    runs = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    return tuple(sorted(tuple(rows.tolist()) for rows in runs if len(rows) > 1))


def links(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Links (P,2) from the first row with each number (N,) to the others with it."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rows = np.arange(len(numbers))
    pairs = np.stack([first[inverse.reshape(-1)], rows], axis=1)
    return pairs[pairs[:, 0] != rows]
