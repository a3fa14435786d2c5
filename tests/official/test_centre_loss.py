"""Centre loss in pytorch-center-loss's form, which is not the paper's: twice the loss, centres that move by it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fgvc.techniques.api import Output, View
from fgvc.techniques.centre_loss.settings import CentreLossSettings
from fgvc.techniques.centre_loss.technique import Centres
from fgvc.techniques.centres import class_sums
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique
from tests.official.conftest import Arrays


def test_known_twice_the_loss_and_a_step_by_the_gradient(official: Callable[[str], Arrays]) -> None:
    a = official("centre_loss")
    centres = Centres(5, 6).double()
    centres.values.copy_(a["centres"])
    technique = build_technique(CentreLossSettings(rate=a.number("centre_rate")))
    x = a["features"].clone().requires_grad_()
    main = Output(View("main", torch.zeros(12, 3, 1, 1), [(a["labels"], None)]), x, torch.zeros(12, 5))
    same = lambda f: f  # noqa: E731
    ctx = Context(draw=None, progress=0.0, branches={"centres": centres}, head=same, pooled=same, grid=same)
    loss = technique.losses({"main": main}, ctx)["centre"]
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(2 * loss.detach().double(), a["loss"], rtol=0, atol=1e-5)  # the term is taken in float32
    torch.testing.assert_close(2 * gradient, a["grad_features"], rtol=0, atol=2e-7)
    exact = (a["features"] - a["centres"][a["labels"]]).square().sum(1).mean()
    torch.testing.assert_close(exact, a["loss"], rtol=0, atol=4e-11)  # the clamp at 1e-12

    moved = Centres(5, 6).double()
    moved.values.copy_(a["centres"])
    moved.follow(a["features"], a["labels"], rate=a.number("centre_rate"))
    present, counts, _ = class_sums(a["features"], a["labels"])
    step = (moved.values - a["centres"])[present] * (1 + counts[:, None]) / a.number("centre_rate")
    torch.testing.assert_close(step, -len(x) / 2 * a["grad_centres"][present], rtol=0, atol=8.9e-15)
    absent = [label for label in range(5) if label not in present]
    assert absent == [4]
    assert torch.equal(moved.values[absent], a["centres_after"][absent])
    # One SGD step there.
    by_hand = a["centres"] - a["centre_rate"] * a["grad_centres"]
    torch.testing.assert_close(by_hand, a["centres_after"], rtol=0, atol=1e-12)
    assert (moved.values - a["centres_after"])[present].abs().max() > 1e-3
