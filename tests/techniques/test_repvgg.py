import timm
from torch import nn

from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build_technique
from fgvc.techniques.repvgg.settings import RepvggSettings


def set_up(net: nn.Module) -> list[str]:
    attachments = Attachments(net, (64, 64))
    build_technique(RepvggSettings()).setup(Plan("repvgg", attachments))
    return attachments.notes


def test_the_identity_stands_where_the_shape_is_kept() -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    assert set_up(net) == [
        "repvgg: 6 of 14 convolutions grew branches: 1x1",  # stem: 3 -> 24 -> 32 -> 64; the first of layers 2 to 4
        "repvgg: 5 of 14 convolutions grew branches: 1x1, identity",
        "repvgg: left alone: 3 (1x1 kernel): layer2.0.downsample.1, layer3.0.downsample.1, layer4.0.downsample.1",
    ]
    assert "identity" in net.layer1[0].conv1.branches
    assert "identity" not in net.layer2[0].conv1.branches  # stride 2


def test_depthwise_convolutions_too() -> None:
    net = timm.create_model("mobilenetv2_100", num_classes=3)
    assert set_up(net)[:2] == [
        "repvgg: 5 of 52 convolutions grew branches: 1x1",
        "repvgg: 13 of 52 convolutions grew branches: 1x1, identity",
    ]
