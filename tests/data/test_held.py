"""However a camera was held, and however large the file: boxes and parts lie on what was drawn, wherever a set is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.dtypes import StringDType
from PIL import Image, ImageDraw

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.data.augment import Augmenter
from fgvc.data.cache import DecodeCache
from fgvc.data.index import ImageIndex
from fgvc.data.loader import evaluation_loader, train_loader
from fgvc.evaluation.localize import annotations_in_input
from fgvc.techniques.box_head.technique import in_crop

STORED = {3: (60, 40), 4: (60, 40), 5: (40, 60), 6: (40, 60), 7: (40, 60), 8: (40, 60), 1: (60, 40), 2: (60, 40)}
BOX = (12, 6, 32, 20)  # of the upright picture of 60 x 40
BACK = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    """One upright scene - a white box on black - stored in all eight ways, with boxes and a part as they lie in the file."""
    scene = Image.new("RGB", (60, 40))
    ImageDraw.Draw(scene).rectangle((12, 6, 31, 19), "white")
    boxes, parts = [], []
    for orientation in range(1, 9):
        turn = BACK[orientation]
        stored = scene if turn is None else scene.transpose(turn)
        assert stored.size == STORED[orientation]
        left, top, right, bottom = stored.convert("L").getbbox()
        boxes.append([left, top, right - left, bottom - top])
        mark = Image.new("L", (60, 40))
        mark.putpixel((14, 8), 255)
        x, y, *_ = (mark if turn is None else mark.transpose(turn)).getbbox()
        parts.append([[x + 0.5, y + 0.5, 1.0], [1.0, 1.0, 0.0]])
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"{orientation}.png", exif=exif)
    return ImageIndex(
        root=tmp_path, classes=("a", "b"), paths=np.array([f"{k}.png" for k in range(1, 9)], StringDType()),
        labels=np.arange(8, dtype=np.int32) % 2, splits=np.zeros(8, np.int8), boxes=np.array(boxes, np.float32),
        parts=np.array(parts, np.float32), part_names=("tip", "tail"),
    )  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_training_finds_the_box_in_its_crop(index: ImageIndex, tmp_path: Path, cached: bool) -> None:
    cache = DecodeCache.open(index, np.arange(8), side=30, folder=tmp_path / "cache") if cached else None
    spec = Preprocess(size=(40, 60), resize="squash", crop_pct=1)
    augmenter = Augmenter(Augment(flip=0.5, crop="fit", crop_scale=(1, 1), brightness=0, contrast=0, saturation=0), spec, 0)
    source = train_loader(index, np.arange(8), augmenter=augmenter, batch_size=8, seed=0, workers=0, cache=cache)
    batch = next(source.epoch(0))
    source.close()
    assert batch.boxes is not None
    np.testing.assert_array_equal(batch.boxes.numpy(), [BOX] * 8)
    boxes, shares = in_crop(batch.boxes, batch.geometry, (40, 60))
    assert shares.tolist() == pytest.approx([1] * 8)
    grey, boxes = batch.images.float().mean(3), boxes.round().int()
    for image, (left, top, right, bottom) in zip(grey, boxes.tolist(), strict=True):
        inside = torch.zeros(40, 60, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert image[inside].mean() > 225
        assert image[~inside].mean() < 8


def test_evaluation_finds_box_and_parts_in_its_input(index: ImageIndex) -> None:
    spec = Preprocess(size=(80, 120), resize="squash", crop_pct=1)
    (batch,) = evaluation_loader(index, np.arange(8), spec=spec, batch_size=8, workers=0)
    assert batch.sizes.tolist() == [[40, 60]] * 8
    boxes, parts = annotations_in_input(batch, spec)
    assert boxes.tolist() == [[24, 12, 64, 40]] * 8
    assert parts is not None
    assert parts[:, 0].tolist() == [[29, 17]] * 8
    assert parts[:, 1].isnan().all()


def test_boxes_fit_a_reduced_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgvc.images.decode.MAX_PIXELS", 3000)
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = Image.new("RGB", (80, 120))  # stored; upright 120 x 80
    ImageDraw.Draw(scene).rectangle((40, 24, 67, 63), "white")
    scene.save(tmp_path / "1.jpg", exif=exif, quality=95)
    index = ImageIndex(
        root=tmp_path, classes=("a", "b"), paths=np.array(["1.jpg"], StringDType()), labels=np.zeros(1, np.int32),
        splits=np.zeros(1, np.int8), boxes=np.array([[40, 24, 28, 40]], np.float32),
    )  # fmt: skip
    spec = Preprocess(size=(40, 60), resize="squash", crop_pct=1, mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = evaluation_loader(index, np.arange(1), spec=spec, batch_size=1, workers=0)
    assert batch.sizes.tolist() == [[80, 120]]
    (left, top, right, bottom) = annotations_in_input(batch, spec)[0][0].round().int().tolist()
    light = batch.images[0].mean(0)
    assert light[top:bottom, left:right].mean() > 0.9
    assert light.sum() - light[top:bottom, left:right].sum() < 0.1 * light.sum()


def test_a_box_outside_counts_as_unknown(index: ImageIndex) -> None:
    boxes = index.boxes.copy()
    boxes[2] = [500, 500, 9, 9]
    spec = Preprocess(size=(40, 60))
    (batch,) = evaluation_loader(replace(index, boxes=boxes), np.arange(8), spec=spec, batch_size=8, workers=0)
    assert np.isnan(batch.boxes[2]).all()
    assert np.isfinite(np.delete(batch.boxes, 2, axis=0)).all()
