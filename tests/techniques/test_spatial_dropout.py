"""Whole channels, as often as they should, and a warning where batch norms follow."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from fgvc.runs.step import StepModule
from fgvc.techniques.registry import build_technique
from fgvc.techniques.spatial_dropout.settings import SpatialDropoutSettings


def build(name: str, stage: int = -1, rate: float = 0.25, **kwargs: object):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **kwargs)
    technique = build_technique(SpatialDropoutSettings(stage=stage, rate=rate))
    return StepModule(net, {"spatial_dropout": technique}, size=(32, 32)), technique


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
def test_channels_are_dropped_whole_and_the_mean_stays(layout: str) -> None:
    _, technique = build("test_resnet")
    channels = technique._channels
    draw = technique.draw(np.random.default_rng(0), SimpleNamespace(labels=torch.zeros(400)))
    shape = {"NCHW": (400, channels, 3, 2), "NHWC": (400, 3, 2, channels), "tokens": (400, 6, channels)}[layout]
    f = torch.rand(shape) + 1
    out = technique._drop(f, SimpleNamespace(draw=draw))
    ratio = (out / f).flatten(2) if layout == "NCHW" else (out / f).flatten(1, -2).transpose(1, 2)
    torch.testing.assert_close(ratio, draw[:, :, None].expand_as(ratio))
    assert sorted(draw.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert float((draw == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    both = technique._drop(torch.cat([f, f]), SimpleNamespace(draw=draw))
    assert torch.equal(both[:400], both[400:])


def test_norms_behind_it_are_a_warning() -> None:
    assert not build("test_resnet")[0].attachments.notes
    assert "batch norms come after layer2" in build("test_resnet", stage=2)[0].attachments.notes[0]
    assert not build("test_vit", img_size=32)[0].attachments.notes, "layer norms have no running statistics"
