"""The box head: boxes in crops worked out by hand, losses against loops in float64, and a square that it finds."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fgvc.config.data import Augment
from fgvc.config.images import Preprocess
from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.data.augment import Augmenter
from fgvc.errors import FgvcError
from fgvc.runs.distributed import process_group
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch
from fgvc.techniques.box_head.settings import BoxHeadSettings
from fgvc.techniques.box_head.technique import in_crop
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique
from fgvc.training.forecast import forecast
from fgvc.training.session import open_session

CLASSES, SIZE = 3, (48, 64)
NAN = float("nan")
WHOLE = [[1.0, 0, 0], [0, 1, 0]]


def net(name: str = "test_resnet", **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **kwargs)


def batch(boxes: list | Tensor, geometry: list | None = None, size: tuple[int, int] = SIZE) -> Batch:
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    x = torch.randn(len(boxes), 3, *size, generator=torch.Generator().manual_seed(1))
    y = torch.arange(len(boxes)) % CLASSES
    matrices = torch.tensor([WHOLE] * len(boxes) if geometry is None else geometry)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=matrices, boxes=boxes)


def run_step(data: Batch, model: nn.Module | None = None, **chosen: object) -> tuple[StepModule, dict[str, Tensor]]:
    size = (data.x.shape[2], data.x.shape[3])
    step = StepModule(model or net(), {"box_head": build_technique(BoxHeadSettings(**chosen))}, size=size).train()
    return step, step(data, step.draw(data, 0.0, seed=0, step=0))[0]


# A stored image of 100 x 80 with a box at 20..60 across and 10..30 down.
BOX = [20.0, 10.0, 60.0, 30.0]
BY_HAND = {
    "the whole image": (WHOLE, (80, 100), [20, 10, 60, 30], 1),
    "halved": ([[2, 0, 0], [0, 2, 0]], (40, 50), [10, 5, 30, 15], 1),
    "squashed": ([[2, 0, 0], [0, 1, 0]], (80, 50), [10, 10, 30, 30], 1),
    "a crop from 30, 20": ([[1, 0, 30], [0, 1, 20]], (40, 40), [0, 0, 30, 10], 30 * 10 / 800),
    "a crop inside the box": ([[1, 0, 30], [0, 1, 12]], (8, 20), [0, 0, 20, 8], 20 * 8 / 800),
    "a crop beside the box": ([[1, 0, 60], [0, 1, 0]], (40, 40), [0, 10, 0, 30], 0),
    "flipped": ([[-1, 0, 100], [0, 1, 0]], (80, 100), [40, 10, 80, 30], 1),
    "upside down": ([[1, 0, 0], [0, -1, 80]], (80, 100), [20, 50, 60, 70], 1),
    # a quarter to the left: crop (x', y') of 80 x 100 shows (100 - y', x')
    "turned by 90 degrees": ([[0, -1, 100], [1, 0, 0]], (100, 80), [10, 40, 30, 80], 1),
    # by 45 degrees about (40, 20), to (40, 40): the hull of a 40 x 20 box has sides of 60 / sqrt 2
    "turned by 45 degrees": (
        [[0.5**0.5, -(0.5**0.5), 40], [0.5**0.5, 0.5**0.5, 20 - 40 * 2**0.5]],
        (80, 80),
        [40 - 30 * 0.5**0.5, 40 - 30 * 0.5**0.5, 40 + 30 * 0.5**0.5, 40 + 30 * 0.5**0.5],
        1,
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_boxes_in_crops_by_hand(case: str) -> None:
    geometry, size, expected, share = BY_HAND[case]
    boxes, shares = in_crop(torch.tensor([BOX]), torch.tensor([geometry], dtype=torch.float32), size)
    assert boxes.dtype == torch.float32
    assert boxes[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert float(shares[0]) == pytest.approx(share, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(row=st.integers(0, 10**6), flips=st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)]))
def test_a_painted_box_lies_in_the_crop_where_it_is_said_to(row: int, flips: tuple[float, float]) -> None:
    """With fgvc's own augmentation: what is white in the crop is the box, to a pixel of blur."""
    rng = np.random.default_rng(row)
    image = np.zeros((rng.integers(60, 90), rng.integers(60, 90), 3), dtype=np.uint8)
    width, height = rng.integers(20, 40, 2)
    left, top = rng.integers(0, image.shape[1] - width), rng.integers(0, image.shape[0] - height)
    image[top : top + height, left : left + width] = 255
    augment = Augment(
        flip=flips[0], vertical_flip=flips[1], crop_scale=(0.5, 1.0), brightness=0, contrast=0, saturation=0
    )
    crop, geometry = Augmenter(augment, Preprocess(size=(56, 64)), seed=0)(image, epoch=0, row=row)
    boxes = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
    moved, shares = in_crop(boxes, torch.from_numpy(geometry)[None], (56, 64))
    white = np.argwhere(crop[..., 0] > 127)
    if float(shares[0]) > 0.1:
        (y0, x0), (y1, x1) = white.min(0), white.max(0) + 1
        assert moved[0].tolist() == pytest.approx([x0, y0, x1, y1], abs=1.5)


