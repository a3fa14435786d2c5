"""Attention cropping and dropping with attention maps that are known, and its branch against loops in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws, Output, View
from fgvc.techniques.attention_crop_drop.attention import BilinearAttention, pick
from fgvc.techniques.attention_crop_drop.settings import SCALE, AttentionCropDropSettings
from fgvc.techniques.attention_crop_drop.technique import AttentionCropDrop
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique

SIDE, CELL, KIND = 64, 8, "attention_crop_drop"
CROP, DROP = f"{KIND}.crop", f"{KIND}.drop"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Pooled(nn.Module):
    """A net whose features are the image itself, in cells of 8 pixels."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 3)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, CELL)

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


def build(model: nn.Module | None = None, **settings: object) -> tuple[StepModule, AttentionCropDrop]:
    """A step with two attention maps: channels 0 and 1 of `Pooled`, as they are (the norm in eval mode)."""
    technique = build_technique(AttentionCropDropSettings(**{"maps": 2, "render": 1, **settings}))
    step = StepModule(model or Pooled(), {KIND: technique}, size=(SIDE, SIDE)).double().train()
    if model is None:
        step.branches.eval()
        branch = step.branches[KIND]["attention"]
        with torch.no_grad():
            branch.conv.weight.copy_(torch.eye(3)[: branch.conv.out_channels, :, None, None])
    return step, technique


def batch(x: Tensor, labels: list[int] | None = None) -> Batch:
    y = torch.tensor(labels or [0] * len(x))
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(len(x), 2, 3))


