"""DCL: jigsaws, the law of drawing them, and its heads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.techniques.api import MAIN, Output, View
from fgvc.techniques.dcl.jigsaw import cut, draw_jigsaws, places
from fgvc.techniques.dcl.settings import DclSettings
from fgvc.techniques.dcl.technique import DESTROYED
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique
from tests.official.conftest import Arrays


def test_a_jigsaw(official: Callable[[str], Arrays]) -> None:
    a = official("dcl")
    border = a.number("border")
    inner = a["image"][border:-border, border:-border].permute(2, 0, 1)[None]
    swapped = cut(inner, a["swapped_source"][None])[0].permute(1, 2, 0)
    assert torch.equal(swapped, a["swapped_inner"])
    resized = np.asarray(Image.fromarray(swapped.numpy()).resize((62, 62)))
    assert np.abs(resized.astype(int) - a["swapped"].numpy()).max() <= 1, "Pillow's own rounding"


def stays(sources: Tensor) -> tuple[float, int]:
    """The share of tiles that stay, and how far along an axis one goes at most."""
    n = 7
    home = torch.arange(n * n)
    far = torch.maximum((sources // n - home // n).abs(), (sources % n - home % n).abs())
    return float((far == 0).double().mean()), int(far.max())


def test_known_the_law_of_drawing(official: Callable[[str], Arrays]) -> None:
    """Theirs is no region confusion within 2k: few tiles stay, and some go right across."""
    a = official("dcl")
    assert torch.equal(a["sources"].sort(1).values, torch.arange(49).expand(40, -1))
    share, far = stays(a["sources"])
    assert share == pytest.approx(0.097, abs=5e-4)
    assert far == 6
    ours = torch.from_numpy(draw_jigsaws(np.random.default_rng(0), 400, grid=7, reach=DclSettings().reach))
    share, far = stays(ours)
    assert share == pytest.approx(0.219, abs=0.01)
    assert far == 3


def test_places_are_those_that_theirs_names(official: Callable[[str], Arrays]) -> None:
    """(t - N^2 // 2) / N^2 there, row and column as shares here."""
    a = official("dcl")
    home = torch.arange(16).expand(3, -1)
    for jigsaws, law in ((home, a["batch_law"][0::2]), (a["jigsaws"], a["batch_law"][1::2])):
        row, column = (4 * places(jigsaws) - 0.5).unbind(1)
        index = (row * 4 + column).flatten(1).double()
        torch.testing.assert_close((index - 8) / 16, law, rtol=0, atol=1e-6)
    grid = a.number("grid")
    numbers = (torch.arange(grid**2, dtype=torch.float64) - grid**2 // 2) / grid**2
    torch.testing.assert_close(numbers, a["law_original"], rtol=0, atol=1e-6)
    exact = numbers[a["swapped_source"]]
    assert not (a["law_swapped_guessed"] == exact).any(), "known: guessed by mean intensity, no tile right here"


@pytest.mark.parametrize("head", ["2-way", "2K-way"])
def test_classes_and_the_destroyed_head(head: str, official: Callable[[str], Arrays]) -> None:
    a = official("dcl")
    kind = head.removesuffix("-way") + ("way" if head == "2-way" else "")
    f = a["features"].clone().requires_grad_()
    weight = a[f"destroyed_weight_{kind}"]
    # Original is 1 and destroyed 0 there, the other way round here.
    own = nn.Linear(6, len(weight), bias=False).double()
    with torch.no_grad():
        own.weight.copy_(weight.flip(0) if head == "2-way" else weight)
    location = nn.Conv2d(6, 2, 1).double()
    halves = {}
    for name, rows in ((MAIN, slice(0, None, 2)), (DESTROYED, slice(1, None, 2))):
        target = [(a["labels"], None)]
        logits = f[rows].mean((2, 3)) @ a["classifier_weight"].T
        halves[name] = Output(View(name, torch.zeros(3, 3, 8, 8), target), f[rows], logits)
    ctx = Context(
        draw=a["jigsaws"], progress=0.0, branches={"destroyed": own, "location": location}, head=lambda f: f,
        pooled=lambda f: f.mean((2, 3)), grid=lambda f, size=None: f,
    )  # fmt: skip
    terms = build_technique(DclSettings(grid=4, head=head)).losses(halves, ctx)
    torch.testing.assert_close(terms["destroyed"].detach().double(), a[f"destroyed_loss_{kind}"], rtol=0, atol=8.4e-7)
    logits = torch.stack([half.logits for half in halves.values()], 1).flatten(0, 1)
    torch.testing.assert_close(logits.detach(), a["logits"], rtol=0, atol=1e-12)
    classes = F.cross_entropy(logits, a["batch_labels"])
    torch.testing.assert_close(classes.detach(), a["class_loss"], rtol=0, atol=4.4e-15)
    (gradient,) = torch.autograd.grad(classes + terms["destroyed"], f)
    torch.testing.assert_close(gradient, a[f"classes_and_destroyed_grad_{kind}"], rtol=0, atol=4.7e-9)
    their_logits = a["features"].mean((2, 3)) @ weight.T
    torch.testing.assert_close(their_logits, a[f"destroyed_logits_{kind}"], rtol=0, atol=1e-12)
    assert torch.equal(a["batch_labels"], a["labels"].repeat_interleave(2))
    targets = a[f"batch_destroyed_{kind}"]
    expected = torch.tensor([1, 0] * 3) if head == "2-way" else a["batch_labels"] + torch.tensor([0, 5] * 3)
    assert torch.equal(targets, expected)
    total = a["class_loss"] + a.number("beta") * a[f"destroyed_loss_{kind}"] + a.number("gamma") * a["law_loss"]
    torch.testing.assert_close(total, a[f"total_{kind}"], rtol=0, atol=1e-12)


def test_known_their_location_head(official: Callable[[str], Arrays]) -> None:
    """One tanh channel there, two linear ones here: their numbers, by hand."""
    a = official("dcl")
    f = a["features"].clone().requires_grad_()
    mask = F.avg_pool2d(F.conv2d(f, a["mask_weight"], a["mask_bias"]), 2).tanh().flatten(1)
    torch.testing.assert_close(mask.detach(), a["mask"], rtol=0, atol=1e-12)
    loss = (mask - a["batch_law"]).abs().mean()
    torch.testing.assert_close(loss.detach(), a["law_loss"], rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, f)
    torch.testing.assert_close(gradient, a["law_grad"], rtol=0, atol=1e-12)
