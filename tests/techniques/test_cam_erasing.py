"""CAM-guided erasing, on a net whose class maps are known: what is erased lies where the map is high."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.loading import validate
from fgvc.config.recipe import Recipe
from fgvc.errors import FgvcError
from fgvc.runs.step import StepModule
from fgvc.techniques.api import Batch, Draws
from fgvc.techniques.cam_erasing.settings import CamErasingSettings
from fgvc.techniques.cam_erasing.technique import CamErasing
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.registry import build_technique

SIDE, CELL = 64, 8
MOST = {"value": 0.6, "area": (0.0, 0.99)}
WHOLE = [[1.0, 0, 0], [0, 1, 0]]


class Pooled(nn.Module):
    """Its features are the image in cells of 8 pixels; the class map of label k is channel `order[k]`."""

    num_classes = 3

    def __init__(self, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(3)[list(order)])

    def forward_features(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, CELL)

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.fc


def batch(size: int = 4, *, geometry: list | None = None, seed: int = 1) -> Batch:
    """Smooth images of ones and more, so that what is 0 was erased."""
    rng = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(size, 3, 5, 5, generator=rng) + 1, (SIDE, SIDE), mode="bicubic").double()
    y = torch.arange(size) % 3
    matrices = torch.tensor([geometry or WHOLE] * size)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=torch.arange(size) + 2, geometry=matrices)


def spot(row: int, column: int, cells: int = 1) -> Tensor:
    """(1,3,64,64): ones, and fours in `cells` x `cells` cells of all channels."""
    x = torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)
    x[:, :, row * CELL : (row + cells) * CELL, column * CELL : (column + cells) * CELL] = 4
    return x


def build(model: nn.Module | None = None, size: int = SIDE, **settings: object) -> tuple[StepModule, CamErasing]:
    technique = build_technique(CamErasingSettings(**{"region": MOST, **settings}))
    return StepModule(model or Pooled(), {"cam_erasing": technique}, size=(size, size)).double().train(), technique


def draws(data: Batch, chosen: list[bool] | None = None, progress: float = 0.0) -> Draws:
    which = torch.tensor(chosen if chosen is not None else [True] * len(data.labels))
    return Draws(progress, {"cam_erasing": (which, 7)})


def bilinear(cells: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of a map (h,w) at places counted in cells, edges repeated, in float64."""
    down = np.stack([np.interp(rows, np.arange(len(cells)) + 0.5, column) for column in cells.T], axis=1)
    return np.stack([np.interp(columns, np.arange(cells.shape[1]) + 0.5, row) for row in down])


