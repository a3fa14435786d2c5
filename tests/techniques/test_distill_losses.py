"""The distances to a teacher against loops in float64, written from the papers' definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fgvc.techniques.distill.losses import attention, decoupled, divergence, hint, softened

LOGITS = st.lists(st.lists(st.floats(-15, 15, width=32), min_size=4, max_size=4), min_size=1, max_size=3)


def softmax(z: list[float], temperature: float) -> list[float]:
    top = max(z)
    e = [math.exp((v - top) / temperature) for v in z]
    return [v / sum(e) for v in e]


def kl(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


@given(LOGITS, LOGITS, st.sampled_from([1.0, 4.0]))
def test_kd_is_the_divergence_of_softened_probabilities(ours: list, theirs: list, temperature: float) -> None:
    size = min(len(ours), len(theirs))
    ours, theirs = ours[:size], theirs[:size]
    pairs = zip(ours, theirs, strict=True)
    expected = sum(kl(softmax(t, temperature), softmax(s, temperature)) for s, t in pairs) / size
    loss = divergence(*(softened([torch.tensor(z)], temperature) for z in (ours, theirs)))
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(LOGITS, LOGITS, st.sampled_from([1.0, 4.0]), st.integers(0, 3))
def test_dkd_is_its_definition(ours: list, theirs: list, temperature: float, y: int) -> None:
    size = min(len(ours), len(theirs))
    expected = 0.0
    for s, t in zip(ours[:size], theirs[:size], strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        rest = [k for k in range(4) if k != y]
        not_p, not_q = sum(p[k] for k in rest), sum(q[k] for k in rest)
        tckd = kl([q[y], not_q], [p[y], not_p])
        nckd = kl(softmax([t[k] for k in rest], temperature), softmax([s[k] for k in rest], temperature))
        expected += (1.5 * tckd + 8.0 * nckd) / size
    logs = (softened([torch.tensor(z[:size])], temperature) for z in (ours, theirs))
    loss = decoupled(*logs, torch.full((size,), y), alpha=1.5, beta=8.0)
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_dkd_with_the_teachers_own_weight_of_the_rest_is_kd() -> None:
    """KD = TCKD + (1 - q_y) NCKD (Zhao et al., equation 7): with one row, beta = 1 - q_y."""
    rng = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(1, 6, generator=rng).double().log_softmax(1) for _ in range(2))
    beta = 1 - float(log_q[0, 2].exp())
    loss = decoupled(log_p, log_q, torch.tensor([2]), alpha=1.0, beta=beta)
    torch.testing.assert_close(loss, divergence(log_p, log_q))


def test_dkd_stays_finite_where_one_minus_p_underflows() -> None:
    z = torch.tensor([[200.0, 0, -3, 1]], requires_grad=True)
    log_q = softened([torch.tensor([[180.0, 2, 0, 1]])], 1.0)
    loss = decoupled(softened([z], 1.0), log_q, torch.tensor([0]), alpha=1.0, beta=8.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()
    assert float(loss.detach()) == pytest.approx(
        8 * kl(softmax([2.0, 0, 1], 1), softmax([0.0, -3, 1], 1)), rel=1e-5
    )  # TCKD has nothing left


@given(LOGITS, st.lists(st.floats(0.125, 8, width=32), min_size=3, max_size=3))
def test_several_teachers_are_averaged_as_probabilities(rows: list, weights: list[float]) -> None:
    teachers = [[[v * scale for v in row] for row in rows] for scale in (1.0, -1.0, 0.5)]
    averaged = softened([torch.tensor(z) for z in teachers], 4.0, weights)
    for b in range(len(rows)):
        p = [softmax(z[b], 4.0) for z in teachers]
        for k in range(4):
            expected = sum(w * q[k] for w, q in zip(weights, p, strict=True)) / sum(weights)
            assert math.exp(float(averaged[b, k])) == pytest.approx(expected, rel=1e-4)


def pooled(f: Tensor, side: int) -> list[list[float]]:
    """One channel (H,H) in `side` x `side` equal cells."""
    cell = f.shape[0] // side
    return [
        [
            sum(float(f[i * cell + u, j * cell + v]) for u in range(cell) for v in range(cell)) / cell**2
            for j in range(side)
        ]
        for i in range(side)
    ]


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (4, 2), (2, 6)])
def test_attention_is_its_definition(ours: int, theirs: int) -> None:
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 5, ours, ours, generator=rng), torch.randn(2, 3, theirs, theirs, generator=rng)
    side, total = min(ours, theirs), 0.0
    for sample in range(2):
        maps = []
        for f in (a[sample].double(), b[sample].double()):
            energy = sum(channel * channel for channel in f) / len(f)
            flat = [value for row in pooled(energy, side) for value in row]
            norm = math.sqrt(sum(v * v for v in flat))
            maps.append([v / norm for v in flat])
        total += sum((u - v) ** 2 for u, v in zip(*maps, strict=True))
    assert float(attention(a, b)) == pytest.approx(1000 * total / (2 * side * side), rel=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (4, 2), (2, 6)])
def test_a_hint_is_its_definition(ours: int, theirs: int) -> None:
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 5, ours, ours, generator=rng), torch.randn(2, 3, theirs, theirs, generator=rng)
    regressor, side, total = nn.Conv2d(5, 3, 1), min(ours, theirs), 0.0
    kernel, bias = regressor.weight[:, :, 0, 0].tolist(), regressor.bias.tolist()
    for sample in range(2):
        f = torch.tensor([pooled(channel, side) for channel in a[sample].double()])
        for c in range(3):
            target = pooled(b[sample, c].double(), side)
            for i in range(side):
                for j in range(side):
                    value = sum(kernel[c][d] * float(f[d, i, j]) for d in range(5)) + bias[c]
                    total += (value - target[i][j]) ** 2
    assert float(hint(regressor, a, b).detach()) == pytest.approx(total / (2 * 3 * side * side), rel=1e-5)


def test_a_teacher_that_agrees_costs_nothing() -> None:
    log_q = softened([torch.randn(3, 5)], 4.0)
    f = torch.randn(3, 4, 2, 2)
    assert float(divergence(log_q, log_q)) == pytest.approx(0, abs=1e-6)
    assert float(decoupled(log_q, log_q, torch.tensor([0, 1, 4]), alpha=1, beta=8)) == pytest.approx(0, abs=1e-6)
    assert float(attention(f, 3 * f)) == pytest.approx(0, abs=1e-8)  # whatever the scale
    assert torch.isfinite(attention(f, torch.zeros(3, 1, 2, 2)))
