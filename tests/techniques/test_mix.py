"""What the mixing techniques share, by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fgvc.techniques.boxes import area_share, boxes_around, draw_boxes, inside
from fgvc.techniques.mixing import mixed_target, partners, pasted


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_partners_are_a_permutation_or_of_another_class() -> None:
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    assert sorted(partners(rng(), y, "any").tolist()) == list(range(6))
    counts = np.zeros((6, 6))
    for seed in range(3000):
        order = partners(rng(seed), y, "other_class")
        counts[range(6), order] += 1
    same = y[:, None].numpy() == y.numpy()
    assert not counts[same].any()
    for row, allowed in zip(counts, ~same, strict=True):
        expected = 3000 / allowed.sum()
        assert ((row[allowed] - expected) ** 2 / expected).sum() < 22.5  # 0.1 % of one of six rows
    order = partners(rng(), torch.zeros(4, dtype=torch.int64), "other_class")
    assert order.shape == (4,), "a batch of one class mixes within it"
    assert order.max() < 4


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9999))
def test_boxes_lie_inside_and_have_the_sides_that_the_edges_leave(
    share: list[float], height: int, width: int, seed: int
) -> None:
    box = draw_boxes(rng(seed), np.array(share), (height, width), least=1)
    assert box.shape == (len(share), 4)
    for (left, top, right, bottom), area in zip(box.tolist(), share, strict=True):
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert bottom - top <= max(1, round(height * area**0.5))
        if top > 0 and bottom < height:
            assert bottom - top == max(1, round(height * area**0.5))
    masks = inside(box[:, None], (height, width))
    assert masks.shape == (len(share), height, width)
    for mask, (left, top, right, bottom), covered in zip(
        masks, box.tolist(), area_share(box, (height, width)), strict=True
    ):
        by_hand = torch.zeros(height, width, dtype=torch.bool)
        by_hand[top:bottom, left:right] = True
        assert torch.equal(mask, by_hand)
        assert float(covered) == pytest.approx(int(by_hand.sum()) / (height * width))


def test_boxes_by_hand() -> None:
    centres, sides = torch.tensor([[0, 5], [9, 0], [4, 4]]), torch.tensor([[4, 3], [4, 1], [0, 6]])
    assert boxes_around(centres, sides, (10, 6)).tolist() == [[4, 0, 6, 2], [0, 7, 1, 10], [1, 4, 6, 4]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.booleans())
def test_a_piece_is_pasted_as_torch_would_resize_it(seed: int, one: bool) -> None:
    numbers, size = rng(seed), (9, 12)
    x, source = torch.rand(3, 2, *size, dtype=torch.float64), torch.rand(3, 2, *size, dtype=torch.float64)
    to, of = (draw_boxes(numbers, numbers.random(1 if one else 3), size, least=1) for _ in range(2))
    mixed = pasted(x, source, to=to, of=of)
    expected = x.clone()
    for b in range(3):
        (left, t, r, u), (q, p, z, s) = to[0 if one else b].tolist(), of[0 if one else b].tolist()
        piece = source[b : b + 1, :, p:s, q:z]
        expected[b, :, t:u, left:r] = F.interpolate(piece, (u - t, r - left), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


def test_targets_of_targets_by_hand() -> None:
    y, order, share = torch.tensor([5, 6]), torch.tensor([1, 0]), torch.tensor([0.25, 0.5])
    plain = mixed_target([(y, None)], [(None, 1 - share), (order, share)])
    assert [(a.tolist(), w.tolist()) for a, w in plain] == [([5, 6], [0.75, 0.5]), ([6, 5], [0.25, 0.5])]
    twice = mixed_target(plain, [(order, torch.tensor([0.5, 1.0]))])
    assert [(a.tolist(), w.tolist()) for a, w in twice] == [([6, 5], [0.25, 0.75]), ([5, 6], [0.25, 0.25])]
