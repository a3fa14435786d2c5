"""The matrix against images whose pixels hold their own coordinates; the draws against their definitions."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.data.augment import Augmenter

STILL = {"flip": 0, "brightness": 0, "contrast": 0, "saturation": 0}
WHOLE = STILL | {"crop": "fit", "crop_scale": (1, 1)}


def coordinates(height: int, width: int) -> np.ndarray:
    """Red is the column, green the row, in steps of `width / 256` and `height / 256`; blue is 0."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.arange(width)[None, :] * 256 // width
    image[..., 1] = np.arange(height)[:, None] * 256 // height
    return image


def photograph(height: int = 256, width: int = 340) -> np.ndarray:
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def read_off(crop: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(H,W,2): continuous x, y of the original written into a crop of `coordinates`; (H,W) bool: not fill."""
    xy = np.stack([(crop[..., 0] + 0.5) * width / 256, (crop[..., 1] + 0.5) * height / 256], -1)
    return xy, crop[..., 2] == 0


def mapped(matrix: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H,W,2): where the matrix puts the centres of the crop's pixels."""
    j, i = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([j, i, np.ones_like(j)], -1) @ matrix.astype(np.float64).T


@pytest.mark.parametrize("shape", [(256, 256), (256, 512), (512, 256)])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("crop", ["random_resized", "fit"])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"flip": 1},
        {"vertical_flip": 1},
        {"flip": 1, "vertical_flip": 1},
        {"rotate": 40},
        {"translate": 0.2},
        {"zoom": 0.3},
        {"shear": 20},
        {"flip": 0.5, "vertical_flip": 0.5, "rotate": 180, "translate": 0.1, "zoom": 0.2, "shear": 10},
    ],
)
def test_matrix_maps_every_pixel_to_where_it_came_from(
    shape: tuple[int, int], resize: str, crop: str, geometry: dict[str, float]
) -> None:
    spec = Preprocess(size=(96, 128), resize=resize, interpolation="bilinear", fill=(0, 0, 255))
    augmenter = Augmenter(Augment(**(STILL | {"crop": crop} | geometry)), spec, seed=3)
    for row in range(4):
        pixels, matrix = augmenter(coordinates(*shape), epoch=1, row=row)
        assert pixels.shape == (96, 128, 3)
        assert pixels.dtype == np.uint8
        assert matrix.shape == (2, 3)
        assert matrix.dtype == np.float32
        truth, inside = read_off(pixels, *shape)
        inside[[0, -1]] = inside[:, [0, -1]] = False  # resampling bends at the picture's edge
        error = np.abs(mapped(matrix, 96, 128) - truth)[inside]
        step = np.array([shape[1] / 256, shape[0] / 256])
        assert inside.mean() > 0.1
        assert np.quantile(error / step, 0.98) < 1.1  # one grey level, which bends only at the edge of the fill
        assert (
            np.abs((mapped(matrix, 96, 128) - truth)[inside].mean(0) / step).max() < 0.6
        )  # half a pixel of the crop is more


def test_the_whole_image_by_hand() -> None:
    spec = Preprocess(size=(50, 100), resize="squash")
    _, matrix = Augmenter(Augment(**WHOLE), spec, seed=0)(photograph(200, 300), epoch=0, row=0)
    np.testing.assert_allclose(matrix, [[3, 0, 0], [0, 4, 0]], atol=1e-6)
    _, matrix = Augmenter(Augment(**(WHOLE | {"flip": 1})), spec, seed=0)(photograph(200, 300), epoch=0, row=0)
    np.testing.assert_allclose(matrix, [[-3, 0, 300], [0, 4, 0]], atol=1e-4)


def test_fit_with_pad_keeps_a_leaf_whole_and_undistorted() -> None:
    spec = Preprocess(size=(80, 80), resize="pad", fill=(0, 0, 255))
    augmenter = Augmenter(Augment(**(STILL | {"crop": "fit", "crop_scale": (0.3, 1)})), spec, seed=0)
    places = set()
    for row in range(30):
        pixels, matrix = augmenter(coordinates(128, 256), epoch=0, row=row)
        assert matrix[0, 0] == pytest.approx(matrix[1, 1], rel=0.03)  # whole pixels of the border: up to 1 in 40
        rows = pixels[pixels[..., 2] == 0][:, 1].astype(int)
        assert rows.min() <= 4
        assert rows.max() >= 250  # top and bottom edge are both in sight
        places.add(round(float(matrix[1, 2]), 3))
    assert len(places) > 20


