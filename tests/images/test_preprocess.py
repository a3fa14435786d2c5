"""Against torchvision, and by hand where no reference exists."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fgvc.config.images import Preprocess
from fgvc.images.preprocess import described, differences, fit, normalise, placed, preprocess, render, resized_size

TORCHVISION = {"bilinear": 2, "bicubic": 3, "nearest": 0, "lanczos": 1, "box": 4, "hamming": 5}


def textured(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", TORCHVISION)
@pytest.mark.parametrize(("size", "fraction"), [(32, 0.875), (33, 0.9), (24, 1.0), (160, 0.95)])
def test_crop_equals_torchvision_bit_for_bit(interpolation: str, size: int, fraction: float) -> None:
    spec = Preprocess(size=(size, size), crop_pct=fraction, interpolation=interpolation)
    mode = T.functional._interpolation_modes_from_int(TORCHVISION[interpolation])
    reference = T.Compose([T.Resize(int(size / fraction), mode), T.CenterCrop(size)])
    for height, width in [(40, 40), (51, 77), (130, 41), (256, 341), (37, 36), (3, 2)]:
        image = textured(height, width)
        np.testing.assert_array_equal(fit(image, spec), np.asarray(reference(image)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(8, 40), st.sampled_from([0.7, 0.875, 0.9, 0.95, 1.0]))
def test_crop_equals_torchvision_for_any_shape(height: int, width: int, size: int, fraction: float) -> None:
    spec = Preprocess(size=(size, size), crop_pct=fraction, interpolation="bilinear")
    image = textured(height, width)
    expected = np.asarray(T.Compose([T.Resize(int(size / fraction)), T.CenterCrop(size)])(image)).astype(int)
    fitted = fit(image, spec).astype(int)
    if max(height, width) <= 10 * min(height, width):
        np.testing.assert_array_equal(fitted, expected)
    else:  # strips are resampled straight into the crop: the same up to rounding
        assert np.abs(fitted - expected).max() <= 1


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("input_range", [1, 255])
def test_normalise_by_hand(order: str, input_range: int) -> None:
    mean, std = (0.1 * input_range, 0.2 * input_range, 0.3 * input_range), (0.5 * input_range, 0.25, 2.0)
    spec = Preprocess(size=(1, 1), channel_order=order, input_range=input_range, mean=mean, std=std)
    pixels = np.array([[[[10, 20, 30]]], [[[255, 0, 128]]]], dtype=np.uint8)
    normalised = normalise(pixels, spec)
    for image in range(2):
        values = [float(v) for v in pixels[image, 0, 0]]
        values = values[::-1] if order == "bgr" else values
        expected = [(v * input_range / 255 - m) / s for v, m, s in zip(values, mean, std, strict=True)]
        np.testing.assert_allclose(normalised[image, :, 0, 0], expected, rtol=2e-6)


def test_normalise_leaves_its_input_alone() -> None:
    pixels = np.full((4, 4, 3), 7, dtype=np.uint8)
    normalise(pixels, Preprocess(size=(4, 4)))
    assert (pixels == 7).all()


def test_pad_keeps_the_whole_leaf() -> None:
    leaf = Image.new("RGB", (200, 100), (255, 0, 0))
    fitted = fit(leaf, Preprocess(size=(40, 40), resize="pad", crop_pct=1, fill=(1, 2, 3)))
    assert (fitted[10:30] == (255, 0, 0)).all()
    assert (fitted[:10] == (1, 2, 3)).all()
    assert (fitted[30:] == (1, 2, 3)).all()


def test_pad_then_crop_fraction_keeps_the_centre() -> None:
    tall = Image.new("RGB", (10, 40), (0, 255, 0))
    fitted = fit(tall, Preprocess(size=(20, 20), resize="pad", crop_pct=0.5, fill=(9, 9, 9)))
    assert (fitted[:, 5:15] == (0, 255, 0)).all()  # canvas 40 x 40: 10 columns wide, cut to the middle 20 x 20
    assert (fitted[:, :5] == 9).all()
    assert (fitted[:, 15:] == 9).all()


def test_squash_fills_whatever_the_aspect() -> None:
    image = textured(50, 100)
    fitted = fit(image, Preprocess(size=(20, 30), resize="squash", crop_pct=1, interpolation="bilinear"))
    np.testing.assert_array_equal(fitted, np.asarray(image.resize((30, 20), Image.Resampling.BILINEAR)))


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300), st.integers(1, 300))
def test_crop_covers_the_canvas_and_keeps_one_side(h: int, w: int, rows: int, columns: int) -> None:
    height, width = resized_size((h, w), (rows, columns), Preprocess(size=(rows, columns)))
    assert height >= rows
    assert width >= columns
    assert height == rows or width == columns


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 100_000), (100_000, 1), (2, 4000), (999, 1)])
def test_extreme_shapes(resize: str, height: int, width: int) -> None:
    image = Image.new("RGB", (width, height), (10, 200, 30))
    fitted = fit(image, Preprocess(size=(24, 40), resize=resize, crop_pct=0.875))
    assert fitted.shape == (24, 40, 3)
    assert (fitted == (10, 200, 30)).all(-1).any()


def test_render_is_a_plain_resample_of_the_box() -> None:
    image = textured(60, 80)
    rendered = render(image, (10, 20, 50, 40), (20, 40), "bicubic")
    np.testing.assert_array_equal(np.asarray(rendered), np.asarray(image)[20:40, 10:50])


def test_preprocess_feeds_torch_without_a_copy() -> None:
    x = preprocess(textured(30, 30), Preprocess(size=(16, 16)))
    assert torch.from_numpy(x).data_ptr() == x.ctypes.data


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("fraction", [1.0, 0.875, 0.6])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
@pytest.mark.parametrize(("height", "width"), [(120, 170), (301, 211), (40, 33), (64, 900)])
def test_a_point_lies_where_its_dot_is_found(
    resize: str, fraction: float, size: tuple[int, int], height: int, width: int
) -> None:
    spec = Preprocess(size=size, resize=resize, crop_pct=fraction, interpolation="bilinear", fill=(0, 0, 0))
    for x, y in [(0.5, 0.5), (0.48, 0.53), (0.51, 0.47)]:
        point = np.array([x * width, y * height])
        inside = placed(point, (height, width), spec)
        if not (16 < inside[0] < size[1] - 16 and 16 < inside[1] < size[0] - 16):  # a part of the dot would be cut off
            assert (resize, height, width) == ("crop", 64, 900)
            continue
        squared = (np.arange(width) + 0.5 - point[0]) ** 2 + (np.arange(height) + 0.5 - point[1])[:, None] ** 2
        dot = Image.fromarray(np.uint8(255 * np.exp(-squared / (0.05 * min(height, width)) ** 2)))
        fitted = fit(Image.merge("RGB", [dot] * 3), spec)[:, :, 0].astype(float)
        across, down = np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5
        middle = (fitted.sum(0) @ across / fitted.sum(), fitted.sum(1) @ down / fitted.sum())
        np.testing.assert_allclose(inside, middle, atol=0.25)


def test_corners_by_hand() -> None:
    corners = np.array([(0.0, 0.0), (200.0, 100.0)])
    plain = {"size": (40, 40), "crop_pct": 1}
    for resize, expected in {
        "crop": [(-20, 0), (60, 40)],
        "pad": [(0, 10), (40, 30)],
        "squash": [(0, 0), (40, 40)],
    }.items():
        np.testing.assert_array_equal(placed(corners, (100, 200), Preprocess(resize=resize, **plain)), expected)
    half = Preprocess(size=(40, 40), resize="pad", crop_pct=0.5)  # a canvas of 80 x 80, its middle kept
    np.testing.assert_array_equal(placed(corners, (100, 200), half), [(-20, 0), (60, 40)])


IMAGENET = Preprocess(size=(20, 20))
PAD = Preprocess(size=(20, 20), resize="pad", crop_pct=1.0)


@pytest.mark.parametrize(
    ("one", "changed", "keys"),
    [
        (IMAGENET, {"fill": (0, 0, 0)}, []),  # nothing pads
        (IMAGENET, {"crop_pct": 0.88}, []),  # 22 pixels, as 20 / 0.875
        (IMAGENET, {"crop_pct": 0.8}, ["crop_pct"]),
        (IMAGENET, {"input_range": 255, "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}, []),
        (IMAGENET, {"input_range": 255}, ["input_range"]),
        (IMAGENET, {"mean": (0.5, 0.456, 0.406)}, ["mean"]),
        (IMAGENET, {"std": (0.5, 0.5, 0.5)}, ["std"]),
        (IMAGENET, {"mean": (0.5,) * 3, "std": (0.5,) * 3}, ["mean", "std"]),
        (IMAGENET, {"resize": "squash"}, ["resize"]),
        (IMAGENET, {"resize": "pad", "fill": (1, 2, 3)}, ["resize"]),
        (IMAGENET, {"interpolation": "bilinear"}, ["interpolation"]),
        (IMAGENET, {"size": (20, 24)}, ["size"]),
        (IMAGENET, {"channel_order": "bgr"}, ["channel_order", "mean", "std"]),  # the numbers stay, their colours don't
        (
            IMAGENET,
            {"channel_order": "bgr", "mean": (0.406, 0.456, 0.485), "std": (0.225, 0.224, 0.229)},
            ["channel_order"],
        ),
        (PAD, {"fill": (0, 0, 0)}, ["fill"]),
        (PAD, {"crop_pct": 0.5}, ["crop_pct"]),
    ],
)
def test_only_what_makes_another_input_is_a_difference(one: Preprocess, changed: dict, keys: list[str]) -> None:
    other = Preprocess.model_validate(one.model_dump() | changed)
    pictures = [textured(31, 47), textured(60, 21, seed=1), textured(20, 20, seed=2)]
    inputs = [[preprocess(image, spec) for image in pictures] for spec in (one, other)]
    same = all(a.shape == b.shape and np.allclose(a, b, atol=1e-4) for a, b in zip(*inputs, strict=True))
    lines = differences(one, other)
    assert same == (not lines), "what the pixels say"
    assert [re.split("[: ]", line)[0] for line in lines] == keys
    assert [re.split("[: ]", line)[0] for line in differences(other, one)] == keys


def test_mean_and_std_in_bytes_equal_those_in_shares() -> None:
    """(x / 255 - 0.5) / 0.5 is (x - 127.5) / 127.5."""
    one = Preprocess(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    other = Preprocess(size=(8, 8), mean=(127.5,) * 3, std=(127.5,) * 3, input_range=255)
    assert differences(one, other) == []
    nearly = other.model_copy(update={"mean": (127.5, 127.5, 127.0)})
    assert differences(one, nearly) == [
        "input_range: 1 against 255",
        "mean of R, G, B: (0.5, 0.5, 0.5) against (127.5, 127.5, 127)",
        "std of R, G, B: (0.5, 0.5, 0.5) against (127.5, 127.5, 127.5)",
    ]


def test_a_preprocessing_is_described_without_what_has_no_effect() -> None:
    assert "fill" not in described(IMAGENET)
    assert "mean (0.485, 0.456, 0.406)" in described(IMAGENET)
    assert "fill (128, 128, 128)" in described(PAD)
