"""WS-DAN: attention, bilinear pooling, centres; and the crops and drops it makes of the maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fgvc.techniques.attention_crop_drop.attention import BilinearAttention, pick
from fgvc.techniques.attention_crop_drop.settings import SCALE
from fgvc.techniques.boxes import boxes_of_masks, crop
from fgvc.techniques.masks import erase, select
from fgvc.techniques.settings import Region
from tests.official.conftest import Arrays

ATOL = 4.4e-14
WHOLE = Region.model_construct(area=(0.0, 1.0))
SIZE = (24, 24)


def branch(a: Arrays, scale: float) -> BilinearAttention:
    layer = BilinearAttention(8, 4, 8, scale=scale).double()
    assert layer.norm.eps == a.number("attention_norm_eps")
    assert layer.norm.momentum == a.number("attention_norm_momentum")
    with torch.no_grad():
        layer.conv.weight.copy_(a["attention_conv_weight"])
        layer.norm.weight.copy_(a["attention_norm_weight"])
        layer.norm.bias.copy_(a["attention_norm_bias"])
        layer.norm.running_mean.copy_(a["running_mean_before"])
        layer.norm.running_var.copy_(a["running_var_before"])
        layer.classifier.weight.copy_(a["classifier_weight"])
        layer.centres.copy_(a["centres_before"])
    return layer


def test_attention_and_pooled_features_in_training(official: Callable[[str], Arrays]) -> None:
    a = official("wsdan")
    net, f = branch(a, a.number("classifier_scale")).train(), a["features"].clone().requires_grad_()
    attention, vector = net(f)
    torch.testing.assert_close(attention.detach(), a["attention"], rtol=0, atol=ATOL)
    torch.testing.assert_close(F.normalize(vector.detach(), dim=1), a["vector"], rtol=0, atol=ATOL)
    logits = net.logits(vector)
    torch.testing.assert_close(logits.detach(), a["logits"], rtol=0, atol=ATOL)
    loss = F.cross_entropy(logits, a["labels"])
    torch.testing.assert_close(loss.detach(), a["cross_entropy"], rtol=0, atol=ATOL)
    inputs = {"features": f, "attention_conv": net.conv.weight, "classifier": net.classifier.weight}
    for name, gradient in zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True):
        torch.testing.assert_close(gradient, a[f"cross_entropy_grad_{name}"], rtol=0, atol=ATOL, msg=name)
    torch.testing.assert_close(net.norm.running_mean, a["running_mean_after"], rtol=0, atol=ATOL)
    torch.testing.assert_close(net.norm.running_var, a["running_var_after"], rtol=0, atol=ATOL)
    net.eval()
    with torch.no_grad():
        attention, vector = net(a["features"])
        torch.testing.assert_close(attention, a["eval_attention"], rtol=0, atol=ATOL)
        torch.testing.assert_close(attention.mean(1, keepdim=True), a["eval_mean_map"], rtol=0, atol=ATOL)
        torch.testing.assert_close(F.normalize(vector, dim=1), a["eval_vector"], rtol=0, atol=ATOL)
        torch.testing.assert_close(net.logits(vector), a["eval_logits"], rtol=0, atol=ATOL)


def test_known_the_scale_of_the_classifier(official: Callable[[str], Arrays]) -> None:
    a = official("wsdan")
    with torch.no_grad():
        logits = branch(a, SCALE).train().logits(a["vector"])
    assert (SCALE, a.number("classifier_scale")) == (20, 100)
    torch.testing.assert_close(logits * 5, a["logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("start", ["", "_zero"])
def test_centres_of_labels_that_differ(start: str, official: Callable[[str], Arrays]) -> None:
    a = official("wsdan")
    net, f = branch(a, SCALE).train(), a["features"].clone().requires_grad_()
    if start:
        net.centres.zero_()
    _, vector = net(f)
    loss = net.distance(vector, a["labels"])
    torch.testing.assert_close(loss.detach(), a[f"centre_loss{start}"], rtol=0, atol=ATOL)
    if not start:
        (gradient,) = torch.autograd.grad(loss, f)
        torch.testing.assert_close(gradient, a["centre_loss_grad_features"], rtol=0, atol=ATOL)
    net.follow(vector.detach(), a["labels"], rate=a.number("centre_rate"))
    torch.testing.assert_close(net.centres, a[f"centres_after{start}"], rtol=0, atol=ATOL)


def test_known_centres_of_repeated_labels(official: Callable[[str], Arrays]) -> None:
    """Theirs moves by the last image of a class alone, ours once by the mean of all."""
    a = official("wsdan")
    net, labels, rate = branch(a, SCALE).train(), a["labels_repeated"], a.number("centre_rate")
    with torch.no_grad():
        _, vector = net(a["features"])
    torch.testing.assert_close(net.distance(vector, labels), a["centre_loss_repeated"], rtol=0, atol=ATOL)
    net.follow(vector, labels, rate=rate)
    assert float((net.centres - a["centres_after_repeated"]).abs().max()) == pytest.approx(9.3e-3, rel=0.01)
    for by, expected in (("last", a["centres_after_repeated"]), ("mean", net.centres)):
        centres = a["centres_before"].clone()
        for label in labels.unique().tolist():
            rows = a["vector"][labels == label]
            moves = rows - F.normalize(a["centres_before"][label], dim=0)
            centres[label] += rate * (moves[-1] if by == "last" else moves.mean(0))
        torch.testing.assert_close(centres, expected, rtol=0, atol=ATOL)


def test_which_map_is_picked(official: Callable[[str], Arrays]) -> None:
    a = official("wsdan")
    attention, draws = a["attention"], 2000
    counts = torch.zeros(6, 4, dtype=torch.float64)
    for number in range(draws):
        chosen = pick(attention, torch.full((6,), (number + 0.5) / draws, dtype=torch.float64))
        counts += (chosen[:, None] == attention).all(3).all(2) / draws
    torch.testing.assert_close(counts, a["map_probability"], rtol=0, atol=5e-4 + 1e-9)
    for column in range(2):  # of what their draws chose, the maps
        rows = a["map_chosen"][:, column]
        assert torch.equal(attention[range(6), rows], a["map_for_crop_and_drop"][:, column])
        cumulated = a["map_probability"].cumsum(1)
        middle = cumulated[range(6), rows] - a["map_probability"][range(6), rows] / 2
        assert torch.equal(pick(attention, middle), a["map_for_crop_and_drop"][:, column])


def theirs_of(mask: Tensor, padding: float) -> Tensor:
    """(4,) top, left, bottom, right of what is cut: it ends at the last pixel's NUMBER plus the padding, exclusively."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if not len(rows):
        rows = columns = torch.arange(24)
    down, across = (padding * side for side in SIZE)
    edges = [rows[0] - down, columns[0] - across, rows[-1] + down, columns[-1] + across]
    return torch.stack([edge.floor().clamp(0, 24).long() for edge in edges])