def high(x: Tensor, channel: int, value: float = 0.6) -> np.ndarray:
    """(H,W) bool: where the normalised map of `channel` of x (3,H,W), enlarged, is `value` of its maximum or more."""
    h, w = (side // CELL for side in x.shape[1:])
    cells = x[channel].double().reshape(h, CELL, w, CELL).mean((1, 3)).numpy()
    scaled = (cells - cells.min()) / (cells.max() - cells.min())
    fine = bilinear(scaled, (np.arange(h * CELL) + 0.5) / CELL, (np.arange(w * CELL) + 0.5) / CELL)
    return fine >= value * fine.max()


def test_of_the_current_map_an_erased_view_is_added() -> None:
    data = batch()
    step, _ = build(weight=0.5)
    losses, views = step(data, draws(data, [True, True, False, True]))
    assert [(view.name, view.weight, view.bn) for view in views] == [
        ("main", 1.0, "shared"),
        ("cam_erasing.erased", 0.5, "own"),
    ]
    assert torch.equal(views[0].x, data.x_clean)
    for b in range(4):
        mask = (views[1].x[b] == 0).all(0).numpy()
        expected = high(data.x[b], int(data.labels[b])) if b != 2 else np.zeros((SIDE, SIDE), dtype=bool)
        assert (mask != expected).mean() < 1e-3, "but for rounding"
        assert torch.equal(views[1].x[b][:, ~mask], data.x[b][:, ~mask])
    first, second = (F.cross_entropy(step.net.forward_head(F.avg_pool2d(v.x, CELL)), data.labels) for v in views)
    torch.testing.assert_close(losses["base"].double(), (first + 0.5 * second) / 1.5, rtol=1e-6, atol=1e-6)


def test_the_erased_view_has_statistics_of_its_own() -> None:
    def resnet() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("test_resnet", num_classes=3).double()

    data = batch()
    step, _ = build(resnet())
    losses, views = step(data, draws(data))
    twin = resnet().train()
    main = F.cross_entropy(twin(data.x), data.labels)
    for (name, value), other in zip(twin.named_buffers(), step.net.buffers(), strict=True):
        assert torch.equal(value, other), name
    torch.testing.assert_close(losses["base"], (main + F.cross_entropy(twin(views[1].x), data.labels)).float() / 2)


@pytest.mark.parametrize("source", ["current", "ema", "previous_epoch"])
def test_no_more_than_the_bound_is_erased(source: str) -> None:
    step, technique = build(source=source, region={"value": 0.1, "area": (0.0, 0.25)})
    step.set_average(Pooled().double())
    data = batch()
    _, views = step(data, draws(data))
    technique.after_step(step.contexts["cam_erasing"])
    _, views = step(data, draws(data))
    share = (views[-1].x == 0).all(1).double().mean((1, 2))
    assert (share <= 0.25).all()
    assert (share > 0.2).all()


def test_the_average_says_what_is_erased_of_the_image_itself() -> None:
    data = batch()
    step, _ = build(source="ema")
    average = Pooled(order=(1, 2, 0)).double().train()
    step.set_average(average)
    losses, views = step(data, draws(data, [True, False, True, True]))
    assert [view.name for view in views] == ["main"]
    for b in range(4):
        mask = (views[0].x[b] == 0).all(0).numpy()
        expected = high(data.x_clean[b], (int(data.labels[b]) + 1) % 3) if b != 1 else np.zeros_like(mask)
        assert (mask != expected).mean() < 1e-3
    assert torch.equal(data.x, batch().x), "not in place"
    assert average.training, "its mode comes back"
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in average.parameters())


def test_source_ema_without_an_average_is_refused(recipe_tree: dict) -> None:
    tree = recipe_tree | {"techniques": {"cam_erasing": {"source": "ema"}}}
    with pytest.raises(FgvcError, match=r"techniques\.cam_erasing: needs the moving average .* ema\.decay=0\.99"):
        validate(Recipe, tree, where="test")
    validate(Recipe, tree | {"ema": {"decay": 0.9}}, where="test")
    validate(Recipe, recipe_tree | {"techniques": {"cam_erasing": {}}}, where="test")


