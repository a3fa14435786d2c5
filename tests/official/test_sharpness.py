"""SAM in the form of davda54's code, and Samsung's ASAM, which measures biases and batch norms otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.config.training import Sam
from fgvc.training.sam import perturbed
from tests.official.conftest import Arrays

PARTS = ("conv_weight", "conv_bias", "norm_weight", "norm_bias", "head_weight", "head_bias")


class Net(nn.Module):
    def __init__(self, a: Arrays, *, weights_only: bool = False) -> None:
        super().__init__()
        own = {part: nn.Parameter(a[f"start_{part}"].clone()) for part in PARTS}
        if weights_only:
            own = {part: own[part] for part in ("conv_weight", "head_weight")}
        self.own = nn.ParameterDict(own)
        self.norm = nn.Identity() if weights_only else nn.BatchNorm2d(4).double()
        if not weights_only:
            self.norm.weight, self.norm.bias = self.own["norm_weight"], self.own["norm_bias"]

    def forward(self, x: Tensor) -> Tensor:
        own = {part: self.own.get(part) for part in PARTS}
        f = self.norm(F.conv2d(x, own["conv_weight"], own["conv_bias"]))
        return F.linear(F.max_pool2d(f.relu(), 2).flatten(1), own["head_weight"], own["head_bias"])


def climbed(net: Net, a: Arrays, sam: Sam, optimizer: torch.optim.Optimizer) -> tuple[dict, dict, list[float]]:
    """One step; the gradients, the ways uphill, and the losses at w and w + e."""
    optimizer.zero_grad()
    first = F.cross_entropy(net(a["images"]), a["labels"])
    first.backward()
    gradients = {part: weight.grad.clone() for part, weight in net.own.items()}
    start = {part: weight.detach().clone() for part, weight in net.own.items()}
    with perturbed(net, sam):
        climb = {part: (weight - start[part]).detach() for part, weight in net.own.items()}
        second = F.cross_entropy(net(a["images"]), a["labels"])
        second.backward()
    optimizer.step()
    return gradients, climb, [first.item(), second.item()]


def same(tensors: dict, a: Arrays, prefix: str, atol: float) -> None:
    for part, value in tensors.items():
        torch.testing.assert_close(value.detach(), a[f"{prefix}_{part}"], rtol=0, atol=atol, msg=f"{prefix} {part}")


@pytest.mark.parametrize(("kind", "adaptive"), [("plain", False), ("adaptive", True)])
def test_sam_and_its_adaptive_form(kind: str, adaptive: bool, official: Callable[[str], Arrays]) -> None:
    a = official("sam")
    net, sam = Net(a).train(), Sam(rho=a.number(f"{kind}_rho"), adaptive=adaptive)
    optimizer = torch.optim.SGD(net.own.values(), lr=a.number("rate"), momentum=a.number("momentum"))
    for step in range(a.number("steps")):
        gradients, climb, losses = climbed(net, a, sam, optimizer)
        torch.testing.assert_close(torch.tensor(losses).double(), a[f"{kind}_losses"][step], rtol=0, atol=1e-6)
        if step == 0:
            same(gradients, a, "first_grad", 1e-6)
            same(climb, a, f"{kind}_first_climb", 1e-6)
        if step in (0, 2):
            same(dict(net.own), a, f"{kind}_after{step + 1}", 1e-6)
    torch.testing.assert_close(net.norm.running_mean, a[f"{kind}_running_mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(net.norm.running_var, a[f"{kind}_running_var"], rtol=0, atol=1e-6)


def test_samsung_s_sam(official: Callable[[str], Arrays]) -> None:
    a = official("asam")
    net = Net(a).train()
    optimizer = torch.optim.SGD(net.own.values(), lr=a.number("rate"))
    gradients, climb, _ = climbed(net, a, Sam(rho=a.number("sam_rho")), optimizer)
    same(gradients, a, "asam_grad", 4e-14)
    same(climb, a, "sam_climb", 4e-14)
    same(dict(net.own), a, "sam_after1", 4e-14)


def test_samsung_s_asam_of_weights_alone(official: Callable[[str], Arrays]) -> None:
    a = official("asam")
    net = Net(a, weights_only=True).train()
    optimizer = torch.optim.SGD(net.own.values(), lr=a.number("rate"))
    gradients, climb, _ = climbed(net, a, Sam(rho=a.number("weights_only_rho"), adaptive=True), optimizer)
    same(gradients, a, "weights_only_grad", 5.3e-13)
    same(climb, a, "weights_only_climb", 5.3e-13)
    same(dict(net.own), a, "weights_only_after1", 5.3e-13)


def test_samsung_s_asam_with_its_settings(official: Callable[[str], Arrays]) -> None:
    """T = |w| + eta for weights, 1 for biases: `eta` says so."""
    a = official("asam")
    net = Net(a).train()
    optimizer = torch.optim.SGD(net.own.values(), lr=a.number("rate"))
    sam = Sam(rho=a.number("asam_rho"), adaptive=True, eta=a.number("asam_eta"))
    gradients, climb, _ = climbed(net, a, sam, optimizer)
    same(gradients, a, "asam_grad", 1e-6)
    same(climb, a, "asam_climb", 1e-6)
    same(dict(net.own), a, "asam_after1", 1e-6)


def test_known_asam_of_biases_and_norms(official: Callable[[str], Arrays]) -> None:
    a = official("asam")
    net = Net(a).train()
    optimizer = torch.optim.SGD(net.own.values(), lr=a.number("rate"))
    gradients, climb, _ = climbed(net, a, Sam(rho=a.number("asam_rho"), adaptive=True), optimizer)
    ours, theirs = (torch.cat([way[part].flatten() for part in PARTS]) for way in (climb, a.of("asam_climb")))
    assert float(F.cosine_similarity(ours, theirs, dim=0)) == pytest.approx(0.79, abs=0.005)
    assert float((ours - theirs).abs().max()) == pytest.approx(0.18, abs=0.005)
    scale = {
        part: a[f"start_{part}"].abs() + a.number("asam_eta") if part.endswith("weight") else torch.ones_like(g)
        for part, g in gradients.items()
    }
    length = torch.sqrt(sum((scale[part] * g).square().sum() for part, g in gradients.items()))
    by_hand = {part: a.number("asam_rho") * scale[part].square() * g / length for part, g in gradients.items()}
    same(by_hand, a, "asam_climb", 1e-12)
