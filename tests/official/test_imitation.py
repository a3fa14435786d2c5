"""Distillation as mdistiller computes it: KD, DKD, attention transfer; the latter also by its authors' code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.distill.losses import attention, decoupled, divergence, softened
from tests.official.conftest import Arrays


def with_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach().double(), gradient


@pytest.mark.parametrize("case", range(3))
def test_kd(case: int, official: Callable[[str], Arrays]) -> None:
    a = official("kd")
    t, theirs = float(a["temperature"][case]), softened([a["logits_teacher"][case]], float(a["temperature"][case]))
    loss, gradient = with_gradient(lambda z: t**2 * divergence(softened([z], t), theirs), a["logits_student"][case])
    torch.testing.assert_close(loss, a["loss"][case], rtol=4e-7, atol=1e-6)  # float32: 1.8e-6 of 44
    torch.testing.assert_close(gradient, a["grad"][case], rtol=0, atol=4.7e-7)


@pytest.mark.parametrize("case", range(3))
def test_dkd(case: int, official: Callable[[str], Arrays]) -> None:
    a = official("dkd")
    t, theirs = float(a["temperature"][case]), softened([a["logits_teacher"][case]], float(a["temperature"][case]))
    shares = {"alpha": float(a["alpha"][case]), "beta": float(a["beta"][case])}

    def term(z: Tensor) -> Tensor:
        return t**2 * decoupled(softened([z], t), theirs, a["target"][case], **shares)

    loss, gradient = with_gradient(term, a["logits_student"][case])
    torch.testing.assert_close(loss, a["loss"][case], rtol=7e-7, atol=1e-6)  # float32: 6e-6 of 85
    torch.testing.assert_close(gradient, a["grad"][case], rtol=0, atol=1.1e-6)


def test_attention_of_one_size(official: Callable[[str], Arrays]) -> None:
    a = official("attention_transfer").of("same")
    weight = official("attention_transfer").number("weight")
    loss, gradient = with_gradient(lambda f: attention(f, a["teacher"]), a["student"])
    for suffix in ("", "_original"):  # mdistiller's, and the paper's own
        torch.testing.assert_close(loss / weight, a[f"loss{suffix}"], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient / weight, a[f"grad{suffix}"], rtol=0, atol=1e-6)
    own = F.normalize(a["student"].square().mean(1).flatten(1), dim=1)
    torch.testing.assert_close(own, a["attention_original"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "apart", "whole"), [("finer", 1.43, 19.4), ("coarser", 13.0, 33.2)])
def test_known_attention_of_two_sizes(case: str, apart: float, whole: float, official: Callable[[str], Arrays]) -> None:
    """mdistiller pools features and squares then, fgvc squares and pools attention: the paper's code has one size only."""
    a = official("attention_transfer").of(case)
    side = min(a["student"].shape[2], a["teacher"].shape[2])
    loss, _ = with_gradient(lambda f: attention(f, a["teacher"]), a["student"])
    assert float((loss - 1000 * a["loss"]).abs()) == pytest.approx(apart, rel=0.01)
    assert float(1000 * a["loss"]) == pytest.approx(whole, rel=0.01)

    def pooled_first(f: Tensor) -> Tensor:
        return attention(*(F.adaptive_avg_pool2d(x, side) for x in (f, a["teacher"])))

    loss, gradient = with_gradient(pooled_first, a["student"])
    torch.testing.assert_close(loss / 1000, a["loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient / 1000, a["grad"], rtol=0, atol=1e-6)
