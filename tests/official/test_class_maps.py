"""Score-CAM as its authors' code computes it, SS-CAM in its authors' convention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fgvc.models.cam import offline
from fgvc.models.cam.methods import _noise
from fgvc.models.cam.offline import class_maps_of
from tests.official.conftest import Arrays

METHODS = {"scorecam": "scorecam", "scorecam_signed": "scorecam", "sscam": "sscam"}


class Net(nn.Module):
    num_features = 8

    def __init__(self, a: Arrays, *, signed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, a.number("conv_stride")).double()
        self.fc = nn.Linear(8, 4).double()
        self.signed = signed
        with torch.no_grad():
            self.conv.weight.copy_(a["conv_weight"])
            self.conv.bias.copy_(a["conv_bias"])
            self.fc.weight.copy_(a["classifier_weight"])
            self.fc.bias.zero_()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.signed else self.conv(x).relu()

    def forward_head(self, f: Tensor, pre_logits: bool = False) -> Tensor:
        return f.mean((2, 3)) if pre_logits else self.fc(f.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture(params=METHODS)
def case(request: pytest.FixtureRequest, official: Callable[[str], Arrays]) -> tuple[str, Arrays, Net]:
    a = official(request.param)
    net = Net(a, signed=request.param == "scorecam_signed")
    with torch.no_grad():
        bias = (a["logits"] - net(a["images"])).mean(0)
        net.fc.bias.copy_(a.get("classifier_bias", bias))
    return request.param, a, net.eval()


def test_the_net_is_the_one_that_was_looked_at(case: tuple[str, Arrays, Net]) -> None:
    _, a, net = case
    torch.testing.assert_close(net.forward_features(a["images"]), a["features"], rtol=0, atol=1e-12)
    torch.testing.assert_close(net(a["images"]), a["logits"], rtol=0, atol=1e-12)
    assert torch.equal(net(a["images"]).argmax(1), a["classes"])
    rows = torch.arange(4)
    for name, x in (("p_image", a["images"]), ("p_black", torch.zeros_like(a["images"]))):
        torch.testing.assert_close(net(x).softmax(1)[rows, a["classes"]], a[name], rtol=0, atol=1e-12)


def test_maps_and_what_they_are_made_of(case: tuple[str, Arrays, Net]) -> None:
    name, a, net = case
    with class_maps_of(net, (20, 20), [METHODS[name]], channels=0) as look:
        assert look.cells == (5, 5)
        maps, raw = look(a["images"], a["classes"], METHODS[name])
    torch.testing.assert_close(maps.double(), a["map"], rtol=0, atol=3e-7)  # 3e-8: maps are float32
    torch.testing.assert_close(raw.double(), a["raw"], rtol=0, atol=1e-6)
    assert maps.amax((1, 2)).gt(0).all(), "also where a black image is the more probable"
    below = (a["p_black"][:, None] > torch.where(a["tried"], a["p_masked"], 0.0)).all(1)
    assert below.nonzero()[:, 0].tolist() == {"scorecam": [0, 1], "scorecam_signed": [], "sscam": [0, 1, 3]}[name]


def test_weights_are_the_probabilities_of_the_masked_images(case: tuple[str, Arrays, Net]) -> None:
    name, a, net = case
    with class_maps_of(net, (20, 20), [METHODS[name]], channels=0) as look:
        cam = look._method(METHODS[name], (20, 20))
        maps = a["features"].numpy()
        for row, label in enumerate(a["classes"].tolist()):
            chosen = cam.tried(maps[row])
            assert sorted(chosen.tolist()) == a["tried"][row].nonzero()[:, 0].tolist(), "flat channels are skipped"
            with torch.no_grad():
                p = cam.scores(a["images"][row : row + 1], row, label, maps[row], chosen)
            torch.testing.assert_close(p, a["p_masked"][row, chosen.tolist()], rtol=0, atol=1e-6)
        cam.activations_and_grads.release()


def test_flat_channels_leave_room_for_others(case: tuple[str, Arrays, Net]) -> None:
    """Channel 6 is flat at 0.5 everywhere, and among the four of the highest mean: it must not take a place."""
    name, a, net = case
    with class_maps_of(net, (20, 20), [METHODS[name]], channels=4) as look:
        cam = look._method(METHODS[name], (20, 20))
        for row in a["features"].numpy():
            chosen = cam.tried(row)
            assert len(chosen) == 4
            assert not {6, 7} & set(chosen.tolist())
        cam.activations_and_grads.release()


def test_features_with_a_sign_are_enlarged_before_they_are_cut(official: Callable[[str], Arrays]) -> None:
    a = official("scorecam_signed")
    maps = {}
    for first in (True, False):
        large = a["raw"][:, None] if first else a["raw"][:, None].relu()
        large = F.interpolate(large, (20, 20), mode="bilinear", align_corners=False)[:, 0].relu()
        least, most = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        maps[first] = (large - least) / (most - least)
    torch.testing.assert_close(maps[True], a["map"], rtol=0, atol=3e-15)
    assert (maps[False] - a["map"]).abs().max() > 0.5, "the other order is another map"


def test_the_noise_of_ss_cam(official: Callable[[str], Arrays]) -> None:
    a = official("sscam")
    assert (a.number("samples"), a.number("sigma")) == (offline.SAMPLES["sscam"], offline.SIGMA["sscam"])
    assert torch.equal(torch.stack(list(_noise(10, (20, 20)))), a["noise"])


def test_torch_cam_s_ss_cam_is_another_form(official: Callable[[str], Arrays]) -> None:
    """Known: it normalises 5 x 5 maps, takes a softmax of logits over channels, and flat channels count."""
    a = official("sscam")
    raw = torch.einsum("bc,bchw->bhw", a["torchcam_weights"], a["features"])
    least, most = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    torch.testing.assert_close((raw - least) / (most - least + 1e-8), a["torchcam_map"], rtol=0, atol=2.2e-15)
    torch.testing.assert_close(a["torchcam_weights"].sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    for ours, theirs in zip(a["raw"], a["torchcam_map"], strict=True):
        assert 0.99 < float(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) < 1
