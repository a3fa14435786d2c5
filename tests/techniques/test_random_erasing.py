"""Random Erasing's rectangles: exactly where they were drawn, and drawn as the paper's or timm's code draws them."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch import Tensor

from fgvc.techniques.api import Batch
from fgvc.techniques.plan import Context
from fgvc.techniques.random_erasing.settings import RandomErasingSettings
from fgvc.techniques.registry import build_technique

COUNT = 3000


def batch(size: int = 2, sides: tuple[int, int] = (12, 16)) -> Batch:
    x = torch.randn(size, 3, *sides, generator=torch.Generator().manual_seed(1)) + 2
    y = torch.zeros(size, dtype=torch.int64)
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(size, 2, 3))


def context(draw: object) -> Context:
    return Context(draw=draw, progress=0.0, branches={}, head=torch.abs, pooled=torch.abs, grid=torch.abs)


def rectangles(sides: tuple[int, int], *, seed: int = 0, count: int = COUNT, **settings: object) -> np.ndarray:
    """(N,4): top, left, height, width of the first rectangle of every picture that has one."""
    x, y = torch.empty(count, 3, *sides, device="meta"), torch.zeros(count, dtype=torch.int64)
    data = Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(count, 2, 3))
    boxes, _ = build_technique(RandomErasingSettings(**{"probability": 1, **settings})).draw(np.random.default_rng(seed), data)
    left, top, right, bottom = boxes[:, 0].double().numpy().T
    boxes_ = np.stack([top, left, bottom - top, right - left], axis=1)
    return boxes_[right > left]


def papers(sides: tuple[int, int], area: tuple[float, float], least: float) -> np.ndarray:
    """(N,4) as `rectangles`, by the loop of the paper's code."""
    rng, boxes = random.Random(3), []
    for _ in range(COUNT):
        for _ in range(100):
            target, ratio = rng.uniform(*area) * sides[0] * sides[1], rng.uniform(least, 1 / least)
            h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if h < sides[0] and w < sides[1]:
                boxes.append((rng.randint(0, sides[0] - h), rng.randint(0, sides[1] - w), h, w))
                break
    return np.array(boxes, dtype=np.float64)


