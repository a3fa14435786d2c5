import copy

import pytest
import timm
import torch
from torch import nn

from fgvc.config.recipe import Techniques
from fgvc.config.techniques import settings_by_kind
from fgvc.errors import FgvcError
from fgvc.reparam.block import Branched
from fgvc.runs.step import StepModule
from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build, build_technique

KINDS = ("acb", "dbb", "repvgg", "overparam")


def set_up(net: nn.Module, kind: str, **settings: object) -> list[str]:
    """Set one technique up; its notes."""
    attachments = Attachments(net, (64, 64))
    build_technique(settings_by_kind()[kind](**settings)).setup(Plan(kind, attachments))
    return attachments.notes


def blocks(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, Branched)]


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them_take_include_and_exclude(kind: str) -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    notes = set_up(net, kind, include=("layer1.*", "layer2.*"), exclude=("*.conv2", "*downsample*"))
    assert blocks(net) == ["layer1.0.conv1", "layer2.0.conv1"]
    assert any(
        note.startswith(f"{kind}: left alone: 12 (not selected by include and exclude): conv1.0") for note in notes
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_fits_nothing_is_a_mistake(kind: str, key: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.{kind}\.{key}: 'layer9\.\*' fits none .* conv1\.0"):
        set_up(timm.create_model("resnet10t"), kind, **{key: ("layer9.*",)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_any_eligible_convolution_is_refused(kind: str) -> None:
    with pytest.raises(FgvcError, match=rf"techniques\.{kind}: no convolution .*even.*remove techniques\.{kind}"):
        set_up(timm.create_model("test_vit", img_size=64), kind)


def together(**settings: dict) -> StepModule:
    net = timm.create_model("test_resnet", num_classes=3)
    return StepModule(net, build(Techniques(**settings)), size=(32, 32))


def test_two_techniques_on_one_convolution_are_refused() -> None:
    with pytest.raises(FgvcError, match=r"techniques\.repvgg: 10 .* conv1\.0, .*\.\.\.; .*include and exclude"):
        together(acb={}, repvgg={})
    with pytest.raises(FgvcError, match=r"techniques\.overparam: 1 of .*: layer1\.0\.conv1; .*include and exclude"):
        together(dbb={"include": ["layer1.0.conv1"]}, overparam={})
    step = together(dbb={"include": ["layer1.0.conv1"]}, overparam={"exclude": ["layer1.0.conv1"]})
    assert step.net.layer1[0].conv1.branches.keys() == {"1x1", "1x1-kxk", "average-1x1"}
    assert len(blocks(step.net)) == 15


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_plain_net(kind: str, backbone: str) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=3)
    net = copy.deepcopy(plain)
    set_up(net, kind)
    assert blocks(net)
    plain.double(), net.double()
    x = torch.randn(4, 3, 65, 64, dtype=torch.float64)
    for training in (True, False):  # the second with the statistics that the first has moved
        with torch.no_grad():
            z, replaced_z = plain.train(training)(x), net.train(training)(x)
        assert (replaced_z - z).abs().max() <= 1e-12 * z.abs().max()
