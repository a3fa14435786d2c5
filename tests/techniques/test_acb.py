import os
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched
from fgvc.reparam.replace import folded_state
from fgvc.techniques.acb.settings import AcbSettings
from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build_technique


def set_up(net: nn.Module, config: AcbSettings, size: tuple[int, int] = (64, 64)) -> Attachments:
    attachments = Attachments(net, size)
    build_technique(config).setup(Plan("acb", attachments))
    return attachments


def blocks(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, Branched)]


def test_grafts_every_square_convolution_and_says_what_it_left_alone() -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    expected = [name for name, module in net.named_modules() if getattr(module, "kernel_size", 0) == (3, 3)
                and isinstance(module, nn.Conv2d)]  # fmt: skip
    attachments = set_up(net, AcbSettings())
    assert blocks(net) == expected
    assert len(expected) == 11
    assert attachments.notes == [
        "acb: 11 of 14 convolutions grew branches: 1xk, kx1",
        "acb: left alone: 3 (1x1 kernel): layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.downsample.1",
    ]


def test_include_and_exclude() -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    attachments = set_up(net, AcbSettings(include=("layer1.*", "layer2.*"), exclude=("*.conv2",)))
    assert blocks(net) == ["layer1.0.conv1", "layer2.0.conv1"]
    assert any("not selected by include and exclude" in note for note in attachments.notes)


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_a_mistake(key: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.acb\.{key}: 'layer9\.\*' fits none .* conv1\.0"):
        set_up(timm.create_model("resnet10t"), AcbSettings(**{key: ("layer9.*",)}))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("test_vit", {"img_size": 64}, "16x16 kernel, even"),
        ("nf_resnet26", {}, "a ScaledStdConv2d"),
        ("resnet10t", {}, "not selected"),
    ],
)
def test_a_backbone_without_any_eligible_convolution_is_refused(name: str, kwargs: dict, reason: str) -> None:
    config = AcbSettings(include=("*downsample*",)) if name == "resnet10t" else AcbSettings()
    with pytest.raises(FgvcError, match=rf"no convolution .*{reason}.*remove techniques\.acb"):
        set_up(timm.create_model(name, **kwargs), config)


def test_five_steps_move_the_branches_and_the_folded_kernels() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=3)
    before = {key: value.clone().double() for key, value in net.state_dict().items()}
    set_up(net, AcbSettings())
    start = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.02)
    for _ in range(5):
        loss = F.cross_entropy(net(torch.randn(4, 3, 64, 64)), torch.randint(0, 3, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state, now = folded_state(net.eval()), net.state_dict()
    assert set(state) == set(before)
    for name in blocks(net):
        for part in ("1xk", "kx1"):
            assert (now[f"{name}.branches.{part}.norm.weight"] != 0).all()  # gamma started at zero
            assert not torch.equal(
                now[f"{name}.branches.{part}.conv.weight"], start[f"{name}.branches.{part}.conv.weight"]
            )
        square = now[f"{name}.origin.weight"].double()
        middle = square.shape[-1] // 2
        added = (state[f"{name}.weight"] - square).abs().amax((0, 1))
        assert (added[middle] > 0).all()  # the row
        assert (added[:, middle] > 0).all()  # the column
        assert added[0, 0] == 0  # the corners are the square's alone
        assert not torch.allclose(state[f"{name}.weight"], before[f"{name}.weight"], rtol=0, atol=1e-5)


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        AcbSettings.model_validate({"includes": ["*"]})
    assert AcbSettings.model_validate(AcbSettings(exclude=("a",)).model_dump(mode="json")) == AcbSettings(exclude=("a",))


@pytest.mark.skipif("FGVC_SHARED" not in os.environ, reason="needs the shared weights")
def test_pretrained_lite0_keeps_its_function() -> None:
    """Its stem and four of its 16 depthwise convolutions pad as TensorFlow does."""
    from safetensors.torch import load_file

    weights = load_file(Path(os.environ["FGVC_SHARED"], "weights", "tf_efficientnet_lite0.safetensors"))
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(weights, strict=True)
    x = torch.rand(4, 3, 128, 128) * 2 - 1
    expected = net.eval()(x)
    attachments = set_up(net, AcbSettings(), (128, 128))
    assert attachments.notes[0] == "acb: 17 of 49 convolutions grew branches: 1xk, kx1"
    assert sum(net.get_submodule(name).same for name in blocks(net)) == 5
    assert torch.equal(net(x), expected)
    plain = timm.create_model("tf_efficientnet_lite0").double().eval()
    plain.load_state_dict(folded_state(net), strict=True)
    assert (plain(x.double()) - expected).abs().max() < 1e-4 * expected.abs().max()