def thetas(a: Arrays, what: str) -> tuple[Tensor, float]:
    return (
        (a["crop_theta"], a.number("padding"))
        if what == "crop"
        else (a["eval_theta"].repeat(4), a.number("eval_padding"))
    )


@pytest.mark.parametrize("what", ["crop", "eval"])
def test_boxes_and_known_their_ends(what: str, official: Callable[[str], Arrays]) -> None:
    a = official("wsdan_augment")
    theta, padding = thetas(a, what)
    for kind, most in (("full", 1.4), ("low", 2.4)):
        mask = select(a[f"map_{kind}"][:, 0], SIZE, WHOLE, values=theta)
        box = a[f"{what}_{kind}_box"]
        if kind == "full":
            assert torch.equal(torch.stack([theirs_of(one, padding) for one in mask]), box)
        ours = boxes_of_masks(mask, padding)[:, [1, 0, 3, 2]]
        assert 0 < (ours - box).abs().max() <= most + 1e-4


@pytest.mark.parametrize("what", ["crop", "eval"])
@pytest.mark.parametrize("kind", ["full", "low"])
def test_pixels_of_a_crop_and_known_aligned_corners(what: str, kind: str, official: Callable[[str], Arrays]) -> None:
    a = official("wsdan_augment")
    box, theirs = a[f"{what}_{kind}_box"], a[f"{what}_{kind}"]
    by_hand = torch.cat(
        [
            F.interpolate(x[None, :, top:bottom, left:right], SIZE, mode="bilinear", align_corners=True)
            for x, (top, left, bottom, right) in zip(a["images"], box.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(by_hand, theirs, rtol=0, atol=1e-12)
    ours = crop(a["images"], box[:, [1, 0, 3, 2]], SIZE, pixels=SIZE)
    assert 0 < (ours - theirs).abs().max() <= 0.084
    theta, padding = thetas(a, what)
    own = boxes_of_masks(select(a[f"map_{kind}"][:, 0], SIZE, WHOLE, values=theta), padding)
    apart = (crop(a["images"], own, SIZE, pixels=SIZE) - theirs).abs().max()
    assert apart <= 0.475 or kind == "low"
    assert apart < 1.56


def test_drops(official: Callable[[str], Arrays]) -> None:
    a = official("wsdan_augment")
    mask = select(a["map_full"][:, 0], SIZE, Region.model_construct(area=(0.0, 0.5)), values=a["drop_theta"])
    assert torch.equal(~mask[:3], a["drop_full_kept"][:3])
    assert torch.equal(erase(a["images"], mask, "zero")[:3], a["drop_full"][:3])
    # Known: of a map of zeros theirs drops everything, fgvc nothing.
    assert not a["drop_full_kept"][3].any()
    assert not a["drop_full"][3].any()
    assert not mask[3].any()


def test_known_drops_of_maps_that_are_enlarged(official: Callable[[str], Arrays]) -> None:
    """Theirs aligns corners and takes its share of the low map's maximum, fgvc of the enlarged one's."""
    a = official("wsdan_augment")
    low = a["map_low"]
    large = F.interpolate(low, SIZE, mode="bilinear", align_corners=True)[:, 0]
    level = (a["drop_theta"] * low.amax((1, 2, 3)))[:, None, None]
    assert torch.equal(large < level, a["drop_low_kept"])
    assert torch.equal(a["images"] * a["drop_low_kept"][:, None], a["drop_low"])
    mask = select(low[:, 0], SIZE, Region.model_construct(area=(0.0, 0.5)), values=a["drop_theta"])
    apart = cast("Tensor", ~mask != a["drop_low_kept"]).sum((1, 2))
    assert 12 <= int(apart[low.amax((1, 2, 3)) > 0].min()) <= int(apart[low.amax((1, 2, 3)) > 0].max()) <= 60