def scene(spots: list[list[tuple[int, int, float]]]) -> Tensor:
    """(B,3,64,64): channel 0 black but for cells (row, column, value), channel 1 black, channel 2 the pixels' x."""
    x = torch.zeros(len(spots), 3, SIDE, SIDE, dtype=torch.float64)
    for image, cells in zip(x, spots, strict=True):
        for row, column, value in cells:
            image[0, row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = value
    x[:, 2] = torch.arange(SIDE) + 0.5
    return x


def draws(
    size: int,
    *,
    crop: float = 0.5,
    drop: float = 0.3,
    which: float = 0.5,
    where: tuple = (0.0, 0.0),
    progress: float = 0,
) -> Draws:
    rows = [torch.tensor([[value, which, *where]]).repeat(size, 1) for value in (crop, drop)]
    return Draws(progress, {KIND: {"seed": 3, "crop": rows[0], "drop": rows[1]}})


def enlarged(x: Tensor) -> np.ndarray:
    """(64,64): channel 0 of an image (3,64,64) in cells, bilinear, edges repeated."""
    cells = x[0].reshape(8, CELL, 8, CELL).mean((1, 3)).numpy()
    places, centres = (np.arange(SIDE) + 0.5) / CELL, np.arange(8) + 0.5
    down = np.stack([np.interp(places, centres, column) for column in cells.T], axis=1)
    return np.stack([np.interp(places, centres, row) for row in down])


def box_of(mask: np.ndarray, padding: float) -> tuple[float, float, float, float]:
    """The box of a mask, padded: left, top, right, bottom."""
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    edges = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    pads = (-padding, -padding, padding, padding)
    return tuple(float(np.clip(edge + pad * SIDE, 0, SIDE)) for edge, pad in zip(edges, pads, strict=True))


def crop_of(x: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """(64,64) bilinear from a plane (h,w) of any resolution, the box in pixels of 64 x 64."""
    left, top, right, bottom = box
    share = (np.arange(SIDE) + 0.5) / SIDE
    h, w = x.shape
    rows, columns = (top + share * (bottom - top)) * h / SIDE, (left + share * (right - left)) * w / SIDE
    down = np.stack([np.interp(rows, np.arange(h) + 0.5, column) for column in x.T], axis=1)
    return np.stack([np.interp(columns, np.arange(w) + 0.5, row) for row in down])


SPOTS = [[(2, 5, 4.0), (2, 4, 3.0), (6, 1, 0.5)], [(7, 0, 2.0)], [(3, 3, 1.0), (4, 4, 1.0), (5, 4, 0.9)]]


def test_the_crop_is_around_what_is_above_the_threshold_and_the_drop_is_without_it() -> None:
    x = scene(SPOTS)
    step, _ = build()
    _, views = step(batch(x), draws(3, crop=0.45, drop=0.25))
    assert [(view.name, view.bn, view.weight) for view in views] == [
        ("main", "shared", 1.0),
        (CROP, "own", 1.0),
        (DROP, "own", 1.0),
    ]
    for b in range(3):
        fine = enlarged(x[b])
        box = box_of(fine >= 0.45 * fine.max(), 0.1)
        for channel in range(3):
            np.testing.assert_allclose(views[1].x[b, channel], crop_of(x[b, channel].numpy(), box), atol=1e-4)
        dropped = fine >= 0.25 * fine.max()
        expected = np.where(dropped, 0, x[b].numpy())
        np.testing.assert_array_equal(views[2].x[b], expected)
        assert 0 < dropped.mean() < 0.5


def test_by_hand_a_single_cell_gives_its_box() -> None:
    x = scene([[(2, 5, 1.0)]])
    step, _ = build(padding=0.0)
    # at d pixels from the cell's centre the map is (1 - d/8), so 0.94^2 at most; half of that is reached up to d = 3.5
    _, views = step(batch(x), draws(1, crop=0.56))
    expected = 40 + (np.arange(SIDE) + 0.5) * 8 / SIDE
    np.testing.assert_allclose(views[1].x[0, 2], np.tile(expected, (SIDE, 1)), atol=1e-4)


def test_no_more_than_the_largest_share_is_dropped_and_the_fill_is_as_asked() -> None:
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    for fill in ("zero", "mean", "noise"):
        step, _ = build(largest_drop=0.2, fill=fill)
        _, views = step(batch(x), draws(2, drop=0.2))
        changed = (views[2].x != x).any(1)
        share = changed.double().mean((1, 2))
        assert ((share <= 0.2) & (share > 0.19)).all()
        filled = views[2].x[0][:, changed[0]]
        if fill == "mean":
            torch.testing.assert_close(filled, x[0].mean((1, 2))[:, None].expand_as(filled))
        assert (filled == 0).all() == (fill == "zero")


def test_attention_of_zeros_gives_the_whole_image_and_drops_nothing() -> None:
    x = scene([[], [(2, 5, 1.0)]])
    for guide in ("attention", "random"):
        step, _ = build(guide=guide)
        _, views = step(batch(x), draws(2, where=(0.3, 0.7)))
        torch.testing.assert_close(views[1].x[0], x[0], **CLOSE)
        assert torch.equal(views[2].x[0], x[0])
        assert not torch.equal(views[2].x[1], x[1])


def test_at_random_the_box_and_the_region_are_as_large_and_elsewhere() -> None:
    x, (down, across), crops, dropped = scene(SPOTS), (0.3, 0.6), {}, {}
    for guide in ("attention", "random"):
        step, _ = build(guide=guide)
        _, views = step(batch(x), draws(3, where=(down, across)))
        crops[guide] = views[1].x.numpy()
        dropped[guide] = step.contexts[KIND].shown["dropped"][1].numpy()
        assert ((views[2].x == 0).all(1).numpy() == dropped[guide]).all()
    for b in range(3):
        fine = enlarged(x[b])
        left, top, right, bottom = box_of(fine >= 0.5 * fine.max(), 0.1)
        width, height = right - left, bottom - top
        left, top = across * (SIDE - width), down * (SIDE - height)
        for channel in range(3):
            expected = crop_of(x[b, channel].numpy(), (left, top, left + width, top + height))
            np.testing.assert_allclose(crops["random"][b, channel], expected, atol=1e-3)
        rolled = np.roll(dropped["attention"][b], (int(down * SIDE), int(across * SIDE)), axis=(0, 1))
        np.testing.assert_array_equal(dropped["random"][b], rolled)
        assert rolled.sum() > 0
    assert not np.allclose(crops["attention"], crops["random"])


def test_crops_are_cut_from_the_finer_render_unless_the_image_is_mixed() -> None:
    x = scene(SPOTS)
    data = batch(x)
    data.render = torch.rand(3, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, _ = build(render=1.5)
    assert step.attachments.render == 1.5
    _, views = step(data, draws(3))
    fine = enlarged(x[0])
    box = box_of(fine >= 0.5 * fine.max(), 0.1)
    np.testing.assert_allclose(views[1].x[0, 1], crop_of(data.render[0, 1].numpy(), box), atol=1e-4)
    techniques = {"mixup": build_technique(MixupSettings()), KIND: step.techniques[KIND]}
    both = StepModule(step.net, techniques, size=(SIDE, SIDE)).double().train()
    both.branches[KIND].load_state_dict(step.branches[KIND].state_dict())
    both.branches.eval()
    share = (torch.full((3,), 0.7, dtype=torch.float64), torch.tensor([1, 2, 0]))
    _, views = both(data, Draws(0.0, {**draws(3).of, "mixup": share}))
    fine = enlarged(views[0].x[0])
    box = box_of(fine >= 0.5 * fine.max(), 0.1)
    np.testing.assert_allclose(views[1].x[0, 2], crop_of(views[0].x[0, 2].numpy(), box), atol=1e-4)
    assert views[1].target is views[0].target


def test_draws_are_uniform_within_their_bounds() -> None:
    technique = build_technique(AttentionCropDropSettings(crop_threshold=(0.4, 0.6), drop_threshold=(0.2, 0.5)))
    count = 4000
    draws_ = technique.draw(np.random.default_rng(0), SimpleNamespace(labels=torch.zeros(count)))
    columns = []
    for what, (low, high) in (("crop", (0.4, 0.6)), ("drop", (0.2, 0.5))):
        assert draws_[what].shape == (count, 4)
        assert draws_[what].dtype == torch.float32
        for column, (first, last) in enumerate([(low, high), (0, 1), (0, 1), (0, 1)]):
            shares = (np.sort(draws_[what][:, column].double().numpy()) - first) / (last - first)
            assert -1e-6 <= shares[0] <= shares[-1] <= 1 + 1e-6
            assert np.abs(shares - np.arange(count) / count).max() < 1.95 / math.sqrt(count)
            columns.append(draws_[what][:, column].numpy())
    assert np.abs(np.corrcoef(columns) - np.eye(8)).max() < 4.5 / math.sqrt(count)


def test_maps_are_picked_by_the_root_of_their_sum() -> None:
    sums = [0.0, 1.0, 9.0, 0.0, 36.0]
    maps = torch.tensor(sums)[None, :, None, None].expand(1, 5, 2, 3) / 6
    which = (torch.arange(1000) + 0.5) / 1000
    picked = pick(maps.expand(1000, 5, 2, 3), which)[:, 0, 0] * 6
    shares = {value: float((picked - value).abs().lt(1e-4).double().mean()) for value in set(sums)}
    assert shares == pytest.approx({0.0: 0.0, 1.0: 0.1, 9.0: 0.3, 36.0: 0.6}, abs=2e-3)
    assert pick(maps, torch.zeros(1)).max() > 0, "no map of zeros even for the smallest number"
    assert torch.equal(pick(torch.zeros(1, 5, 2, 3), torch.tensor([0.5])), torch.zeros(1, 2, 3))


def vectors(step: StepModule, x: Tensor) -> list[list[float]]:
    """v of every image, by loops over maps, channels and cells."""
    branch, normalised = step.branches[KIND]["attention"], []
    assert not branch.norm.training
    for f in step.net.forward_features(x).detach():
        channels, h, w = f.shape
        values = []
        for kernel in branch.conv.weight[:, :, 0, 0].detach():
            for c in range(channels):
                total = 0.0
                for i in range(h):
                    for j in range(w):
                        a = max(float(kernel @ f[:, i, j]) / math.sqrt(1 + 1e-3), 0)
                        total += a * float(f[c, i, j]) / (h * w)
                values.append(math.copysign(math.sqrt(abs(total) + 1e-12), total) if total else 0.0)
        length = math.sqrt(sum(v * v for v in values))
        normalised.append([v / length for v in values])
    return normalised


def test_the_losses_are_their_formulas() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64, generator=generator)
    x += 2 * F.interpolate(torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=generator), (SIDE, SIDE))
    y = [2, 0, 2]
    step, _ = build(crop=0.5, drop=0.25, pooled=0.7, centre=0.3)
    branch = step.branches[KIND]["attention"]
    with torch.no_grad():
        branch.centres.copy_(torch.randn(branch.centres.shape, generator=generator))
        branch.centres[0] = 0  # a class that was never seen
    losses, views = step(batch(x, y), draws(3))

    def entropy(z: list[float], label: int) -> float:
        return math.log(sum(math.exp(v) for v in z)) - z[label]

    weights, base, pooled = [1, 0.5, 0.25], 0.0, 0.0
    for view, weight in zip(views, weights, strict=True):
        for b, v in enumerate(vectors(step, view.x)):
            z = branch.classifier.weight.detach() @ torch.tensor(v, dtype=torch.float64) * SCALE
            pooled += entropy(z.tolist(), y[b]) / 9
            logits = step.net.forward_head(step.net.forward_features(view.x[b : b + 1]))[0]
            base += weight * entropy(logits.tolist(), y[b]) / 3 / sum(weights)
    centre = 0.0
    for b, v in enumerate(vectors(step, x)):
        c = branch.centres[y[b]].tolist()
        length = math.sqrt(sum(value * value for value in c))
        centre += sum((a - (value / length if length else 0)) ** 2 for a, value in zip(v, c, strict=True)) / 3
    assert float(losses["base"].detach()) == pytest.approx(base, rel=1e-5)
    assert float(losses[f"{KIND}.pooled"].detach()) == pytest.approx(pooled, rel=1e-5)
    assert float(losses[f"{KIND}.centre"].detach()) == pytest.approx(centre, rel=1e-5)
    assert float(losses["loss"].detach()) == pytest.approx(base + 0.7 * pooled + 0.3 * centre, rel=1e-5)
    losses["loss"].backward()
    assert branch.conv.weight.grad.abs().max() > 0
    assert branch.classifier.weight.grad.abs().max() > 0


def test_centres_follow_after_the_step_only_and_by_the_mean_of_each_class() -> None:
    step, technique = build(centre_rate=0.25)
    branch = step.branches[KIND]["attention"]
    expected = np.zeros((3, 6))
    for number, y in enumerate(([2, 0, 2, 2], [0, 0, 0, 0], [2, 0, 2, 0])):
        x = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        before = branch.centres.clone()
        step(batch(x, y), draws(4))
        assert torch.equal(branch.centres, before)
        technique.after_step(step.contexts[KIND])
        features = np.array(vectors(step, x))
        for label in set(y):
            length = np.linalg.norm(expected[label])
            mean = features[[b for b in range(4) if y[b] == label]].mean(0)
            expected[label] += 0.25 * (mean - (expected[label] / length if length else 0))
        np.testing.assert_allclose(branch.centres.numpy(), expected, atol=1e-6)
    assert (expected[1] == 0).all()
    technique.after_step(step.contexts[KIND])
    np.testing.assert_allclose(branch.centres.numpy(), expected, atol=1e-6, err_msg="each step counts once")
    assert f"{KIND}.attention.centres" in step.branches.state_dict()


def test_a_mixed_batch_has_no_centre() -> None:
    x = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data, (step, technique) = batch(x, [0, 1, 2, 0]), build()
    share = torch.tensor([0.3, 0.6, 0.5, 0.8])
    data.target = [(data.labels, share), (data.labels.flip(0), 1 - share)]
    losses, _ = step(data, draws(4))
    assert f"{KIND}.pooled" in losses
    assert f"{KIND}.centre" not in losses
    technique.after_step(step.contexts[KIND])
    assert (step.branches[KIND]["attention"].centres == 0).all()


def test_repeated_labels_and_labels_left_out() -> None:
    branch = BilinearAttention(1, 2, 4)
    branch.follow(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([-1, -1, -1]), rate=0.5)
    assert (branch.centres == 0).all()
    branch.follow(torch.tensor([[2.0, 0], [0, 1], [5, 5], [3, 0]]), torch.tensor([3, 3, -1, 0]), rate=0.5)
    assert branch.centres.tolist() == [[0.5, 0], [0, 0], [0, 0], [0.25, 0.25]]


def test_the_parts_of_a_step_move_the_centres_once_as_the_whole_batch() -> None:
    x, y = scene(SPOTS[:1] * 4), [0, 1, 0, 1]
    x = x + torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        step, technique = build(centre_rate=0.25)
        for part in parts:
            step(batch(x[part], y[part]), draws(len(y[part])))
        technique.after_step(step.contexts[KIND])
        centres.append(step.branches[KIND]["attention"].centres.clone())
    torch.testing.assert_close(*centres)
    assert centres[0].any()


def test_one_cell_is_refused_by_name() -> None:
    with pytest.raises(FgvcError, match="techniques.attention_crop_drop: at 8 x 8 pixels the map is one cell"):
        StepModule(Pooled(), {KIND: build_technique(AttentionCropDropSettings())}, size=(8, 8))


def test_without_a_branch_a_step_has_no_centres_to_move() -> None:
    technique = build_technique(AttentionCropDropSettings(guide="cam", pooled=0, centre=0))
    x = scene(SPOTS)
    step = StepModule(Pooled(), {KIND: technique}, size=(x.shape[2], x.shape[3])).double().train()
    step(batch(x), draws(3))
    technique.after_step(step.contexts[KIND])


def test_views_and_terms_of_weight_0_are_not_made() -> None:
    x = scene(SPOTS)
    technique = build_technique(AttentionCropDropSettings(guide="cam", crop=0, drop=0, pooled=0, centre=0))
    step = StepModule(Pooled(), {KIND: technique}, size=(x.shape[2], x.shape[3])).double().train()
    assert not len(step.branches), "nothing would train them, and nothing asks them"
    assert step.attachments.render == 1, "the images stay what they are without the technique"
    losses, views = step(batch(x), draws(3))
    assert [view.name for view in views] == ["main"]
    assert set(losses) == {"base", "loss"}
    later = ((0.5, 0.0), (1.0, 1.0))
    step, _ = build(crop=later, drop=1, pooled=later, centre=0)
    losses, views = step(batch(x), draws(3, progress=0.5))
    assert [view.name for view in views] == ["main", DROP]
    assert set(losses) == {"base", "loss"}
    losses, views = step(batch(x), draws(3, progress=0.75))
    assert [(view.name, view.weight) for view in views] == [("main", 1.0), (CROP, 0.5), (DROP, 1.0)]
    assert set(losses) == {"base", "loss", f"{KIND}.pooled"}


def test_guided_by_the_class_map_it_crops_where_the_class_is() -> None:
    x = scene(SPOTS)
    x[:, 2] = 0
    model = Pooled()
    with torch.no_grad():
        model.fc.weight.copy_(torch.eye(3)[[1, 0, 2]])  # label 1 reads channel 0
    technique = build_technique(AttentionCropDropSettings(guide="cam", render=1))
    step = StepModule(model, {KIND: technique}, size=(SIDE, SIDE)).double().train()
    _, views = step(batch(x, [1, 1, 0]), draws(3))
    for b in range(2):
        fine = enlarged(x[b])
        box = box_of(fine >= 0.5 * fine.max(), 0.1)
        np.testing.assert_allclose(views[1].x[b, 0], crop_of(x[b, 0].numpy(), box), atol=1e-4)
        np.testing.assert_array_equal(
            (views[2].x[b, 0] == 0).numpy(), (fine >= 0.3 * fine.max()) | (x[b, 0].numpy() == 0)
        )
    torch.testing.assert_close(views[1].x[2], x[2], rtol=0, atol=1e-4, msg="the map of label 0 is flat")


def test_refined_the_image_is_cropped_to_the_mean_attention() -> None:
    x = scene([[(2, 5, 4.0), (3, 4, 0.45)], [(6, 6, 1.0)]])
    x[:, 2] = 0
    step, technique = build()
    step(batch(x), draws(2))
    step.eval()
    features = step.net.forward_features(x)
    output = Output(View("refined", x, [(torch.zeros(2, dtype=torch.int64), None)]), features, torch.zeros(2, 3))
    cropped = technique.refine(output, step.contexts[KIND])
    for b in range(2):
        fine = enlarged(x[b])
        expected = crop_of(x[b, 0].numpy(), box_of(fine >= 0.1 * fine.max(), 0.05))
        np.testing.assert_allclose(cropped[b, 0], expected, atol=1e-4)


def test_its_views_leave_the_nets_running_statistics_alone() -> None:
    def resnet() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=3).double()

    x = torch.randn(4, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, _ = build(resnet())
    _, views = step(batch(x), draws(4))
    assert len(views) == 3
    twin = resnet().train()
    twin(x)
    for (name, value), other in zip(twin.named_buffers(), step.net.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_its_views_leave_the_branchs_running_statistics_alone() -> None:
    x = scene(SPOTS)
    step, _ = build(drop=0)
    only, _ = build(crop=0, drop=0)
    for one in (step, only):
        one.branches.train()
        one(batch(x), draws(3))
    norms = [one.branches[KIND]["attention"].norm for one in (step, only)]
    assert [int(norm.num_batches_tracked) for norm in norms] == [1, 1]
    torch.testing.assert_close(norms[0].running_mean, norms[1].running_mean)