def timms(sides: tuple[int, int], area: tuple[float, float], least: float) -> np.ndarray:
    """(N,4) as `rectangles`, by timm's own code."""
    random.seed(3)
    erase = TimmErasing(1.0, min_area=area[0], max_area=area[1], min_aspect=least, mode="const", device="cpu")
    boxes = []
    for _ in range(COUNT):
        erased = erase(torch.ones(3, *sides))[0] == 0
        rows, columns = erased.any(1).nonzero(), erased.any(0).nonzero()
        if len(rows):
            boxes.append((int(rows[0]), int(columns[0]), len(rows), len(columns)))
    return np.array(boxes, dtype=np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance, in units of what one in a thousand pairs of equal distributions exceeds."""
    both = np.sort(np.concatenate([a, b]))
    apart = np.abs(
        np.searchsorted(np.sort(a), both, side="right") / len(a)
        - np.searchsorted(np.sort(b), both, side="right") / len(b)
    ).max()
    return float(apart / (1.95 * math.sqrt(1 / len(a) + 1 / len(b))))


FEATURES = {
    "top": lambda box: box[:, 0],
    "left": lambda box: box[:, 1],
    "area": lambda box: box[:, 2] * box[:, 3],
    "aspect": lambda box: box[:, 2] / box[:, 3],
    "bottom": lambda box: box[:, 0] + box[:, 2],
}


@pytest.mark.parametrize("statistics", ["original", "timm"])
@pytest.mark.parametrize(
    ("sides", "area"), [((64, 64), (0.02, 0.2)), ((40, 60), (0.1, 0.6))], ids=["default", "some do not fit"]
)
def test_rectangles_are_distributed_as_in_the_code_that_they_are_of(
    statistics: str, sides: tuple[int, int], area: tuple[float, float]
) -> None:
    ours = rectangles(sides, statistics=statistics, area=area)
    theirs, others = papers(sides, area, 0.3), timms(sides, area, 0.3)
    if statistics == "timm":
        theirs, others = others, theirs
    assert len(ours) > 0.99 * COUNT
    for name, feature in FEATURES.items():
        assert distance(feature(ours), feature(theirs)) < 1, name
    assert distance(FEATURES["aspect"](ours), FEATURES["aspect"](others)) > 1.5, "the two differ, and this test sees it"


def test_area_and_aspect_are_their_formulas() -> None:
    share = (np.arange(20_000) + 0.5) / 20_000
    uniform, logarithmic = 0.3 + share * (1 / 0.3 - 0.3), 0.3 ** (1 - 2 * share)
    for statistics, aspects in (("original", uniform), ("timm", logarithmic)):
        boxes = rectangles((2000, 2000), statistics=statistics)
        assert distance(boxes[:, 2] * boxes[:, 3] / 2000**2, 0.02 + 0.18 * share) < 1
        assert distance(boxes[:, 2] / boxes[:, 3], aspects) < 1
        assert distance(boxes[:, 0] / (2000 - boxes[:, 2]), share) < 1
        assert distance(boxes[:, 1] / (2000 - boxes[:, 3]), share) < 1
        tall = float((boxes[:, 2] > boxes[:, 3]).mean())
        assert tall == pytest.approx((1 / 0.3 - 1) / (1 / 0.3 - 0.3) if statistics == "original" else 0.5, abs=0.04)


def test_several_rectangles_share_the_area() -> None:
    boxes = rectangles((1000, 1000), boxes=4, area=(0.2, 0.4))
    shares = boxes[:, 2] * boxes[:, 3] / 1e6
    assert 0.0495 < shares.min() < 0.052
    assert 0.098 < shares.max() < 0.1005


@pytest.mark.parametrize("statistics", ["original", "timm"])
def test_never_everything_is_erased(statistics: str) -> None:
    boxes = rectangles((8, 8), statistics=statistics, area=(0.5, 0.99), aspect=0.9, count=500)
    assert len(boxes) > 100
    assert (boxes[:, 2] < 8).all()
    assert (boxes[:, 3] < 8).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 8).all()


@pytest.mark.parametrize("fill", ["zero", "mean", "random", "pixel"])
def test_what_was_drawn_is_erased_and_nothing_else(fill: str) -> None:
    data = batch()
    before = data.x.clone()
    technique = build_technique(RandomErasingSettings(fill=fill))

    def erased(seed: int) -> Tensor:
        boxes = torch.tensor([[[3.0, 2, 9, 5], [8, 4, 10, 12]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
        return technique.on_batch(data, context((boxes, seed))).x

    out = erased(5)
    mask = torch.zeros(2, 12, 16, dtype=torch.bool)
    mask[0, 2:5, 3:9] = mask[0, 4:12, 8:10] = True
    assert torch.equal((out != before).any(1), mask)
    assert torch.equal(data.x, before), "not in place"
    assert data.x_clean is data.x
    part = out[0][:, mask[0]]
    match fill:
        case "zero":
            assert (part == 0).all()
        case "mean":
            mean = before[0].double().mean((1, 2)).float()[:, None]
            torch.testing.assert_close(part, mean.expand_as(part))
        case "random":
            assert (part == part[:, :1]).all()
            assert len(part[:, 0].unique()) == 3
        case "pixel":
            assert len(part.unique()) == part.numel()
    assert torch.equal(out, erased(5))
    assert torch.equal(out, erased(6)) == (fill in ("zero", "mean"))


def test_a_batch_goes_through_and_its_clean_images_stay() -> None:
    data = batch(16)
    clean = data.x_clean.clone()
    technique = build_technique(RandomErasingSettings(probability=1))
    out = technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data)))
    assert (out.x == 0).flatten(1).any(1).all()
    assert torch.equal(out.x_clean, clean)
    assert out.target is data.target


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_the_share_of_erased_pictures_is_the_probability(probability: float) -> None:
    share = len(rectangles((64, 64), probability=probability)) / COUNT
    assert share == pytest.approx(probability, abs=4 * math.sqrt(0.21 / COUNT) if probability == 0.3 else 0)
    if not probability:
        data, technique = batch(), build_technique(RandomErasingSettings(probability=0))
        assert torch.equal(technique.on_batch(data, context(technique.draw(np.random.default_rng(0), data))).x, data.x)


@pytest.mark.parametrize("area", [(0.0, 0.2), (0.3, 0.2), (0.1, 1.2)])
def test_areas_that_make_no_sense_are_refused(area: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two shares above 0 and up to 1"):
        RandomErasingSettings(area=area)