def test_random_resized_windows_have_the_area_and_aspect_they_should() -> None:
    spec, width, height = Preprocess(size=(32, 32)), 300, 400
    augmenter = Augmenter(Augment(**STILL), spec, seed=0)
    areas, ratios = [], []
    for row in range(600):
        _, matrix = augmenter(np.zeros((height, width, 3), np.uint8), epoch=0, row=row)
        w, h = matrix[0, 0] * 32, matrix[1, 1] * 32
        areas.append(w * h / (width * height))
        ratios.append(w / h)
        corner = matrix @ [32, 32, 1]
        assert matrix[:, 2].min() >= -1e-4
        assert corner[0] <= width + 1e-3
        assert corner[1] <= height + 1e-3
    assert min(areas) == pytest.approx(0.35, abs=0.02)
    assert max(areas) > 0.9
    assert min(ratios) == pytest.approx(0.75, abs=0.02)
    assert max(ratios) == pytest.approx(4 / 3, abs=0.03)
    narrow = [ratio for area, ratio in zip(areas, ratios, strict=True) if area < 0.5]  # where hardly one is refused
    assert np.mean(np.log(narrow)) == pytest.approx(0, abs=0.03)  # the aspect is uniform in its logarithm


def test_a_panorama_falls_back_to_a_central_window() -> None:
    _, matrix = Augmenter(Augment(**STILL), Preprocess(size=(10, 10)), seed=0)(
        np.zeros((30, 3000, 3), np.uint8), epoch=0, row=0
    )
    np.testing.assert_allclose(matrix, [[4, 0, 1480], [0, 3, 0]], rtol=1e-6)


@pytest.mark.parametrize("crop", ["random_resized", "fit"])
@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (7, 2), (3000, 20)])
def test_odd_shapes(crop: str, resize: str, size: tuple[int, int]) -> None:
    augmenter = Augmenter(Augment(crop=crop, rotate=10), Preprocess(size=(16, 24), resize=resize), seed=0)
    for row in range(10):
        pixels, matrix = augmenter(np.full((*size[::-1], 3), 255, np.uint8), epoch=0, row=row)
        assert pixels.shape == (16, 24, 3)
        assert np.isfinite(matrix).all()


def test_the_window_is_the_same_on_a_shrunk_copy() -> None:
    augmenter = Augmenter(Augment(), Preprocess(size=(64, 64)), seed=0)
    large = photograph(512, 680)
    small = np.array(Image.fromarray(large).resize((340, 256), Image.Resampling.BOX))
    for row in range(5):
        (a, whole), (b, half) = augmenter(large, epoch=0, row=row), augmenter(small, epoch=0, row=row)
        corners = np.array([[0, 0, 64, 64], [0, 64, 0, 64], [1, 1, 1, 1]])
        assert np.abs(whole @ corners - 2 * half @ corners).max() <= 1.5  # to whole pixels, of each
        assert np.abs(a.astype(int) - b).mean() < 10  # unrelated windows: about 40


def test_same_key_same_sample_and_no_two_keys_alike() -> None:
    settings, spec, image = Augment(hue=0.1, grayscale=0.2, rotate=10), Preprocess(size=(32, 32)), photograph()
    one, other = Augmenter(settings, spec, seed=5), Augmenter(settings, spec, seed=5)
    samples = set()
    for epoch in range(4):
        for row in range(25):
            pixels, matrix = one(image, epoch=epoch, row=row)
            samples.add(pixels.tobytes())
            assert pixels.tobytes() == other(image, epoch=epoch, row=row)[0].tobytes()
            assert matrix.tobytes() == other(image, epoch=epoch, row=row)[1].tobytes()
    assert len(samples) == 100
    assert Augmenter(settings, spec, seed=6)(image, epoch=0, row=0)[0].tobytes() not in samples


def test_a_worker_that_is_not_forked_augments_alike() -> None:
    augmenter = Augmenter(Augment(policy="randaugment"), Preprocess(size=(32, 32)), seed=3)
    image = photograph(48, 64)
    sent = pickle.loads(pickle.dumps(augmenter))  # noqa: S301
    for here, there in zip(augmenter(image, epoch=1, row=2), sent(image, epoch=1, row=2), strict=True):
        np.testing.assert_array_equal(there, here)


def test_transforms_of_one_sample_are_drawn_independently() -> None:
    """albumentations' own seeding gives every transform the same stream: then these flips would always coincide."""
    augmenter = Augmenter(Augment(**(WHOLE | {"flip": 0.5, "vertical_flip": 0.5})), Preprocess(size=(8, 8)), seed=0)
    signs = [augmenter(photograph(), epoch=0, row=row)[1] for row in range(200)]
    counts = np.unique([(m[0, 0] > 0) * 2 + (m[1, 1] > 0) for m in signs], return_counts=True)[1]
    assert len(counts) == 4
    assert counts.min() > 30