GEOMETRIES = {
    "the same crop": WHOLE,
    "mirrored": [[-1.0, 0, SIDE], [0, 1, 0]],
    "twice as near": [[0.5, 0, 20], [0, 0.5, 4]],
    "half outside": [[1.0, 0, 24], [0, 1, 0]],
    "turned": [[0.0, 1, 0], [-1.0, 0, SIDE]],
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_epoch_before_says_what_is_erased_in_another_crop(name: str) -> None:
    geometry = GEOMETRIES[name]
    step, technique = build(source="previous_epoch")
    first = batch(1)
    first.x = first.x_clean = spot(2, 5, 2)
    _, views = step(first, draws(first))
    assert torch.equal(views[0].x, first.x), "nothing is known in the first epoch"
    technique.after_step(step.contexts["cam_erasing"])
    second = batch(1, geometry=geometry)
    second.x = second.x_clean = torch.ones_like(first.x)
    _, views = step(second, draws(second))
    assert len(views) == 1
    mask = (views[0].x[0] == 0).all(0).numpy()
    cells = np.zeros((SIDE // CELL, SIDE // CELL))
    cells[2:4, 5:7] = 1
    truth = np.zeros((SIDE, SIDE))
    for i in range(SIDE):
        for j in range(SIDE):
            x, y = np.array(geometry) @ [j + 0.5, i + 0.5, 1]
            if 0 <= x < SIDE and 0 <= y < SIDE:
                truth[i, j] = bilinear(cells, np.array([y / CELL]), np.array([x / CELL]))[0, 0]
    truth /= truth.max()
    assert truth.max() == 1
    assert mask[truth > 0.75].all(), "one value for four pixels is recalled, so there is some play"
    assert not mask[truth < 0.45].any()
    if name == "half outside":
        assert not mask[:, SIDE - 24 :].any()


def test_the_store_knows_only_what_it_has_seen_and_survives_a_checkpoint() -> None:
    step, technique = build(source="previous_epoch")
    data = batch(3)
    step(data, draws(data))
    technique.after_step(step.contexts["cam_erasing"])
    file = io.BytesIO()
    torch.save(technique.state_dict(), file)
    file.seek(0)
    other, again = build(source="previous_epoch")
    again.load_state_dict(torch.load(file, weights_only=True))
    more = batch(5)
    images = [one(more, draws(more))[1][0].x for one in (step, other)]
    assert torch.equal(*images)
    erased = (images[0] == 0).all(1).flatten(1).any(1)
    assert erased.tolist() == [True] * 3 + [False] * 2
    fresh, _ = build(source="previous_epoch")
    assert torch.equal(fresh(more, draws(more))[1][0].x, more.x)
    assert build()[1].state_dict() == {}


def test_parts_of_a_step_are_all_recorded_and_a_later_map_replaces_the_first() -> None:
    step, technique = build(source="previous_epoch")
    parts = [batch(2, seed=1), batch(2, seed=2)]
    parts[1].index = parts[1].index + 2
    for part in parts:
        step(part, draws(part))
    technique.after_step(step.contexts["cam_erasing"])
    assert not technique._new, "each is recorded once"
    both, moved = batch(4), batch(1)
    moved.x = moved.x_clean = spot(6, 1, cells=2)
    step(moved, draws(moved, [False]))
    technique.after_step(step.contexts["cam_erasing"])
    both.x = both.x_clean = torch.ones_like(both.x)
    masks = (step(both, draws(both))[1][0].x == 0).all(1).numpy()
    assert masks.reshape(4, -1).any(1).all()
    rows, columns = masks[0].nonzero()
    assert abs(rows.mean() + 0.5 - 7 * CELL) < 1
    assert abs(columns.mean() + 0.5 - 2 * CELL) < 1
    assert (masks[1] != high(parts[0].x[1], 1)).mean() < 0.1, "the others stay"


@pytest.mark.parametrize("source", ["current", "ema", "previous_epoch"])
def test_the_share_of_erased_images_is_the_probability(source: str) -> None:
    data = SimpleNamespace(labels=torch.zeros(2000))
    for probability, expected in ((None, 1.0 if source == "current" else 0.5), (0.0, 0.0), (0.3, 0.3), (1.0, 1.0)):
        technique = build_technique(CamErasingSettings(source=source, probability=probability))
        chosen, _ = technique.draw(np.random.default_rng(0), data)
        assert float(chosen.double().mean()) == pytest.approx(expected, abs=0.05 if 0 < expected < 1 else 0)


@pytest.mark.parametrize("source", ["current", "ema", "previous_epoch"])
def test_with_probability_0_nothing_is_erased(source: str) -> None:
    data = batch()
    step, technique = build(source=source, probability=0)
    step.set_average(Pooled().double())
    for number in range(2):
        _, views = step(data, step.draw(data, 0.0, seed=0, step=number))
        technique.after_step(step.contexts["cam_erasing"])
        assert all(torch.equal(view.x, data.x) for view in views)


@pytest.mark.parametrize("source", ["current", "ema", "previous_epoch"])
def test_a_flat_map_erases_nothing(source: str) -> None:
    data = batch()
    data.x = data.x_clean = torch.ones_like(data.x)
    step, technique = build(source=source)
    step.set_average(Pooled().double())
    for _ in range(2):
        _, views = step(data, draws(data))
        technique.after_step(step.contexts["cam_erasing"])
        assert all(torch.equal(view.x, data.x) for view in views)


def test_a_weight_of_0_builds_no_view_and_follows_its_schedule() -> None:
    data = batch()
    step, _ = build(weight=((0.5, 0.0), (1.0, 1.0)))
    assert [len(step(data, draws(data, progress=progress))[1]) for progress in (0.0, 0.5, 0.75)] == [1, 1, 2]
    assert step(data, draws(data, progress=0.75))[1][1].weight == 0.5


def mixing(source: str, share: list[float]) -> tuple[StepModule, CamErasing, Batch, Draws]:
    erasing = build_technique(CamErasingSettings(source=source, region=MOST))
    techniques = {"cam_erasing": erasing, "mixup": build_technique(MixupSettings())}
    step = StepModule(Pooled(), techniques, size=(SIDE, SIDE)).double().train()
    data, mixed = batch(), (torch.tensor(share, dtype=torch.float64), torch.tensor([1, 2, 3, 0]))
    return step, techniques["cam_erasing"], data, Draws(0.0, {**draws(data).of, "mixup": mixed})


def test_of_a_mixed_image_the_label_of_most_weight_says_what_is_erased() -> None:
    share = [0.9, 0.2, 0.6, 0.4]
    step, _, data, chosen = mixing("current", share)
    _, views = step(data, chosen)
    labels = [int(data.labels[b if share[b] > 0.5 else (b + 1) % 4]) for b in range(4)]
    for b in range(4):
        mask = (views[1].x[b] == 0).all(0).numpy()
        assert (mask != high(views[0].x[b], labels[b])).mean() < 1e-3
    assert views[1].target is views[0].target


def test_the_average_sees_images_before_they_are_mixed() -> None:
    step, _, data, chosen = mixing("ema", [0.5] * 4)
    step.set_average(Pooled().double())
    _, views = step(data, chosen)
    erased = data.x.clone()
    for b in range(4):
        erased[b, :, torch.from_numpy(high(data.x[b], int(data.labels[b])))] = 0
    expected = (erased + erased[[1, 2, 3, 0]]) / 2
    assert ((views[0].x - expected).abs() > 1e-6).double().mean() < 2e-3


# Bug: views_after records the map of the mixed image's label of most weight (main.map) under the row of the first image;
# where the partner weighs more, that is the partner's map, and next epoch the wrong part of this image is erased.
def test_what_is_recorded_of_a_mixed_image_is_the_map_of_its_own_label() -> None:
    step, technique, data, chosen = mixing("previous_epoch", [0.1] * 4)
    shows = torch.eye(3, dtype=torch.float64)[data.labels][..., None, None]  # each label in a channel of its own
    spots = torch.cat([spot(1, 1), spot(6, 6), spot(1, 6), spot(6, 1)])
    data.x = data.x_clean = shows * spots + (1 - shows)
    step(data, Draws(0.0, {**chosen.of, "cam_erasing": (torch.tensor([False] * 4), 0)}))
    technique.after_step(step.contexts["cam_erasing"])
    later = copy.copy(data)
    _, views = step(later, Draws(0.0, {**chosen.of, "mixup": None}))
    mask = (views[0].x[0] == 0).all(0).numpy()
    assert not mask[6 * CELL : 7 * CELL, 6 * CELL : 7 * CELL].any()


def test_a_net_without_class_maps_is_refused_by_name() -> None:
    vit = timm.create_model("test_vit", num_classes=3, img_size=SIDE)
    with pytest.raises(FgvcError, match=r"techniques\.cam_erasing: no auto map: .*class token alone"):
        build(vit)