@pytest.mark.parametrize("box", [[NAN] * 4, [20, 10, 20, 30], [20, 10, 60, 10], [20, 10, 20, 10]])
def test_no_box_or_an_empty_one_does_not_count(box: list) -> None:
    assert torch.isnan(in_crop(torch.tensor([box]), torch.tensor([WHOLE]), SIZE)[1]).all()
    step, losses = run_step(batch([box, BOX]))
    assert step.contexts["box_head"].draw[:, 0].isfinite().tolist() == [False, True]
    assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize(("visible", "counts"), [(0.37, True), (0.375, True), (0.38, False)])
def test_a_box_counts_from_the_share_that_is_seen(visible: float, counts: bool) -> None:
    """The crop starts at 45 across: 15 of 40 columns are left, 0.375."""
    data = batch([BOX], [[[1.0, 0, 45], [0, 1, 0]]])
    _, losses = run_step(data, visible=visible)
    assert ("box_head.box" in losses) == counts
    assert ("box_head.iou" in losses) == counts


def overlaps(p: list[float], t: list[float], kind: str) -> tuple[float, float]:
    """The loss and the IoU of two boxes left, top, right, bottom, from the formulas."""
    across, down = min(p[2], t[2]) - max(p[0], t[0]), min(p[3], t[3]) - max(p[1], t[1])
    common = max(across, 0) * max(down, 0)
    union = (p[2] - p[0]) * (p[3] - p[1]) + (t[2] - t[0]) * (t[3] - t[1]) - common
    iou = common / union
    hull = max(p[2], t[2]) - min(p[0], t[0]), max(p[3], t[3]) - min(p[1], t[1])
    if kind == "giou":
        return 1 - iou + (hull[0] * hull[1] - union) / (hull[0] * hull[1]), iou
    apart = ((p[0] + p[2] - t[0] - t[2]) / 2) ** 2 + ((p[1] + p[3] - t[1] - t[3]) / 2) ** 2
    loss = 1 - iou + apart / (hull[0] ** 2 + hull[1] ** 2)
    if kind == "ciou":
        v = 4 / math.pi**2 * (math.atan2(t[2] - t[0], t[3] - t[1]) - math.atan2(p[2] - p[0], p[3] - p[1])) ** 2
        loss += v * v / (1 - iou + v)
    return loss, iou


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_the_terms_are_their_formulas(kind: str) -> None:
    boxes = [[10, 5, 50, 35], [NAN] * 4, [0, 0, 64, 48], [2, 3, 7, 43], [50, 30, 70, 54]]
    data = batch(boxes)
    step, losses = run_step(data, loss=kind, box=0.5, confidence=0.25, hidden=7)
    conv, _, _, _, linear = step.branches["box_head"]["box"]
    with torch.no_grad():
        f = net().train().forward_features(data.x).double()
        assert f.shape[2:] == (2, 2), "what the last layer reads is the map itself"
        total, sure, mean = 0.0, 0.0, 0.0
        for b in (0, 2, 3, 4):
            h = torch.einsum("oc,cij->oij", conv.weight.double()[:, :, 0, 0], f[b]) + conv.bias.double()[:, None, None]
            outputs = (linear.weight.double() @ h.clamp(min=0).flatten() + linear.bias.double()).tolist()
            cx, cy, w, h = (1 / (1 + math.exp(-v)) for v in outputs[:4])
            w, h = 0.01 + 0.99 * w, 0.01 + 0.99 * h
            box = [(cx - w / 2) * 64, (cy - h / 2) * 48, (cx + w / 2) * 64, (cy + h / 2) * 48]
            left, top, right, bottom = boxes[b]
            loss, iou = overlaps(box, [left, top, min(right, 64), min(bottom, 48)], kind)
            c = 1 / (1 + math.exp(-outputs[4]))
            total, mean = total + loss / 4, mean + iou / 4
            sure -= (iou * math.log(c) + (1 - iou) * math.log(1 - c)) / 4
    assert losses["box_head.box"].item() == pytest.approx(total, rel=1e-4)
    assert losses["box_head.iou"].item() == pytest.approx(mean, rel=1e-4)
    assert losses["box_head.confidence"].item() == pytest.approx(sure, rel=1e-4)
    whole = losses["base"] + 0.5 * losses["box_head.box"] + 0.25 * losses["box_head.confidence"]
    torch.testing.assert_close(losses["loss"], whole)


def test_the_confidence_does_not_teach_the_box() -> None:
    step, losses = run_step(batch([BOX] * 2))
    losses["box_head.confidence"].backward()
    rows = step.branches["box_head"]["box"][-1].weight.grad.abs().amax(1)
    assert rows[:4].max() == 0
    assert rows[4] > 0
    step, losses = run_step(batch([BOX] * 2), confidence=0)
    losses["box_head.box"].backward()
    assert step.branches["box_head"]["box"][-1].out_features == 4
    assert "box_head.confidence" not in losses
    assert next(step.net.parameters()).grad.abs().max() > 0
    assert all(p.grad is not None for p in step.branches.parameters())


