import timm
from torch import nn

from fgvc.reparam.block import Branched
from fgvc.techniques.dbb.settings import DbbSettings
from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build_technique


def set_up(name: str) -> tuple[nn.Module, list[str]]:
    net = timm.create_model(name, num_classes=3)
    attachments = Attachments(net, (64, 64))
    build_technique(DbbSettings()).setup(Plan("dbb", attachments))
    return net, attachments.notes


def test_square_convolutions_get_three_branches() -> None:
    net, notes = set_up("resnet10t")
    assert sum(isinstance(module, Branched) for module in net.modules()) == 11
    assert notes == [
        "dbb: 11 of 14 convolutions grew branches: 1x1, 1x1-kxk, average-1x1",
        "dbb: left alone: 3 (1x1 kernel): layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.downsample.1",
    ]


def test_depthwise_ones_get_two() -> None:
    """tf_efficientnet_lite0: a stem, and 16 depthwise convolutions, some padded as TensorFlow does."""
    net, notes = set_up("tf_efficientnet_lite0")
    assert notes[:2] == [
        "dbb: 1 of 49 convolutions grew branches: 1x1, 1x1-kxk, average-1x1",
        "dbb: 16 of 49 convolutions grew branches: 1x1-kxk, average",
    ]
    assert notes[2].startswith("dbb: left alone: 32 (1x1 kernel)")
    assert net.blocks[1][0].conv_dw.same
    norms = [module for module in net.blocks[1][0].conv_dw.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {net.bn1.eps} == {1e-3}
