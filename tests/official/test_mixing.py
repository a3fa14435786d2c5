"""mixup, CutMix and SnapMix, on the draws of their authors' code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.models.class_maps import cam
from fgvc.models.loss import cross_entropy
from fgvc.techniques.api import Batch, Output, View
from fgvc.techniques.boxes import area_share, boxes_around, inside
from fgvc.techniques.mixing import boxes_of_partners, mixed_target, pasted
from fgvc.techniques.mixup.settings import MixupSettings
from fgvc.techniques.plan import Context
from fgvc.techniques.registry import build_technique
from fgvc.techniques.snapmix.settings import SnapmixSettings
from fgvc.techniques.snapmix.technique import semantic
from tests.official.conftest import Arrays

XYXY = [1, 0, 3, 2]  # the recorded boxes are top, left, bottom, right


def batch(x: Tensor, y: Tensor) -> Batch:
    return Batch(x=x, target=[(y, None)], x_clean=x, labels=y, index=y, geometry=torch.zeros(len(y), 2, 3))


def context(draw: object, **services: object) -> Context:
    same = lambda f: f  # noqa: E731
    return Context(draw=draw, progress=0.0, branches={}, head=same, pooled=same, grid=same, **services)


def test_mixup(official: Callable[[str], Arrays]) -> None:
    a = official("mixup")
    share = a["share"].repeat(6)
    mixed = build_technique(MixupSettings(alpha=1.0)).on_batch(batch(a["images"], a["labels"]), context((share, a["partners"])))
    torch.testing.assert_close(mixed.x, a["mixed"], rtol=0, atol=4.4e-15)
    assert torch.equal(mixed.target[1][0], a["partner_labels"])
    z = a["logits"].clone().requires_grad_()
    loss = cross_entropy(z, mixed.target)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss.detach().double(), a["loss"], rtol=0, atol=3.3e-7)
    torch.testing.assert_close(gradient, a["grad"], rtol=0, atol=1.3e-7)


@pytest.mark.parametrize("draw", range(3))
def test_cutmix(draw: int, official: Callable[[str], Arrays]) -> None:
    a = official("cutmix")
    box = a["box"][draw][None, XYXY]
    mixed = boxes_of_partners(batch(a["images"], a["labels"]), box, a["partners"][draw])
    assert torch.equal(mixed.x, a[f"mixed_{draw}"])
    torch.testing.assert_close(1 - area_share(box, (16, 16))[0].double(), a["share"][draw], rtol=0, atol=1e-6)
    logits = mixed.x.mean((2, 3)) @ a["head_weight"].T
    torch.testing.assert_close(logits, a["logits"][draw], rtol=0, atol=1e-6)
    torch.testing.assert_close(cross_entropy(logits, mixed.target).double(), a["loss"][draw], rtol=0, atol=9.2e-7)


def test_known_the_sides_of_cutmix_s_boxes(official: Callable[[str], Arrays]) -> None:
    """fgvc rounds sqrt(1 - lambda) S; theirs cuts down and makes it even: edges differ by up to a pixel."""
    a = official("cutmix")
    size = a["box_size"]
    exact = (1 - a["box_share_drawn"]).sqrt()[:, None] * size
    sides = exact.round().long()
    ours = boxes_around(a["box_centres"], sides, tuple(size.tolist()))[:, XYXY]
    assert int((ours - a["boxes"]).abs().max()) == 1
    theirs = exact.long() // 2 * 2
    alike = (sides == theirs).all(1)
    assert int(alike.sum()) == 18
    assert torch.equal(ours[alike], a["boxes"][alike])
    assert torch.equal(boxes_around(a["box_centres"], theirs, tuple(size.tolist()))[:, XYXY], a["boxes"])


def of_draw(a: Arrays, draw: int, **settings: object) -> Batch:
    maps = cam(a["features"], a["classifier_weight"], a["labels"])
    output = Output(
        View("net", a["images"], [(a["labels"], None)]), a["features"], torch.zeros(6, 4), mapper=lambda *_: maps
    )
    technique = build_technique(SnapmixSettings(**settings))
    technique._method = "cam"
    draws = a["box_to"][draw][None, XYXY], a["box_of"][draw][None, XYXY], a["partners"][draw]
    return technique.on_batch(batch(a["images"], a["labels"]), context(draws, eval_pass=lambda of: output))


def test_snapmix_s_maps(official: Callable[[str], Arrays]) -> None:
    a = official("snapmix")
    assert SnapmixSettings().alpha == a.number("alpha")
    maps = semantic(cam(a["features"], a["classifier_weight"], a["labels"]), (16, 16))
    torch.testing.assert_close(maps, a["maps"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("draw", range(2))
def test_snapmix_s_weights(draw: int, official: Callable[[str], Arrays]) -> None:
    a = official("snapmix")
    mixed = of_draw(a, draw)
    (y, own), (other, theirs) = mixed.target
    same = y == other
    assert torch.equal(same, a["same_class"][draw])
    for ours, weight in ((own, a["weight_own"][draw]), (theirs, a["weight_partner"][draw])):
        torch.testing.assert_close(ours[~same], weight[~same], rtol=0, atol=3.9e-8)
        # Known: a pair of one class counts twice there: both of its weights are the sum of both.
        torch.testing.assert_close((own + theirs)[same], weight[same], rtol=0, atol=1.6e-8)
        assert ((weight - ours)[same] > 1e-3).all()
    assert int(same.sum()) == (2 if draw == 0 else int(same.sum()))
    double = of_draw(a, draw, one_class="twice").target
    for (_, ours), weight in zip(double, (a["weight_own"][draw], a["weight_partner"][draw]), strict=True):
        torch.testing.assert_close(ours, weight, rtol=0, atol=3.9e-8)


@pytest.mark.parametrize("draw", range(2))
def test_snapmix_s_pixels(draw: int, official: Callable[[str], Arrays]) -> None:
    """Known: the piece is resized with corners aligned there, by areas here; outside of the box nothing differs."""
    a = official("snapmix")
    mixed, theirs = of_draw(a, draw).x, a[f"mixed_{draw}"]
    to, of = a["box_to"][draw], a["box_of"][draw]
    (box,) = inside(to[None, None, XYXY], (16, 16))
    assert torch.equal(mixed[:, :, ~box], theirs[:, :, ~box])
    source = a["images"][a["partners"][draw]]
    for aligned, expected, atol in ((False, mixed, 3.5e-5), (True, theirs, 1e-12)):
        piece, by_hand = source[:, :, of[0] : of[2], of[1] : of[3]], a["images"].clone()
        size = (int(to[2] - to[0]), int(to[3] - to[1]))
        by_hand[:, :, to[0] : to[2], to[1] : to[3]] = F.interpolate(piece, size, mode="bilinear", align_corners=aligned)
        torch.testing.assert_close(by_hand, expected, rtol=0, atol=atol)
    assert 0.01 < (mixed - theirs).abs().max() < 1
    assert torch.equal(pasted(a["images"], source, to=to[None, XYXY], of=of[None, XYXY]), mixed)


def test_targets_of_a_mixed_batch_name_both(official: Callable[[str], Arrays]) -> None:
    a = official("cutmix")
    share = a["share"][0].repeat(4)
    target = mixed_target([(a["labels"], None)], [(None, share), (a["partners"][0], 1 - share)])
    z = a["logits"][0]
    log_p = z.log_softmax(1)
    by_hand = -(
        share * log_p[range(4), a["labels"]] + (1 - share) * log_p[range(4), a["labels"][a["partners"][0]]]
    ).mean()
    torch.testing.assert_close(by_hand, a["loss"][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(cross_entropy(z, target).double(), a["loss"][0], rtol=0, atol=9.2e-7)
