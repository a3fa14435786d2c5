import pytest
import timm
from pydantic import ValidationError
from torch import nn

from fgvc.techniques.overparam.settings import OverparamSettings
from fgvc.techniques.plan import Attachments, Plan
from fgvc.techniques.registry import build_technique


def set_up(net: nn.Module, **settings: object) -> list[str]:
    attachments = Attachments(net, (64, 64))
    build_technique(OverparamSettings(**settings)).setup(Plan("overparam", attachments))
    return attachments.notes


def test_points_are_taken_too() -> None:
    net = timm.create_model("resnet10t", num_classes=3)
    assert set_up(net, branches=2) == [
        "overparam: 6 of 14 convolutions grew branches: kxk0, kxk1, 1x1",
        "overparam: 5 of 14 convolutions grew branches: kxk0, kxk1, 1x1, identity",
        "overparam: 3 of 14 convolutions grew branches: kxk0, kxk1",  # of the shortcuts: 1x1, channels change
    ]


def test_the_number_of_branches_is_bounded() -> None:
    assert OverparamSettings().branches == 4
    for count in (0, 9):
        with pytest.raises(ValidationError, match="branches"):
            OverparamSettings(branches=count)
