"""The attention branch against loops in float64 written from WS-DAN's formulas, and the odds of the choice of a map."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgvc.techniques.attention_crop_drop.attention import BilinearAttention, _SignedRoot, pick
from fgvc.techniques.attention_crop_drop.settings import SCALE

CHANNELS, MAPS, CLASSES = 3, 2, 4


def build(*, training: bool) -> BilinearAttention:
    torch.manual_seed(0)
    branch = BilinearAttention(CHANNELS, MAPS, CLASSES).double()
    with torch.no_grad():
        branch.norm.running_mean.copy_(torch.tensor([0.2, -0.3]))
        branch.norm.running_var.copy_(torch.tensor([0.002, 1.7]))  # the first is small enough for eps to matter
        branch.norm.weight.copy_(torch.tensor([0.7, 1.3]))
        branch.norm.bias.copy_(torch.tensor([0.1, -0.2]))
    return branch.train(training)


def features(count: int = 3) -> Tensor:
    """Signed features, so that the pooled values are signed too."""
    return torch.randn(count, CHANNELS, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("training", "scale"), [(False, 1), (True, 1), (False, 1e-12)])  # the last: 1e-12 matters
def test_forward_is_the_formula(training: bool, scale: float) -> None:
    branch, f = build(training=training), features() * scale
    mean, var = branch.norm.running_mean.tolist(), branch.norm.running_var.tolist()
    kernel, raw = branch.conv.weight.detach(), torch.zeros(3, MAPS, 2, 4, dtype=torch.float64)
    for m in range(MAPS):
        for c in range(CHANNELS):
            raw[:, m] += float(kernel[m, c, 0, 0]) * f[:, c]
        if training:
            mean[m] = float(raw[:, m].mean())
            var[m] = float(((raw[:, m] - mean[m]) ** 2).mean())
    weight, bias = branch.norm.weight.tolist(), branch.norm.bias.tolist()
    with torch.no_grad():
        attention, vector = branch(f)
        logits = branch.logits(vector)
    for b in range(3):
        values = []
        for m in range(MAPS):
            a = ((raw[b, m] - mean[m]) / math.sqrt(var[m] + 1e-3) * weight[m] + bias[m]).clamp(min=0)
            torch.testing.assert_close(attention[b, m], a)
            for c in range(CHANNELS):
                pooled = sum(float(a[i, j] * f[b, c, i, j]) for i in range(2) for j in range(4)) / 8
                values.append(math.copysign(math.sqrt(abs(pooled) + 1e-12), pooled) if pooled else 0.0)
        length = math.sqrt(sum(value**2 for value in values))
        expected = torch.tensor(values, dtype=torch.float64)
        assert expected.min() < 0 < expected.max(), "signs are part of it"
        torch.testing.assert_close(vector[b], expected)
        torch.testing.assert_close(logits[b], branch.classifier.weight.detach() @ (SCALE * expected / length))


def test_it_computes_in_float32_under_autocast() -> None:
    branch = BilinearAttention(CHANNELS, MAPS, CLASSES).eval()
    f = features().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = branch(f)
        logits = branch.logits(output[1])
        low = branch(f.bfloat16())
    assert {part.dtype for part in (*output, logits, *low)} == {torch.float32}
    attention, vector = branch(f)
    assert torch.equal(output[0], attention)
    assert torch.equal(output[1], vector)
    assert torch.equal(logits, branch.logits(vector))


def test_no_attention_at_all_is_not_an_error() -> None:
    branch, f = build(training=True), features()
    with torch.no_grad():
        branch.norm.bias.fill_(-100)
    attention, vector = branch(f.requires_grad_())
    assert not attention.any()
    assert not vector.any()
    (branch.logits(vector).sum() + branch.distance(vector, torch.tensor([0, 1, 2]))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in branch.parameters())
    assert f.grad.isfinite().all()


def test_distance_is_the_mean_square_to_the_centres_of_length_1() -> None:
    branch = build(training=True)
    torch.manual_seed(2)
    branch.centres.copy_(torch.randn_like(branch.centres) * 5)
    branch.centres[3] = 0  # no sample seen yet
    vector, labels = torch.randn(4, MAPS * CHANNELS, dtype=torch.float64, requires_grad=True), [1, 3, 1, 0]
    expected = 0.0
    for b, y in enumerate(labels):
        centre = branch.centres[y].tolist()
        length = math.sqrt(sum(value**2 for value in centre)) or 1.0
        own = vector[b].tolist()
        long = math.sqrt(sum(v**2 for v in own))
        expected += sum((v / long - c / length) ** 2 for v, c in zip(own, centre, strict=True)) / 4
    distance = branch.distance(vector, torch.tensor(labels))
    assert float(distance.detach()) == pytest.approx(expected)
    distance.backward()
    assert vector.grad.abs().sum() > 0
    assert not branch.centres.requires_grad


@settings(deadline=None)  # the first call in a process warms torch up
@given(st.lists(st.integers(-1, CLASSES - 1), min_size=1, max_size=12), st.floats(0.01, 1), st.integers(0, 2**32))
def test_centres_follow_as_in_a_loop_over_the_classes(labels: list[int], rate: float, seed: int) -> None:
    branch, rng = build(training=True), torch.Generator().manual_seed(seed)
    branch.centres.copy_(torch.randn(branch.centres.shape, generator=rng, dtype=torch.float64))
    branch.centres[0] = 0
    vector = torch.randn(len(labels), MAPS * CHANNELS, generator=rng, dtype=torch.float64, requires_grad=True)
    before, expected = branch.centres.clone(), branch.centres.clone()
    for y in range(CLASSES):
        own = [vector[b].detach() / vector[b].detach().norm() for b in range(len(labels)) if labels[b] == y]
        if own:
            length = float(before[y].square().sum().sqrt()) or 1.0
            expected[y] = before[y] + rate * (sum(own) / len(own) - before[y] / length)
    branch.follow(vector, torch.tensor(labels), rate=rate)
    torch.testing.assert_close(branch.centres, expected)
    assert not branch.centres.requires_grad
    assert "centres" in branch.state_dict()


def test_a_map_is_picked_as_often_as_the_root_of_its_sum() -> None:
    """Sums 1, 0, 9, 0, 4, 0: odds 1, 0, 3, 0, 2, 0 of 6; a uniform grid of draws hits them but for its ends."""
    sums, draws = torch.tensor([1.0, 0, 9, 0, 4, 0]), 6000
    attention = (sums / 4)[None, :, None, None].expand(draws, 6, 2, 2)
    picked = pick(attention, torch.arange(draws) / draws)
    assert picked.shape == (draws, 2, 2)
    counts = torch.stack([(picked.sum((1, 2)) == value).sum() for value in (1.0, 9.0, 4.0)]).double()
    assert int(counts.sum()) == draws, "never one that is zero"
    expected = torch.tensor([1000.0, 3000.0, 2000.0], dtype=torch.float64)
    assert ((counts - expected) ** 2 / expected).sum() < 0.01


def test_every_sample_picks_among_its_own_maps() -> None:
    torch.manual_seed(3)
    attention = torch.rand(4, 3, 2, 2)
    attention[1] = 0  # all zero: one of the zero maps, no error
    attention[2, 1:] = 0
    attention[3, :2] = 0
    for which in (0.0, 0.5, 1 - 2**-24):
        picked = pick(attention, torch.full((4,), which))
        assert any(torch.equal(picked[0], own) for own in attention[0])
        assert not picked[1].any()
        assert torch.equal(picked[2], attention[2, 0])
        assert torch.equal(picked[3], attention[3, 2])
    assert torch.equal(pick(attention, torch.zeros(4))[0], attention[0, 0])
    assert torch.equal(pick(attention, torch.full((4,), 1 - 2**-24))[0], attention[0, 2])


def test_the_signed_root_has_its_gradient() -> None:
    p = torch.tensor([0.3, -0.2, 1e-3, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SignedRoot.apply, p)
    zero = torch.zeros(2, requires_grad=True)
    _SignedRoot.apply(zero).sum().backward()
    assert not zero.grad.any(), "ReLU leaves many zeros"
