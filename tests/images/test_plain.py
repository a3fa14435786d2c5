"""Resampling without antialiasing, against OpenCV and torch, and by a formula in float64."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fgvc.config.images import Deploy, Preprocess
from fgvc.data.augment import _resampled
from fgvc.data.loader import TrainBatch
from fgvc.errors import FgvcError
from fgvc.images.plain import resample
from fgvc.images.preprocess import described, differences, fit, preprocess
from fgvc.models.weights import Weights, preprocess_for
from fgvc.training.batch import Normalise, to_batch

OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
SIZES = [
    ((97, 133), (64, 64)),
    ((97, 133), (200, 260)),
    ((300, 200), (150, 100)),
    ((301, 199), (33, 47)),
    ((5, 3), (17, 1)),
]


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", OPENCV)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resampling_equals_opencvs(interpolation: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    """In floats, where OpenCV does not compute in fixed point, to its rounding; in bytes to one level."""
    pixels = textured(*old)
    resized = resample(pixels, new, interpolation)  # type: ignore[arg-type]
    floats = cv2.resize(pixels.astype(np.float32), new[::-1], interpolation=OPENCV[interpolation])
    assert np.abs(resized - floats.clip(0, 255)).max() <= 0.52
    bytes_ = cv2.resize(pixels, new[::-1], interpolation=OPENCV[interpolation])
    assert np.abs(resized.astype(int) - bytes_).max() <= 1


@pytest.mark.parametrize("interpolation", OPENCV)
@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resampling_equals_torchs_in_float64(interpolation: str, old: tuple[int, int], new: tuple[int, int]) -> None:
    pixels = textured(*old)
    x = torch.from_numpy(pixels).double().permute(2, 0, 1)[None]
    by_torch = F.interpolate(x, new, mode=interpolation, antialias=False)[0].permute(1, 2, 0).numpy().clip(0, 255)
    resized = resample(pixels, new, interpolation)  # type: ignore[arg-type]
    assert np.abs(resized - by_torch).max() <= 0.5 + 1e-3


def test_a_window_is_a_part_of_the_whole() -> None:
    pixels = textured(61, 47)
    for interpolation in OPENCV:
        whole = resample(pixels, (90, 30), interpolation)  # type: ignore[arg-type]
        part = resample(pixels, (90, 30), interpolation, (7, 2, 55, 29))  # type: ignore[arg-type]
        np.testing.assert_array_equal(part, whole[7:55, 2:29])


def test_the_same_size_is_the_same_image() -> None:
    pixels = textured(9, 12)
    for interpolation in OPENCV:
        np.testing.assert_array_equal(resample(pixels, (9, 12), interpolation), pixels)  # type: ignore[arg-type]


def by_opencv(image: np.ndarray, spec: Preprocess) -> np.ndarray:
    """The resize of each mode as an OpenCV program has it."""
    h, w = image.shape[:2]
    rows, columns = (int(side / spec.crop_pct) for side in spec.size)
    how = OPENCV[spec.interpolation]
    if spec.resize == "squash":
        canvas = cv2.resize(image, (columns, rows), interpolation=how)
    elif spec.resize == "pad":
        scale = min(rows / h, columns / w)
        small = cv2.resize(image, (round(w * scale), round(h * scale)), interpolation=how)
        down, right = rows - small.shape[0], columns - small.shape[1]
        canvas = cv2.copyMakeBorder(
            small, down // 2, down - down // 2, right // 2, right - right // 2, cv2.BORDER_CONSTANT, value=spec.fill
        )
    else:
        size = (rows, int(rows * w / h)) if w >= h else (int(columns * h / w), columns)
        canvas = cv2.resize(image, size[::-1], interpolation=how)
    top, left = (round((whole - side) / 2) for whole, side in zip(canvas.shape[:2], spec.size, strict=True))
    return canvas[top : top + spec.size[0], left : left + spec.size[1]]


@pytest.mark.parametrize("interpolation", OPENCV)
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_the_whole_preprocessing_is_an_opencv_programs(resize: str, crop_pct: float, interpolation: str) -> None:
    for (height, width), fill in (((60, 90), 114), ((90, 60), 0), ((31, 40), 255), ((200, 30), 127)):
        image = textured(height, width, seed=height)
        spec = Preprocess(
            size=(28, 28), resize=resize, crop_pct=crop_pct, interpolation=interpolation, antialias=False, fill=fill,
            channel_order="bgr", input_range=255, mean=(104, 117, 123), std=(1, 1, 1),
        )  # type: ignore[arg-type]  # fmt: skip
        expected = by_opencv(image, spec)
        assert np.abs(fit(Image.fromarray(image), spec).astype(int) - expected).max() <= 1
        blob = expected[..., ::-1].astype(np.float32) - np.float32([104, 117, 123])
        assert np.abs(preprocess(Image.fromarray(image), spec) - blob.transpose(2, 0, 1)).max() <= 1.001


def test_antialiasing_changes_the_image_and_is_the_default() -> None:
    image = Image.fromarray(textured(200, 300))
    with_, without = (
        fit(image, Preprocess(size=(32, 32), interpolation="bilinear", antialias=value)) for value in (True, False)
    )
    assert with_.std() < without.std() / 2  # the mean of 36 pixels varies less than one of them
    np.testing.assert_array_equal(with_, fit(image, Preprocess(size=(32, 32), interpolation="bilinear")))


def test_a_strip_is_never_built_as_a_whole() -> None:
    for size in ((1, 2_000_000), (2_000_000, 1)):
        strip = Image.new("RGB", size, (7, 8, 9))
        for resize in ("crop", "pad", "squash"):
            pixels = fit(strip, Preprocess(size=(64, 64), resize=resize, antialias=False, fill=3))  # type: ignore[arg-type]
            assert pixels.shape == (64, 64, 3)
            assert (pixels[32, 32] == (7, 8, 9)).all()


def test_training_views_are_resampled_alike() -> None:
    image = textured(50, 80)
    spec = Preprocess(size=(24, 24), interpolation="bilinear", antialias=False)
    np.testing.assert_array_equal(
        _resampled(image, (10, 5, 70, 45), (24, 24), spec), resample(image[5:45, 10:70], (24, 24), "bilinear")
    )


def test_views_of_smaller_training_images_are_reduced_alike() -> None:
    """`image.train_scale`: rendered once at the largest size, and reduced."""
    images = torch.from_numpy(np.stack([textured(48, 40, seed) for seed in range(2)]))
    zeros = torch.zeros(2, dtype=torch.int64)
    raw = TrainBatch(images, zeros, zeros, torch.zeros(2, 2, 3), [], None)
    for interpolation in ("bilinear", "bicubic"):
        spec = Preprocess(
            size=(48, 40), interpolation=interpolation, antialias=False, input_range=255, mean=(0, 0, 0), std=(1, 1, 1)
        )  # type: ignore[arg-type]
        normalise = Normalise(spec, torch.device("cpu"), torch.contiguous_format)
        x = to_batch(raw, normalise, (24, 16)).x.permute(0, 2, 3, 1).numpy()
        expected = np.stack([resample(one, (24, 16), interpolation) for one in images.numpy()])  # type: ignore[arg-type]
        assert np.abs(x - expected).max() <= 1


def test_antialias_is_recorded_described_and_compared() -> None:
    before, after = Preprocess(size=(8, 8)), Preprocess(size=(8, 8), antialias=False)
    assert "antialias" not in before.model_dump_json()  # as older bundles have it
    assert '"antialias":false' in after.model_dump_json()
    assert "antialias False" in described(after)
    assert differences(before, after) == ["antialias: True against False"]


def test_a_recipe_sets_antialias() -> None:
    weights = Weights(origin="a file", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="lanczos", crop_pct=0.9)
    deploy = Deploy(antialias=False, interpolation="bilinear", resize="pad", fill=114)  # type: ignore[arg-type]
    spec = preprocess_for(deploy, (8, 8), weights)
    assert (spec.antialias, spec.fill) == (False, (114, 114, 114))
    with pytest.raises(
        FgvcError, match=r"deploy\.antialias: false is for bilinear and bicubic alone, and the weights ask for"
    ):
        preprocess_for(Deploy(antialias=False), (8, 8), weights)
    with pytest.raises(ValueError, match=r"false is for interpolation bilinear and bicubic alone, not lanczos"):
        Deploy(antialias=False, interpolation="lanczos")