def test_mixed_images_and_batches_without_a_box_are_left_out() -> None:
    techniques = {"mixup": build_technique(MixupSettings(alpha=1.0)), "box_head": build_technique(BoxHeadSettings())}
    step = StepModule(net(), techniques, size=SIZE).train()
    data = batch([BOX] * 4)
    losses, _ = step(data, step.draw(data, 0.0, seed=0, step=0))
    assert not [name for name in losses if name.startswith("box_head")]
    _, losses = run_step(batch([[NAN] * 4] * 2))
    assert set(losses) == {"base", "loss"}


def test_the_second_pass_over_a_steps_views_has_the_same_terms() -> None:
    data = batch([BOX] * 2)
    step, losses = run_step(data)
    draws = step.draw(data, 0.0, seed=0, step=0)
    _, views = step(data, draws)
    again, _ = step(data, draws, views)
    assert again["box_head.box"].item() == pytest.approx(losses["box_head.box"].item())


def test_the_preview_shows_the_box() -> None:
    step, _ = run_step(batch([BOX, [NAN] * 4]))
    (_, mask) = step.contexts["box_head"].shown["box"]
    expected = torch.zeros(2, *SIZE, dtype=torch.bool)
    expected[0, 10:30, 20:60] = True
    assert torch.equal(mask, expected)


def test_it_finds_a_bright_square() -> None:
    """Clearly better than the best of all answers that do not look at the image."""
    rng = torch.Generator().manual_seed(0)

    def bright_squares(count: int) -> Batch:
        x = 0.3 * torch.randn(count, 3, 64, 64, generator=rng)
        sides = torch.randint(16, 32, (count, 2), generator=rng)
        corners = (torch.rand(count, 2, generator=rng) * (64 - sides)).long()
        for image, (left, top), (wide, high) in zip(x, corners.tolist(), sides.tolist(), strict=True):
            image[:, top : top + high, left : left + wide] += 2
        data = batch(torch.cat([corners, corners + sides], dim=1).float(), size=(64, 64))
        data.x = data.x_clean = x
        return data

    test = bright_squares(200)
    truth = test.boxes.tolist()
    constant = max(
        sum(overlaps([32 - s, 32 - s, 32 + s, 32 + s], t, "diou")[1] for t in truth) / len(truth) for s in range(4, 32)
    )
    step = StepModule(net(), {"box_head": build_technique(BoxHeadSettings())}, size=(64, 64)).train()
    optimizer = torch.optim.AdamW(step.parameters(), lr=3e-3)
    for number in range(60):
        data = bright_squares(32)
        losses, _ = step(data, step.draw(data, 0.0, seed=0, step=number))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        losses, _ = step(test, step.draw(test, 0.0, seed=0, step=0))
    print(losses["box_head.iou"], constant)
    assert losses["box_head.iou"] > constant + 0.15
    surprise = losses["box_head.confidence"]
    iou = float(losses["box_head.iou"])
    assert surprise < -(iou * math.log(iou) + (1 - iou) * math.log(1 - iou)) + 0.02, "about as sure as it may be"


def test_data_without_boxes_are_refused_before_training(recipe_tree: dict, boxed_tree: dict, tmp_path: Path) -> None:
    message = r"techniques\.box_head: learns from the object's box .* no boxes; .* set techniques\.box_head=null"
    with pytest.raises(FgvcError, match=message):  # of a kind that never has any, when the recipe is read
        validate(Recipe, recipe_tree | {"techniques": {"box_head": {}}}, where="test")
    root = Path(shutil.copytree(boxed_tree["data"]["root"], tmp_path / "data"))
    (root / "bounding_boxes.txt").unlink()
    data = {"kind": "cub", "root": str(root)}
    recipe = validate(Recipe, boxed_tree | {"data": data, "techniques": {"box_head": {}}}, where="test")
    with pytest.raises(FgvcError, match=message):
        forecast(recipe)
    with process_group(recipe.train) as process, pytest.raises(FgvcError, match=message), open_session(recipe, process):
        pass


def test_a_dry_run_makes_up_its_boxes(boxed_tree: dict) -> None:
    costs = forecast(validate(Recipe, boxed_tree | {"techniques": {"box_head": {}}}, where="test"))
    assert costs.forwards == 1
    assert costs.techniques == {"box_head": "0"}


def test_a_batch_without_boxes_is_an_error() -> None:
    data = batch([BOX])
    data.boxes = None
    with pytest.raises(FgvcError, match="no boxes"):
        run_step(data)


def test_tokens_and_channels_last_maps_do_as_well(tmp_path: Path) -> None:
    swin = {"window_size": 2, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "img_size": 64}
    for model in (net("test_vit", img_size=64), net("swin_tiny_patch4_window7_224", **swin)):
        _, losses = run_step(batch([BOX] * 2, size=(64, 64)), model)
        losses["box_head.box"].backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