def jittered(image: np.ndarray, **amount: float) -> np.ndarray:
    """(200,) + image.shape: 200 draws of one kind of jitter."""
    spec = Preprocess(size=image.shape[:2], resize="squash", interpolation="nearest")
    augmenter = Augmenter(Augment(**(WHOLE | amount)), spec, seed=0)
    return np.stack([augmenter(image, epoch=0, row=row)[0] for row in range(200)]).astype(float)


def assert_uniform(factors: np.ndarray, amount: float, slack: float) -> None:
    grid = np.linspace(1 - amount, 1 + amount, len(factors))
    assert np.abs(np.sort(factors) - grid).max() < 0.13 * amount * 2 + slack  # Kolmogorov-Smirnov, p about 0.002


def test_brightness_is_a_uniform_factor() -> None:
    assert_uniform(jittered(np.full((4, 4, 3), 200, np.uint8), brightness=0.2)[:, 0, 0, 0] / 200, 0.2, 0.005)


def test_contrast_is_a_uniform_factor_about_the_mean() -> None:
    image = np.full((4, 4, 3), 80, np.uint8)
    image[:2] = 160
    images = jittered(image, contrast=0.4)
    assert_uniform((images[:, 0, 0, 0] - images[:, 3, 3, 0]) / 80, 0.4, 0.025)
    assert np.abs(images.mean((1, 2, 3)) - 120).max() <= 1


def test_saturation_is_a_uniform_factor_towards_grey() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 140, 100, 60
    images = jittered(image, saturation=0.3)[:, 0, 0]
    assert_uniform((images[:, 0] - images[:, 2]) / 80, 0.3, 0.025)
    luma = images @ [0.299, 0.587, 0.114]
    assert np.abs(luma - luma.mean()).max() <= 1.5


def test_greyscale_and_hue() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 0] = 200
    grey = jittered(image, grayscale=0.25)[:, 0, 0]
    share = (grey[:, 0] == grey[:, 2]).mean()
    assert 0.15 < share < 0.35
    hue = jittered(image, hue=0.5)[:, 0, 0]
    assert (hue.max(1) >= 198).all()  # value and saturation stay
    assert {tuple(np.flatnonzero(pixel >= 198)) for pixel in hue} >= {(0,), (1,), (2,)}


def test_nothing_to_do_is_the_deployed_fit() -> None:
    from fgvc.images.preprocess import fit

    spec = Preprocess(size=(40, 50), resize="squash", crop_pct=1)
    image = photograph(120, 240)
    pixels, _ = Augmenter(Augment(**WHOLE), spec, seed=0)(image, epoch=0, row=0)
    assert_alike(pixels, fit(Image.fromarray(image), spec))


def assert_alike(pixels: np.ndarray, expected: np.ndarray) -> None:
    """Assert that images are equal but for the rounding of the filter's weights and between its two passes."""
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 3
    assert difference.mean() < 0.15


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize("size", [(40, 56), (200, 180)])
def test_a_crop_is_what_pillow_makes_of_it(interpolation: str, size: tuple[int, int]) -> None:
    settings = Augment(**(STILL | {"crop_scale": (0.2, 1)}))
    augmenter = Augmenter(settings, Preprocess(size=size, interpolation=interpolation), seed=0)
    image = photograph()
    for row in range(10):
        pixels, matrix = augmenter(image, epoch=0, row=row)
        right, bottom = matrix @ [size[1], size[0], 1]
        window = [round(float(edge)) for edge in (matrix[0, 2], matrix[1, 2], right, bottom)]
        part = Image.fromarray(image).crop(window)
        assert_alike(pixels, np.asarray(part.resize(size[::-1], Image.Resampling[interpolation.upper()])))


def test_global_random_states_are_not_touched() -> None:
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    Augmenter(Augment(rotate=10, hue=0.1, grayscale=0.5), Preprocess(size=(16, 16)), seed=0)(
        photograph(), epoch=0, row=0
    )
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_settings_are_checked_and_cheap_to_import() -> None:
    for wrong in ({"crop_scale": (0.5, 1.5)}, {"crop_scale": (0.9, 0.5)}, {"crop_ratio": (0, 1)}, {"flip": 2}):
        with pytest.raises(ValidationError):
            Augment(**wrong)
    code = "import sys, fgvc.data.augment; assert not {'albumentations', 'cv2', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shrinking_leaves_enough_for_the_smallest_crop() -> None:
    assert Augment().shrink_to((160, 128)) == math.ceil(160 / math.sqrt(0.35)) == 271
