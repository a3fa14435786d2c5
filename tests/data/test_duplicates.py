"""Near copies: against imagehash's own distances, numpy's correlation, and every pair by hand."""

from __future__ import annotations

import io
from itertools import combinations

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from fgvc.data.quality.duplicates import (
    SIDE,
    Fingerprints,
    alike,
    equal,
    fingerprint,
    gathered,
    groups,
    joined,
    links,
    unit,
)


def blobs(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def again(image: Image.Image, quality: int = 90) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def prints_of(images: list[Image.Image]) -> Fingerprints:
    prints = Fingerprints.empty(len(images))
    for row, image in enumerate(images):
        prints.put(row, fingerprint(image))
    return prints


def copies_among(images: list[Image.Image]) -> list[list[int]]:
    return pairs_of(prints_of(images), np.arange(len(images)))


def pairs_of(prints: Fingerprints, rows: np.ndarray, **options: float) -> list[list[int]]:
    parts = [pairs for pairs, _ in alike(prints, rows, **options)]
    return np.unique(np.concatenate([np.empty((0, 2), np.int64), *parts]), axis=0).tolist()


COPIES = {
    "quality 60": lambda image: again(image, 60),
    "80 %": lambda image: again(image.resize((128, 96), Image.Resampling.LANCZOS)),
    "squashed": lambda image: again(image.resize((120, 120), Image.Resampling.BILINEAR)),
    "lighter": lambda image: again(ImageEnhance.Brightness(image).enhance(1.1)),
    "mirrored": lambda image: again(ImageOps.mirror(image)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_photograph_stored_again_is_found(how: str) -> None:
    images = [blobs(seed) for seed in range(12)]
    images += [COPIES[how](images[5])]
    assert copies_among(images) == [[5, 12]]


def test_the_hash_is_imagehashs_own() -> None:
    image = blobs(0)
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    assert f"{fingerprint(image).hash:016x}" == str(imagehash.phash(small))
    assert fingerprint(ImageOps.mirror(image)).hash.bit_count() == fingerprint(image).mirrored.bit_count()


def test_likeness_is_the_correlation_of_centred_channels() -> None:
    prints = prints_of([blobs(1), blobs(2)])
    a, b = (thumb.astype(float) - thumb.astype(float).mean(axis=(0, 1)) for thumb in prints.thumbs)
    first, second = unit(prints.thumbs)
    assert first @ second == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)
    turned = np.corrcoef(a.ravel(), b[:, ::-1].ravel())[0, 1]
    assert first @ unit(prints.thumbs, turned=True)[1] == pytest.approx(turned, abs=1e-5)


def test_pictures_of_one_colour_are_like_no_others() -> None:
    assert copies_among([Image.new("RGB", (64, 64), (shade, 90, 30)) for shade in (10, 10, 200)]) == []


def test_other_pictures_of_like_composition_are_not_copies() -> None:
    """Leaves on a table: the same ground and outline, other spots."""

    def leaf(seed: int) -> Image.Image:
        image = Image.new("RGB", (128, 64), (220, 220, 225))
        image.paste((70, 120, 60), (20, 12, 108, 52))
        for x, y in np.random.default_rng(seed).integers((24, 16), (96, 44), (6, 2)).tolist():
            image.paste((120, 70, 30), (x, y, x + 9, y + 7))
        return image

    assert copies_among([leaf(seed) for seed in range(8)]) == []


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=200), st.integers(0, 40))
def test_every_pair_within_the_distance_is_looked_at(hashes: list[int], distance: int) -> None:
    prints = Fingerprints.empty(len(hashes))
    prints.hashes[:] = hashes
    prints.mirrored[:] = [value ^ (2**64 - 1) for value in hashes]  # nothing is like its own mirror image
    pairs = pairs_of(prints, np.arange(len(hashes)), distance=distance, likeness=-1)
    near = lambda a, b: (a ^ b).bit_count() <= distance or (a ^ b ^ (2**64 - 1)).bit_count() <= distance  # noqa: E731
    assert pairs == [[i, j] for i, j in combinations(range(len(hashes)), 2) if near(hashes[i], hashes[j])]


def test_rows_that_are_not_asked_for_are_left_out() -> None:
    images = [blobs(0), blobs(0), blobs(1), blobs(0)]
    assert pairs_of(prints_of(images), np.array([1, 2, 3])) == [[1, 3]]
    assert pairs_of(prints_of(images), np.array([], np.int64)) == []


def test_thousands_of_frames_of_one_camera_take_no_more_than_their_links() -> None:
    """Every two are alike: five million pairs, of which no more is kept than what joins them."""
    frames, rng = 3200, np.random.default_rng(0)
    prints = Fingerprints.empty(frames)
    base = np.asarray(blobs(0).resize((SIDE, SIDE)))
    prints.hashes[:] = 7
    prints.mirrored[:] = 2**63
    prints.thumbs[:] = base
    prints.thumbs[:, 0, 0] += rng.integers(0, 3, (frames, 3), dtype=np.uint8)
    splits = (np.arange(frames) % 100 == 0).astype(np.int8)
    calls: list[tuple[int, int]] = []
    copies_among = alike(prints, np.arange(frames), progress=lambda *now: calls.append(now))
    numbers, (across, none) = gathered(copies_among, frames, splits, np.zeros(frames))
    assert set(numbers.tolist()) == {0}
    assert calls[-1] == (frames, frames)
    assert len(across) <= frames
    assert set(across.ravel().tolist()) == set(range(frames)), "every frame of one part has one of the other beside it"
    assert (splits[across[:, 0]] != splits[across[:, 1]]).all()
    assert none.shape == (0, 2)


def test_of_pairs_across_splits_the_most_alike_stays() -> None:
    pairs = [(np.array([[0, 1], [0, 2]]), np.array([0.98, 0.99], np.float32))]
    pairs += [(np.array([[0, 3], [1, 2]]), np.array([0.985, 0.999], np.float32))]
    numbers, (across,) = gathered(pairs, 5, np.array([0, 1, 1, 1, 0]))
    assert groups(numbers) == ((0, 1, 2, 3),)
    assert across.tolist() == [[0, 1], [0, 2], [0, 3]], "0 and 2 are likest; 1 and 3 have 0 alone"


@given(st.lists(st.integers(0, 5), max_size=30))
def test_groups_and_links_are_each_others_inverse(numbers: list[int]) -> None:
    column = np.array(numbers, np.int64)
    expected = {n: tuple(i for i, m in enumerate(numbers) if m == n) for n in numbers}
    assert groups(column) == tuple(sorted(rows for rows in expected.values() if len(rows) > 1))
    assert groups(joined(len(column), links(column))) == groups(column)
    assert equal(np.stack([column, column], axis=1).astype(np.uint64)) == groups(column)


def test_joining_chains() -> None:
    numbers = joined(6, np.array([[0, 4]]), np.array([[4, 5], [1, 2]]))
    assert groups(numbers) == ((0, 4, 5), (1, 2))
