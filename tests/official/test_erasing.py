"""ACoL and ADL as wsolevaluation has them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fgvc.models.class_maps import ClassMapper, cam, normalised
from fgvc.techniques.acol.settings import AcolSettings
from fgvc.techniques.adl.settings import AdlSettings
from fgvc.techniques.api import Output, View
from fgvc.techniques.masks import select
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique
from fgvc.techniques.settings import Region
from tests.official.conftest import Arrays


class Head(nn.Module):
    """The deployed pooling and linear layer, on features that are given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        with torch.no_grad():
            self.fc.weight.copy_(weight)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_head(self, f: Tensor) -> Tensor:
        return self.fc(f.mean((2, 3)))


def context(draw: object = None, branches: dict | None = None) -> Context:
    return Context(
        draw=draw, progress=0.0, branches=branches or {}, head=lambda f: f, pooled=lambda f: f, grid=lambda f, size=None: f,
        scaled=lambda f, weights: f * weights.to(f.dtype)[:, None],
    )  # fmt: skip


def erased(a: Arrays, area: tuple[float, float] | None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """ACoL's term, the cells that stay, and d(CE(A) + CE(B)) / d features."""
    settings = {} if area is None else {"region": {"value": a.number("threshold"), "area": area}}
    technique = build_technique(AcolSettings.model_validate({"map": "cam", **settings}))
    technique._method = "cam"
    head, other = Head(a["weight_a"]), nn.Conv2d(8, 5, 1).double()
    with torch.no_grad():
        other.weight.copy_(a["weight_b"][:, :, None, None])
        other.bias.copy_(a["bias_b"])
    f = a["features"].clone().requires_grad_()
    logits, target = head.forward_head(f), [(a["labels"], None)]
    main = Output(View("main", torch.zeros(6, 3, 6, 7), target), f, logits, mapper=ClassMapper(head))
    ctx = context(branches={"head0": other})
    terms = technique.losses({"main": main}, ctx)
    loss = nn.functional.cross_entropy(logits, a["labels"]) + terms["erased"]
    (gradient,) = torch.autograd.grad(loss, f)
    return {**terms, "loss": loss.detach()}, ~ctx.shown["erased"][1], gradient


def test_acol_without_a_cap(official: Callable[[str], Arrays]) -> None:
    a = official("acol")
    terms, kept, gradient = erased(a, (0.0, 0.999))
    assert torch.equal(kept, a["kept"])
    torch.testing.assert_close(a["features"] * kept[:, None], a["erased_features"], rtol=0, atol=0)
    torch.testing.assert_close(terms["erased"].double(), a["loss"] - a["loss_a"], rtol=0, atol=1e-6)
    torch.testing.assert_close(terms["loss"].double(), a["loss"], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, a["grad_features"], rtol=0, atol=3.8e-9)


def test_acol_s_logits_and_attention(official: Callable[[str], Arrays]) -> None:
    a = official("acol")
    head = Head(a["weight_a"])
    torch.testing.assert_close(head.forward_head(a["features"]), a["logits_a"], rtol=0, atol=2.2e-15)
    pooled = a["erased_features"].mean((2, 3))
    torch.testing.assert_close(pooled @ a["weight_b"].T + a["bias_b"], a["logits_b"], rtol=0, atol=2.2e-15)
    maps = normalised(cam(a["features"], a["weight_a"], a["labels"]))
    theirs = a["attention"].nan_to_num(0.0)
    assert a["attention"][4].isnan().all(), "known: a flat map is NaN there; here it is 0, and erases nothing either"
    torch.testing.assert_close(maps, theirs, rtol=0, atol=1e-6)


def test_known_acol_s_cap(official: Callable[[str], Arrays]) -> None:
    """Row 5 would lose 36 of 42 cells, all of one plateau: with the cap it keeps all."""
    a = official("acol")
    _, kept, _ = erased(a, None)
    assert AcolSettings().region.area[1] == 0.7
    assert torch.equal(kept[:5], a["kept"][:5])
    assert kept[5].all()
    assert int((~a["kept"][5]).sum()) == 36
    maps = normalised(cam(a["features"], a["weight_a"], a["labels"]))
    assert not select(maps, (6, 7), Region(value=0.6, area=(0.0, 0.7)))[5].any()


@pytest.mark.parametrize(("case", "number"), [("drop_90", 0), ("drop_50", 1)])
def test_adl_drops(case: str, number: int, official: Callable[[str], Arrays]) -> None:
    a = official("adl")
    y, gradient = gated(a, drops=True, threshold=float(a["thresholds"][number]))
    rows = [0, 1, 2, 3, 5]
    torch.testing.assert_close(y[rows], a[case][rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient[rows], a[f"{case}_grad"][rows], rtol=0, atol=1.4e-6)
    some = a["features"][rows].abs().sum(1) > 0
    assert torch.equal((y[rows].abs().sum(1) > 0)[some], a[f"{case}_kept"][rows][some])
    # Known: where nothing is attended (the mean is 0 everywhere) theirs drops all, fgvc nothing.
    assert not a[f"{case}_kept"][4].any()
    assert torch.equal(y[4], a["features"][4])
    assert torch.equal(a[case][4], torch.zeros_like(y[4]))


def test_adl_drops_all_where_nothing_is_attended_as_its_authors_do(official: Callable[[str], Arrays]) -> None:
    a = official("adl")
    for case, number in (("drop_90", 0), ("drop_50", 1)):
        y, gradient = gated(a, drops=True, threshold=float(a["thresholds"][number]), unattended="drop")
        torch.testing.assert_close(y, a[case], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, a[f"{case}_grad"], rtol=0, atol=1.4e-6)


def test_adl_weighs(official: Callable[[str], Arrays]) -> None:
    a = official("adl")
    y, gradient = gated(a, drops=False, threshold=0.9)
    torch.testing.assert_close(y, a["importance"], rtol=0, atol=1.2e-6)
    torch.testing.assert_close(gradient, a["importance_grad"], rtol=0, atol=1.4e-6)


def gated(a: Arrays, *, drops: bool, threshold: float, **settings: object) -> tuple[Tensor, Tensor]:
    technique = build_technique(AdlSettings(drop_rate=1.0 if drops else 0.0, threshold=threshold, **settings))
    draw = technique.draw(SimpleNamespace(random=lambda shape, dtype: torch.full(shape, 0.5).numpy()), None)  # type: ignore[arg-type]
    f = a["features"].clone().requires_grad_()
    y = technique._gate(0, f, context(draw))
    (gradient,) = torch.autograd.grad((y * a["cotangent"]).sum(), f)
    return y.detach(), gradient
